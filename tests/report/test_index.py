"""A page over a folder of runs: a row a run, links that lead there, and damaged runs with their reason."""

from __future__ import annotations

import json
import re
import shutil
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote

import pytest
from pages import Page

import robustvlm as rv
from robustvlm.cli.acts import report
from robustvlm.commands import COMMANDS
from robustvlm.commands.index import entries, holds_runs, write_index

BEFORE = Path(__file__).parents[1] / "pins" / "before"
HOSTILE = '"><script>alert(1)<'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all") / "run's #1"
    for name in ("attack", "certify", "detect", "finetune", "immunize", "attack-stopped"):
        shutil.copytree(BEFORE / name, folder / name)
    shutil.copytree(BEFORE / "attack", folder / HOSTILE)
    (folder / HOSTILE / "report.html").write_text("here")
    (folder / "no-run").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "manifest.json").write_text("{")
    return folder


def test_every_run_has_a_row_with_its_figure_and_every_damaged_one_a_reason(runs: Path) -> None:
    assert holds_runs(runs)
    assert not holds_runs(runs / "attack")
    assert not holds_runs(runs / "no-run")
    found = {entry.name: entry for entry in entries(runs)}
    assert set(found) == {"attack", "certify", "detect", "finetune", "immunize", "attack-stopped", "broken", HOSTILE}
    assert {name for name, entry in found.items() if entry.fault} == {"attack-stopped", "broken"}
    assert "has not ended" in found["attack-stopped"].fault
    for name in ("attack", "certify", "detect", "finetune", "immunize"):
        assert found[name].headline is not None, name
        assert found[name].as_dict()["kind"] == name
    assert found["attack"].radius == "L∞ 40/255, 48/255"


def test_a_run_of_every_kind_is_read(tmp_path: Path) -> None:
    kinds = set(COMMANDS) - {"evaluate", "judge"}  # which no earlier version has left; judge is in its own tests
    for name in kinds:
        shutil.copytree(BEFORE / name, tmp_path / name)
    rv.evaluate("tiny", limit=4, out=tmp_path, name="evaluate")
    found = {entry.manifest.get("kind"): entry for entry in entries(tmp_path)}
    assert [entry.fault for entry in found.values()] == [""] * len(found)
    assert set(found) == kinds | {"evaluate"}
    prompts = json.loads((BEFORE / "tune-prompts" / "prompts.json").read_text())["tuned"]
    soup = json.loads((BEFORE / "soup" / "soup.json").read_text())["measures"]
    for name, what, value in (
        ("tune-prompts", "accuracy, validation", prompts["accuracy"]["value"]),
        ("soup", "robust accuracy, validation", soup["robust accuracy"]["value"]),
    ):
        shown = found[name].headline
        assert shown is not None, name
        assert (shown.what, shown.value) == (what, value)
    assert {name for name, entry in found.items() if entry.headline is None} == {"build"}


def test_the_page_sorts_by_its_one_script_and_takes_names_for_names(runs: Path) -> None:
    path = write_index(runs)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == runs / "index.html"
    assert page.tags["script"] == 1
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert script is not None
    assert f"script-src 'sha256-{b64encode(sha256(script[1].encode()).digest()).decode()}'" in text
    assert page.tags["tr"] == 1 + 6
    assert page.tags["svg"] == 2
    links = {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert len(links) == 1
    assert (runs / unquote(links.pop())).read_text() == "here"
    elsewhere = write_index(runs, runs.parent / "other.html")
    (link,) = {
        value for tag, name, value in Page(elsewhere.read_text("utf-8")).attributes if (tag, name) == ("a", "href")
    }
    assert (runs.parent / unquote(link)).read_text() == "here"


def test_the_command_says_it_to_programs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report([str(runs)], None, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == str(runs / "index.html")
    assert {run["name"]: "fault" in run for run in said["runs"]}[HOSTILE] is False
    assert next(run for run in said["runs"] if run["name"] == "attack")["figure"]["what"] == "robust at 48/255"
