"""Runs of an earlier version (`before/`, made by `make_before.py`) are read, continued, reported, and made anew alike.

They were made on another machine: numbers are compared within what CPUs make of them, choices and counts exactly.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from alike import differences
from make_before import RUNS, STOPPED, call, given
from shapes import shape_of

BEFORE = Path(__file__).parent / "before"
REPORTED = ("attack", "certify", "recertify", "detect", "finetune", "purify", "immunize")
MODELS = ("finetune", "soup", "purify+smooth:0.1:8", "immunize", "tune-prompts", "build")
INPUTS = ("*.parquet", "*.txt", "model")


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all runs, which is the current folder."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "before"


@pytest.fixture(scope="module")
def anew(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, made by the present version in the same order."""
    place = tmp_path_factory.mktemp("anew")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        for path in (path for pattern in INPUTS for path in BEFORE.glob(pattern)):
            shutil.copytree(path, place / path.name) if path.is_dir() else shutil.copy(path, place)
        for name, command in RUNS.items():
            assert call(given(name, command)) == 0, name
    return place


@pytest.mark.parametrize("name", RUNS)
def test_files_columns_and_keys_are_those_they_were(anew: Path, name: str) -> None:
    assert shape_of(anew / name) == shape_of(BEFORE / name)


@pytest.mark.parametrize("name", RUNS)
def test_the_same_command_comes_to_the_same(anew: Path, name: str) -> None:
    assert differences(anew / name, BEFORE / name) == []


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_known_as_finished(before: Path, name: str) -> None:
    files = json.loads((before / name / "checksums.json").read_text())["files"]
    written = {file: (before / name / file).stat().st_mtime_ns for file in files}
    assert call(given(name, RUNS[name])) == 0
    if name != "build":  # which copies its parts whenever it is told to
        assert {file: (before / name / file).stat().st_mtime_ns for file in files} == written
    assert differences(before / name, BEFORE / name) == []
    assert (before / name / "report.html").exists() == (name in REPORTED)


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on_and_ends_as_the_straight_one(before: Path, name: str) -> None:
    run = f"{name}-stopped"
    assert not (before / run / "checksums.json").exists()
    assert call([*given(run, STOPPED[name][0]), "--resume"]) == 0
    assert differences(before / run, before / name) == []
    if (BEFORE / run / "journal.jsonl").exists():
        kept = (BEFORE / run / "journal.jsonl").read_bytes()
        assert (before / run / "journal.jsonl").read_bytes().startswith(kept)
    if name == "attack":
        assert call(["report", name, run, "--out", "both.html"]) == 0
        assert (before / "both.html").exists()


def test_a_run_of_an_earlier_bound_is_read_and_not_gone_on_with(
    before: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Certificates for prompts chosen afterwards had another bound (T7): one run may not hold rows of both."""
    shutil.rmtree(before / "recertify")
    shutil.copytree(BEFORE / "recertify-earlier", before / "recertify")
    sealed = (before / "recertify" / "results.parquet").read_bytes()
    assert call(["report", "recertify", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["runs"][0]["name"] == "recertify"
    assert call(given("recertify", RUNS["recertify"])) == 0  # it has ended, and is only read
    assert (before / "recertify" / "results.parquet").read_bytes() == sealed
    for name in ("checksums.json", "summary.json", "results.parquet"):
        (before / "recertify" / name).unlink()
    assert call(given("recertify", RUNS["recertify"])) == 2
    said = capfd.readouterr().err
    assert "bound: mcdiarmid+kl -> pinelis+kl" in said
    assert "--fresh" in said


@pytest.mark.parametrize("name", REPORTED)
def test_a_run_is_reported(before: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["report", name, "--json"]) == 0
    (told,) = json.loads(capfd.readouterr().out)["runs"]
    assert (told["name"], (before / name / "report.html").exists()) == (name, True)


@pytest.mark.parametrize("spec", MODELS)
def test_what_a_run_made_is_a_model(before: Path, spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    del before
    assert call(["evaluate", spec, "--data", "parquet:test.parquet", "--device", "cpu", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["accuracy"]["value"] > 0.8
