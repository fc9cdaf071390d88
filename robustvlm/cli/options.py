"""Options that several commands have, in the same words."""

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
