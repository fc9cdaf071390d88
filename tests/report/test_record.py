"""Whatever is wrong with a run folder, the answer is one clear line; the command prints what the files hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from robustvlm.cli.acts import report
from robustvlm.commands.attack.record import load_run
from robustvlm.errors import UserError
from robustvlm.runs.records import find_run

WriteRun = Callable[..., Path]


@pytest.fixture(scope="module")
def good(write_run: WriteRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("records") / "good", images=20, n_classes=5, n_superclasses=2)


def _edit_manifest(folder: Path, **change: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "is no run folder"),
    "manifest cut off": (lambda f: (f / "manifest.json").write_text('{"kind": '), "cannot read"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "is not the manifest of a run"),
    "another kind": (lambda f: _edit_manifest(f, kind="certify"), "expected a run of kind 'attack', got 'certify'"),
    "config incomplete": (lambda f: _edit_manifest(f, config={}), "damaged (config.model: Field required)"),
    "data not there": (lambda f: _edit_manifest(f, data=None), "damaged (data: "),
    "no summary": (lambda f: (f / "summary.json").unlink(), "has not ended"),
    "no results": (lambda f: (f / "results.parquet").unlink(), "has not ended"),
    "summary of another shape": (lambda f: (f / "summary.json").write_text('{"norm": "L2"}'), "images: Field required"),
    "summary binary": (lambda f: (f / "summary.json").write_bytes(b"\xff\xfe\x00"), "cannot read"),
    "results cut off": (lambda f: (f / "results.parquet").write_bytes(b"PAR1"), "cannot read"),
    "column gone": (
        lambda f: pq.write_table(pq.read_table(f / "results.parquet").drop_columns(["margin"]), f / "results.parquet"),
        "lacks the column 'margin'",
    ),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damage_is_named_on_one_line(good: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(good, folder)
    damage, expected = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError) as error:
        load_run(folder)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_runs_are_found_by_path_and_by_name(good: Path) -> None:
    assert find_run(str(good)) == good
    assert find_run("good", root=good.parent) == good
    with pytest.raises(UserError, match="did you mean 'good'"):
        find_run("goood", root=good.parent)
    with pytest.raises(UserError, match="there are no runs"):
        find_run("good", root=good / "nowhere")


def test_a_folder_that_is_no_run_does_not_hide_the_run_of_that_name(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, images = Path("runs/flowers"), Path("flowers")
    images.mkdir()
    (images / "1.png").touch()
    shutil.copytree(good, run)
    assert find_run("flowers") == run
    assert find_run(images) == run
    (tmp_path / "photos").mkdir()
    assert find_run("photos") == Path("photos")  # named as it is in the error that follows
    shutil.copytree(good, images / "one")
    assert find_run("flowers") == images


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(report)
    return app


def test_command_writes_and_says_where(good: Path, tmp_path: Path, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, [str(good), "--out", str(tmp_path / "r.html")])
    assert result.exit_code == 0
    assert "r.html" in result.output
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_command_prints_json(good: Path, tmp_path: Path, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, [str(good), str(good), "--json", "--out", str(tmp_path / "c.html")])
    content = json.loads(result.output)
    assert content["report"] == str(tmp_path / "c.html")
    assert content["runs"][0]["summary"] == json.loads((good / "summary.json").read_text())
    assert [c["p_value_holm"] for c in content["comparisons"]] == [1.0] * 4
