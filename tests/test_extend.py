"""docs/extend.md: every example runs as it stands, on the command line and in Python, and mistakes are one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_SECTION = re.compile(r"^## (Add .*?)$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = dict(_SECTION.findall((ROOT / "docs/extend.md").read_text()))


def blocks(section: str) -> tuple[str, str, str, str]:
    """Return the module's name, its text, the command and the use in Python of a section."""
    (_, module), (_, command), (_, use) = _BLOCK.findall(SECTIONS[section])
    name = re.match(r"# (\w+)\.py\n", module)
    assert name is not None
    return name[1], module, command, use


def run(place: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    there = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    return subprocess.run([sys.executable, *arguments], cwd=place, env=there, capture_output=True, text=True)


def command_of(text: str) -> list[str]:
    program, *arguments = shlex.split(text)
    assert program == "robustvlm"
    return ["-m", "robustvlm", *arguments]


def test_there_is_a_section_for_each_door():
    assert list(SECTIONS) == [
        "Add an attack", "Add a goal", "Add a score", "Add a fine-tuning method", "Add a data source",
    ]  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_runs_in_python_and_on_the_command_line(section, tmp_path):
    name, module, command, use = blocks(section)
    (tmp_path / f"{name}.py").write_text(module)
    (tmp_path / "use.py").write_text(use)
    in_python = run(tmp_path, "use.py")
    assert in_python.returncode == 0, in_python.stderr
    assert in_python.stdout.strip()
    done = run(tmp_path, *command_of(command))
    assert done.returncode == 0, done.stderr
    if section == "Add a data source":
        return
    (manifest,) = (tmp_path / "runs").glob("*/manifest.json")
    code = {key: value for key, value in json.loads(manifest.read_text())["model"].items() if key.startswith("code of")}
    assert len(code) == 1
    assert next(iter(code)).startswith(f"code of {name}:")


@pytest.mark.parametrize("section", ["Add an attack", "Add a score"])
def test_changed_code_is_another_run_and_refused_under_the_same_name(section, tmp_path):
    name, module, command, _ = blocks(section)
    file = tmp_path / f"{name}.py"
    file.write_text(module)
    named = [*command_of(command), "--name", "mine"]
    first = run(tmp_path, *named)
    assert first.returncode == 0, first.stderr
    file.write_text(module + "\nTHIS = 'is another file'\n")
    again = run(tmp_path, *named)
    assert again.returncode == 2
    assert f"code of {name}:" in again.stderr
    file.write_text(module)
    assert run(tmp_path, *named).returncode == 0


def test_code_is_refused_on_request(tmp_path):
    for section in SECTIONS:
        name, module, command, _ = blocks(section)
        (tmp_path / f"{name}.py").write_text(module + "\nraise SystemExit('this must not run')\n")
        done = run(tmp_path, *command_of(command), ROBUSTVLM_NO_CODE="1")
        assert done.returncode == 2
        assert "code is refused" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
