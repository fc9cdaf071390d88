"""`robustvlm report`: one run as HTML, or several side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from robustvlm.cli.terminal import say, say_json


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
    from robustvlm.report.certify_record import is_certify_run
    from robustvlm.report.compare import compare
    from robustvlm.report.detect_record import is_detect_run
    from robustvlm.report.html import write_report
    from robustvlm.report.immunize_html import is_immunize_run
    from robustvlm.report.record import load_run
    from robustvlm.report.training_html import is_training_run
    from robustvlm.runs.read import find_run

    folders = [find_run(run) for run in runs]
    if len(folders) == 1 and is_certify_run(folders[0]):
        _report_certificates(folders[0], out, as_json=as_json)
        return
    if len(folders) == 1 and is_detect_run(folders[0]):
        _report_detection(folders[0], out, as_json=as_json)
        return
    if len(folders) == 1 and is_training_run(folders[0]):
        _report_training(folders[0], out, as_json=as_json)
        return
    if len(folders) == 1 and is_immunize_run(folders[0]):
        _report_immunity(folders[0], out, as_json=as_json)
        return
    path = write_report(folders, out)
    if not as_json:
        say(f"Report: {path}")
        return
    records = [load_run(folder) for folder in folders]
    content = {
        "report": str(path),
        "runs": [
            {"name": r.name, "folder": str(r.folder), "summary": r.summary.model_dump(mode="json")} for r in records
        ],
        "comparisons": [c.as_dict([r.name for r in records]) for c in compare(records)],
    }
    say_json(json.dumps(content, indent=2, ensure_ascii=False))


def _report_training(folder: Path, out: Path | None, *, as_json: bool) -> None:
    from robustvlm.report.training_html import load_training_run, write_training_report

    path = write_training_report(folder, out)
    if not as_json:
        say(f"Report: {path}")
        return
    run = load_training_run(folder)
    shown = {"name": run.name, "folder": str(folder), "summary": run.summary.model_dump(mode="json")}
    say_json(json.dumps({"report": str(path), "runs": [shown], "comparisons": []}, indent=2, ensure_ascii=False))


def _report_certificates(folder: Path, out: Path | None, *, as_json: bool) -> None:
    from robustvlm.report.certify_html import write_certify_report
    from robustvlm.report.certify_record import load_certify_run

    path = write_certify_report(folder, out)
    if not as_json:
        say(f"Report: {path}")
        return
    run = load_certify_run(folder)
    shown = {"name": run.name, "folder": str(folder), "summary": run.summary.model_dump(mode="json")}
    say_json(json.dumps({"report": str(path), "runs": [shown], "comparisons": []}, indent=2, ensure_ascii=False))


def _report_detection(folder: Path, out: Path | None, *, as_json: bool) -> None:
    from robustvlm.report.detect_html import write_detect_report
    from robustvlm.report.detect_record import load_detect_run

    path = write_detect_report(folder, out)
    if not as_json:
        say(f"Report: {path}")
        return
    run = load_detect_run(folder)
    shown = {"name": run.name, "folder": str(folder), "summary": run.summary.model_dump(mode="json")}
    say_json(json.dumps({"report": str(path), "runs": [shown], "comparisons": []}, indent=2, ensure_ascii=False))


def _report_immunity(folder: Path, out: Path | None, *, as_json: bool) -> None:
    from robustvlm.report.immunize_html import load_immunize_run, write_immunize_report

    path = write_immunize_report(folder, out)
    if not as_json:
        say(f"Report: {path}")
        return
    run = load_immunize_run(folder)
    shown = {"name": run.name, "folder": str(folder), "summary": run.record}
    say_json(json.dumps({"report": str(path), "runs": [shown], "comparisons": []}, indent=2, ensure_ascii=False))
