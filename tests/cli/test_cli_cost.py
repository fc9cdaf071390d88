"""`robustvlm attack --estimate` and `--budget` as a shell sees them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from robustvlm.cli.main import main

QUICK = [
    "attack",
    "tiny",
    "--attack",
    "pgd:steps=2",
    "--limit",
    "6",
    "--lanes",
    "4",
    "--device",
    "cpu",
    "--name",
    "run",
]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: None)
    monkeypatch.setattr(
        "robustvlm.commands.attack.work.write_report", lambda folder: (folder / "report.html").write_text("report")
    )


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["robustvlm", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_estimate_then_budget_then_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *QUICK, "--estimate") == 0
    shown = capsys.readouterr().out
    assert "images to attack: at most" in shown
    assert "The clean pass is kept in runs/run" in shown
    assert not Path("runs/run/summary.json").exists()

    assert call(monkeypatch, *QUICK, "--estimate", "--json") == 0
    captured = capsys.readouterr()
    assert 0 < json.loads(captured.out)["passes_least"] < json.loads(captured.out)["passes_most"]

    assert call(monkeypatch, *QUICK, "--budget", "2passes") == 0
    shown = capsys.readouterr().out
    assert "Stopped early: the budget of 2passes was spent in the clean pass" in shown
    assert "goes on from here" in shown

    assert call(monkeypatch, *QUICK, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["unfinished"] is None
    assert "images to attack: at most" in captured.err


@pytest.mark.parametrize("words", [("--fail-if", "asr>0.5"), ("--budget", "2passes"), ("--track", "tensorboard")])
def test_an_estimate_takes_no_gate_that_it_would_let_pass(
    words: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("robustvlm.commands.attack.work.open_data", lambda **_: pytest.fail("loaded"))
    assert call(monkeypatch, *QUICK, "--estimate", *words) == 2
    said = f"error: --estimate attacks nothing, so {words[0]} would do nothing: leave one of the two out\n"
    assert capsys.readouterr().err == said


def test_a_budget_that_cannot_be_read_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("robustvlm.commands.attack.work.open_data", lambda **_: pytest.fail("loaded"))
    assert call(monkeypatch, *QUICK, "--budget", "ten") == 2
    assert capsys.readouterr().err.startswith("error: cannot read the budget 'ten': expected for example 20000passes")
