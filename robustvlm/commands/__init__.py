"""The commands that make runs, a folder each: settings, work, and what is shown of the results.

Here: which command a run on disk is of, and how it is read back; nothing is imported before it is needed.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustvlm.errors import UserError, nearest
from robustvlm.runs.run import Command, FinishedRun, manifest_of

if TYPE_CHECKING:
    from robustvlm.report.sections import Report

COMMANDS = {
    "attack": "robustvlm.commands.attack:ATTACK",
    "certify": "robustvlm.commands.certify:CERTIFY",
    "detect": "robustvlm.commands.detect:DETECT",
    "evaluate": "robustvlm.commands.evaluate:EVALUATE",
    "finetune": "robustvlm.commands.finetune:FINETUNE",
    "immunize": "robustvlm.commands.immunize:IMMUNIZE",
    "judge": "robustvlm.commands.judge:JUDGE",
    "purify": "robustvlm.commands.purify:PURIFY",
    "soup": "robustvlm.commands.soup:SOUP",
    "build": "robustvlm.commands.assemble:BUILD",
    "tune-prompts": "robustvlm.commands.prompts:TUNE_PROMPTS",
}
"""Where the command of a kind stands."""


def command_of(kind: str) -> Command:
    """Return the command of a kind of runs.

    Example:
        >>> command_of("purify").name
        'purify'
    """
    if kind not in COMMANDS:
        raise UserError(f"unknown kind of run '{kind}': {nearest(kind, COMMANDS)}")
    module, _, name = COMMANDS[kind].partition(":")
    found = getattr(import_module(module), name)
    assert isinstance(found, Command)
    return found


def open_run(folder: str | Path) -> FinishedRun[Any]:
    """Read a finished run of any kind back, given by its folder or by its name under `runs/`.

    Raises:
        UserError: there is none, it has not ended, or a file is damaged or not what the run wrote.
    """
    from robustvlm.runs.records import find_run

    path = find_run(folder)
    return command_of(str(manifest_of(path)["kind"])).load().read_run(path)


def report_of(run: FinishedRun[Any]) -> Report | None:
    """Return all that is said of a run, as terminal and page read it; None of a kind that has no report."""
    made = getattr(command_of(run.kind).load(), "report_of", None)
    found: Report | None = None if made is None else made(run)
    return found


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished run of any kind, by default to `report.html` in its folder; return its path."""
    kind = str(manifest_of(folder)["kind"])
    write = getattr(command_of(kind).load(), "write_report", None)
    if write is None:
        raise UserError(f"cannot report on '{folder}': a run of kind {kind!r} has no report")
    path: Path = write(folder, out)
    return path
