"""`robustvlm immunize` as its user sees it: options, output, exit codes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustvlm.cli.main import main

SMALL = ["--data", "emoji?split=train&styles=noto,fxemoji&copies=1", "--steps", "10", "--min-images", "5"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)  # the program sets its own
    yield
    signal.signal(signal.SIGTERM, before)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["robustvlm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_run_says_what_it_made_and_report_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = ["--held-out", "emoji?split=val&copies=1"]
    assert run(["immunize", "tiny", *SMALL, *held_out, "--name", "a"], monkeypatch) == 0
    said = capsys.readouterr().out
    assert "kept" in said
    assert "Model:  runs/a\n" in said
    assert run(["report", "runs/a", "--json"], monkeypatch) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"][0]["summary"]["classes"]) == 101


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--band", "0.3"], "--band takes two cosines"),
        (["--margin", "much"], "--margin takes a number or auto"),
        (["--xi", "wide"], "--xi takes a number or auto"),
        (["--antibodies", "bnak"], "antibodies come from"),
        (["--add-class", "zebra"], "--add-class takes the folder of a run"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["immunize", *arguments], monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not Path("runs").exists()
