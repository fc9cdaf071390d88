"""Which command a run on disk is of, and how it is read back; nothing is imported before it is needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from robustvlm.errors import UserError, nearest
from robustvlm.runs.run import Command, FinishedRun, manifest_of

COMMANDS = {
    "attack": "robustvlm.commands.attack:ATTACK",
    "finetune": "robustvlm.commands.finetune:FINETUNE",
    "immunize": "robustvlm.commands.immunize:IMMUNIZE",
    "purify": "robustvlm.commands.purify:PURIFY",
    "soup": "robustvlm.commands.soup:SOUP",
    "build": "robustvlm.commands.build:BUILD",
    "tune-prompts": "robustvlm.commands.prompts:TUNE_PROMPTS",
}
"""Where the command of a kind stands."""

# Kinds whose command is not in COMMANDS: modules that read a run and write its report, and how both are called.
_OTHERS = {
    "certify": (
        "robustvlm.commands.certify.record:load_certify_run",
        "robustvlm.commands.certify.view:write_certify_report",
    ),
    "detect": ("robustvlm.commands.detect.view:load_detect_run", "robustvlm.commands.detect.view:write_detect_report"),
}


def command_of(kind: str) -> Command:
    """Return the command of a kind of runs.

    Example:
        >>> command_of("purify").name
        'purify'
    """
    if kind not in COMMANDS:
        raise UserError(f"unknown kind of run '{kind}': {nearest(kind, COMMANDS)}")
    found = _named(COMMANDS[kind])
    assert isinstance(found, Command)
    return found


def open_run(folder: str | Path) -> FinishedRun[Any]:
    """Read a finished run of any kind back, given by its folder or by its name under `runs/`.

    Raises:
        UserError: there is none, it has not ended, or a file is damaged or not what the run wrote.
    """
    from robustvlm.runs.read import find_run

    path = find_run(folder)
    found: FinishedRun[Any] = _reader(path)(path)
    return found


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished run of any kind, by default to `report.html` in its folder; return its path."""
    kind = str(manifest_of(folder)["kind"])
    if kind in _OTHERS:
        write = _named(_OTHERS[kind][1])
    else:
        write = getattr(command_of(kind).load(), "write_report", None)
    if write is None:
        raise UserError(f"cannot report on '{folder}': a run of kind {kind!r} has no report")
    path: Path = write(folder, out)
    return path


def _reader(folder: Path) -> Callable[[Path], Any]:
    kind = str(manifest_of(folder)["kind"])
    return _named(_OTHERS[kind][0]) if kind in _OTHERS else command_of(kind).load().read_run


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
