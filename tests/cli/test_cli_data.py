"""`robustvlm data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from robustvlm.cli.inspect import data


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("cat", "[red]dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (10 + i, 8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    return tmp_path


def call(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(data)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    return result.stdout


def test_facts_as_json(photos: Path) -> None:
    facts = json.loads(call(f"imagefolder:{photos}", "--check", "--json"))
    assert facts["images"] == facts["selected"] == 6
    assert facts["class_names"] == ["[red]dog", "cat"]
    assert facts["trees"] == []
    assert facts["check"]["readable"] == 5
    assert facts["check"]["faults"] == [{"id": "cat/0.png", "reason": "empty file"}]
    assert facts["check"]["images_per_class"] == {"[red]dog": 3, "cat": 2}
    assert (facts["check"]["pixels_shortest"], facts["check"]["pixels_longest"]) == (8, 12)


def test_a_limit_selects_as_runs_do(photos: Path) -> None:
    facts = json.loads(call(f"imagefolder:{photos}", "--limit", "2", "--json", "--check"))
    assert (facts["images"], facts["selected"]) == (6, 2)
    assert facts["check"]["readable"] + facts["check"]["unreadable"] == 2


def test_text_shows_names_unchanged_and_the_faults(photos: Path) -> None:
    shown = call(f"imagefolder:{photos}", "--check")
    assert "2: [red]dog, cat" in shown
    assert "cat/0.png: empty file" in shown


def test_the_bundled_data_and_its_tree() -> None:
    shown = call("emoji?copies=1")
    assert "superclasses in reports" in shown
    assert "emoji/twemoji/" in shown


def test_what_was_left_aside_is_shown(photos: Path) -> None:
    (photos / "__MACOSX").mkdir()
    (photos / "cat" / "notes.txt").write_text("no image")
    (photos / "bird").mkdir()
    (photos / "bird" / "0.png").write_bytes(b"junk")
    shown = call(f"imagefolder:{photos}", "--check")
    assert "left aside: '.txt', '__MACOSX'" in shown
    assert "1 classes: bird" in shown
    assert json.loads(call(f"imagefolder:{photos}", "--json"))["remarks"] == ["left aside: '.txt', '__MACOSX'"]
