"""The program as a shell sees it: exit codes, clean JSON, help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import OWN, Call, Ended, environment

from robustvlm import __version__
from robustvlm.cli.main import app

pytestmark = pytest.mark.usefixtures("own_place")

QUICK = ["--attack", "pgd:steps=2", "--limit", "6", "--lanes", "4", "--device", "cpu"]


def test_json_is_all_that_standard_output_holds(call: Call, place: Path) -> None:
    first = call(*OWN, "--json", "--name", "j")
    assert first.code == 0
    summary = json.loads(first.out)
    assert summary["images"]["evaluated"] == 8
    assert summary == json.loads((place / "runs" / "j" / "summary.json").read_text())
    assert json.loads(call(*OWN, "--json", "--name", "j").out) == summary
    assert "<html" in (place / "runs" / "j" / "report.html").read_text().lower()


@pytest.mark.usefixtures("place")
def test_conditions_decide_the_exit_code(call: Call) -> None:
    named = [*OWN, "--name", "gate"]
    assert call(*named, "--fail-if", "clean_accuracy<1%").code == 0
    ended = call(*named, "--fail-if", "clean_accuracy>=0", "--fail-if", "asr>=0%", "--fail-if", "robust_accuracy<0")
    assert ended.code == 1
    assert ended.err == "failed: clean_accuracy>=0, asr>=0%\n"
    assert "attack success rate" in ended.out.lower()


def test_names_that_look_like_markup_are_printed_as_they_are(call: Call, place: Path) -> None:
    (place / "photos").rename(place / "[bold]photos[red]")
    ended = call("attack", "own_encoders:Mean", "--data", "imagefolder:[bold]photos[red]", *QUICK, "--out", "[i]runs")
    assert ended.code == 0
    assert "[i]runs" in ended.out
    assert (place / "[i]runs").is_dir()


def test_version_and_help(call: Call) -> None:
    assert call("--version") == Ended(0, f"robustvlm {__version__}\n", "")
    for name in ["", *(command.name or "" for command in app.registered_commands)]:
        ended = call(*filter(None, [name]), "--help")
        assert ended.code == 0
        assert ended.err == ""
        assert f" {name}" in next(line for line in ended.out.splitlines() if "Usage: " in line)
    assert "Usage: " in call().out


def test_the_module_can_be_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "robustvlm", "--version"],
        capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout == f"robustvlm {__version__}\n"
    assert " torch\n" not in done.stderr, "--version must not wait for the heavy libraries"
