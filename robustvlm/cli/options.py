"""Options that several commands have, in the same words and read in the same way."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.models import ArgumentInfo

Classes = Annotated[Path | None, typer.Option(help="File of class names, one per line or a JSON list.")]
Templates = Annotated[Path | None, typer.Option(help="File of prompt templates, one per line with {}.")]
TreeFile = Annotated[Path | None, typer.Option(help="File of the class tree (JSON, YAML or CSV).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Out = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
RunName = Annotated[
    str | None, typer.Option(help="Name of the run [default: made from the settings, so that they find it again].")
]
Resume = Annotated[
    bool | None,
    typer.Option("--resume/--fresh", help="Insist on an earlier run, or delete it. Default: continue if there is one."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete an earlier run of this name first.")]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")]
RecordAsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON on standard output.")]


def check_given(tokens: Sequence[str], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse what a command line can hold without anybody noticing: empty values, and an option given twice.

    An empty value is most often a shell variable that is not set, and as a path it would be the current folder.

    Args:
        tokens: what stands behind the command's name.
        parameters: of the command's function, annotated as for typer.

    Raises:
        UserError: naming the option.
    """
    from robustvlm.errors import UserError

    known = {name: parameter for parameter in parameters.values() for name in option_names(parameter)}
    seen: dict[str, str] = {}
    for number, token in enumerate(tokens):
        if token == "--":
            break
        option, equals, value = token.partition("=")
        parameter = known.get(option)
        if parameter is None:
            if not token and (number == 0 or tokens[number - 1] not in known):
                raise UserError("an argument is empty: leave it out or give it a value")
            continue
        if not equals and number + 1 < len(tokens) and "bool" not in str(parameter.annotation):
            value = tokens[number + 1]
            equals = "="
        if equals and not value and parameter.default != "":
            raise UserError(f"the value of {option} is empty: leave the option out or give it a value")
        if "list[" not in str(parameter.annotation):
            if parameter.name in seen:
                if seen[parameter.name] == option:
                    raise UserError(f"{option} is given twice: say which value is meant")
                raise UserError(f"{seen[parameter.name]} and {option} contradict each other: give one of them")
            seen[parameter.name] = option


def option_names(parameter: inspect.Parameter) -> list[str]:
    """Return how an option is written on the command line; nothing for an argument."""
    info = parameter.annotation.__metadata__[0]
    if isinstance(info, ArgumentInfo):
        return []
    texts = [info.default, *(info.param_decls or ())]  # inside Annotated typer takes the first for a default
    declared = [part for text in texts if isinstance(text, str) for part in text.split("/") if part.startswith("-")]
    return declared or [f"--{parameter.name.replace('_', '-')}"]


def require_none(given: Mapping[str, object], why: str) -> None:
    """Refuse options that would have no effect.

    Example:
        >>> require_none({"--llm": None}, "is for --make-tree")
    """
    from robustvlm.errors import UserError

    useless = [option for option, value in given.items() if value not in (None, [])]
    if useless:
        raise UserError(f"{useless[0]} {why}")


def one_radius(text: str, option: str) -> tuple[str, float]:
    """Return the single radius of an option as text and number, such as ("1/255", 0.00392...).

    Raises:
        UserError: several radii, or no number.

    Example:
        >>> one_radius("1/4", "--eps")
        ('1/4', 0.25)
    """
    from robustvlm.attacks import parse_eps
    from robustvlm.errors import UserError

    found = parse_eps(text)
    if len(found) != 1:
        raise UserError(f"{option} takes one number, got '{text}'")
    return found[0]
