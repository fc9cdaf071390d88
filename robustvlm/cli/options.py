"""Options that several commands have, in the same words and read in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
