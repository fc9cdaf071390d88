"""What `--help` says of every command, kept in `help/`: options in order, types, defaults and texts.

Taken from the commands themselves and not from the drawn page, whose boxes, widths and colours belong to the terminal
and to the release of typer. After a change that is meant, renew the files with

    PYTHONPATH=. python tests/pins/test_help.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer

from robustvlm.cli.main import app

KEPT = Path(__file__).parent / "help"
PROGRAM = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {"robustvlm": PROGRAM, **PROGRAM.commands}  # type: ignore[attr-defined]
_TYPES = {"text": "str", "integer": "int", "boolean": "bool", "file": "path", "directory": "path"}


def described(name: str) -> str:
    """Return a command's help as text: one paragraph for the command, then one for each of its parameters."""
    command = COMMANDS[name]
    parts = [f"{name}\n{_indented(inspect.cleandoc(command.help or ''))}"]
    parts += [f"{_usage(parameter)}\n{_indented(_unescaped(parameter.help))}" for parameter in command.params]
    if name == "robustvlm":
        parts += [f"{other}\n{_indented((COMMANDS[other].help or '').splitlines()[0])}" for other in PROGRAM.commands]  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in "\n\n".join(parts).splitlines()) + "\n"


def _usage(parameter: Any) -> str:
    words = [" / ".join([*parameter.opts, *parameter.secondary_opts]), f"<{_type(parameter)}>"]
    words += [str(parameter.metavar)] * (parameter.metavar is not None)
    words += ["required"] * parameter.required
    words += ["repeatable"] * (parameter.multiple or parameter.nargs != 1)
    default = parameter.default
    if isinstance(default, Path):
        default = str(default)
    if default is not None and not parameter.required:
        words.append(f"= {default!r}")
    return " ".join(words)


def _type(parameter: Any) -> str:
    """Return the type in one word: releases of typer keep it as an annotation or as a type of click's."""
    bounds = [
        f"{sign}{bound:g}"
        for sign, bound in (("min ", _bound(parameter, "min")), ("max ", _bound(parameter, "max")))
        if bound is not None
    ]
    kept = getattr(parameter, "type_descriptor", None)
    name = str(getattr(kept, "annotation", None)) if kept is not None else parameter.type.name
    for word in ("float", "int", "bool", "path", "str"):
        if word in _TYPES.get(name, name).lower():
            return " ".join([word, *bounds])
    raise AssertionError(f"{parameter.name} is of no known type: {name}")


def _bound(parameter: Any, which: str) -> float | None:
    found = getattr(parameter, which, None)
    return getattr(getattr(parameter, "type", None), which, None) if found is None else found


def _unescaped(text: str | None) -> str:
    return (text or "").replace("\\[", "[")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def test_every_command_is_kept() -> None:
    assert {path.stem for path in KEPT.glob("*.txt")} == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_said(name: str) -> None:
    assert described(name) == (KEPT / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PROGRAM.commands)  # type: ignore[attr-defined]
def test_the_page_shows_every_option(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(key, value)
    app([name, "--help"], standalone_mode=False)
    page = capsys.readouterr().out
    words = set(page.replace(",", " ").split())
    missing = [option for parameter in COMMANDS[name].params for option in parameter.opts if option not in words]
    assert [option for option in missing if option.startswith("--")] == []
    # Square brackets are markup to the library that draws the page: what stands in them must not be eaten.
    drawn = "".join(character for character in page if not character.isspace() and character not in "│╭╰╮╯─")
    for parameter in COMMANDS[name].params:
        assert "".join(_unescaped(parameter.help).split()) in drawn, parameter.name


if __name__ == "__main__":
    KEPT.mkdir(exist_ok=True)
    for path in KEPT.glob("*.txt"):
        path.unlink()
    for name in COMMANDS:
        (KEPT / f"{name}.txt").write_text(described(name), encoding="utf-8")
