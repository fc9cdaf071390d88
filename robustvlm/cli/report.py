"""`robustvlm report`: one run as HTML, or several side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustvlm.cli.terminal import say, say_json

if TYPE_CHECKING:
    from robustvlm.runs.run import FinishedRun


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names of runs under runs/.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The HTML file to write [default: RUN/report.html, or comparison.html for several]."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON, with the path of the report.")
    ] = False,
) -> None:
    """Write the report of a run, or compare several runs on the images they share (paired tests)."""
    # The libraries behind reports take a second to load; other commands and --help should not wait for them.
    from robustvlm.commands.attack.compare import compare, write_comparison
    from robustvlm.commands.attack.record import load_run
    from robustvlm.commands.registry import open_run, write_report
    from robustvlm.runs.read import find_run

    folders = [find_run(run) for run in runs]
    path = write_report(folders[0], out) if len(folders) == 1 else write_comparison(folders, out)
    if not as_json:
        say(f"Report: {path}")
        return
    found: Sequence[FinishedRun[Any]] = [open_run(folders[0])]
    comparisons = []
    if len(folders) > 1:
        records = [load_run(folder) for folder in folders]
        found = records
        comparisons = [c.as_dict([r.name for r in records]) for c in compare(*records)]
    content = {"report": str(path), "runs": [_shown(run) for run in found], "comparisons": comparisons}
    say_json(json.dumps(content, indent=2, ensure_ascii=False))


def _shown(run: FinishedRun[Any]) -> dict[str, Any]:
    summary = run.summary if isinstance(run.summary, dict) else run.summary.model_dump(mode="json")
    return {"name": run.name, "folder": str(run.folder), "summary": summary}
