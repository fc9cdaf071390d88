"""docs/extend.md: every example runs as it stands, on the command line and in Python, and mistakes are one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
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


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


# Each program has a process of its own, forked from one that has loaded the libraries, which takes most of its time.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["open_clip", "scipy.stats", "matplotlib.figure", "robustvlm.commands.attack.work"])


def run(place: Path, *arguments: str, **more: str) -> Done:
    process = _PROCESSES.Process(target=_start, args=(place, arguments, more))
    process.start()
    process.join()
    assert process.exitcode is not None
    return Done(process.exitcode, (place / "out.txt").read_text(), (place / "err.txt").read_text())


def _start(place: Path, arguments: tuple[str, ...], more: dict[str, str]) -> None:
    """Be `python ARGUMENTS` in a folder."""
    os.environ.update(more)
    os.chdir(place)
    for number, name in enumerate(("out.txt", "err.txt"), 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.path[0:0] = [str(place)]
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


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
