"""Commands that do more than start a run and show it: audits of certificates, predictions row by row, reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from robustvlm.cli.app import start_and_show
from robustvlm.cli.terminal import json_without_secrets, say, say_json
from robustvlm.commands import open_run, write_report
from robustvlm.commands.certify import CertifySettings
from robustvlm.commands.predict import PredictSettings
from robustvlm.core.ranks import resolve_device
from robustvlm.errors import UserError, is_out_of_memory, nearest
from robustvlm.runs.run import Command, FinishedRun, manifest_of
from robustvlm.runs.settings import Settings
from robustvlm.text import one_line, visible, visible_json, without_secrets

if TYPE_CHECKING:
    from robustvlm.cli.console import Console
    from robustvlm.commands.certify.audit_search import Effort
    from robustvlm.commands.predict.record import Prediction
    from robustvlm.commands.predict.work import Work
    from robustvlm.report.document import Batch

# `robustvlm certify --audit RUN`: attacks on the certificates of a finished run


def certify_or_audit(command: Command, settings: Settings) -> None:
    """Certify, or audit the run that the settings name: exit code 1 if one of its bounds is broken."""
    given = cast("CertifySettings", settings)
    if given.audit is None:
        start_and_show(command, settings)
    elif broken := run_audit(given):
        raise typer.Exit(broken)


def run_audit(settings: CertifySettings, default: Effort | None = None) -> int:
    """Audit the run that the settings name, print what was found and return the exit code: 1 if a bound is broken.

    Args:
        default: how much is searched where the settings do not say.

    Raises:
        UserError: the audit could not be made, for whatever reason: 1 is kept for certificates that are false.
    """
    from robustvlm.cli.console import Bars, Console
    from robustvlm.commands.certify.audit import audit_folder
    from robustvlm.commands.certify.audit_search import Effort
    from robustvlm.commands.certify.view import show_audit, write_certify_report
    from robustvlm.runs.records import find_run

    run, as_json, default = str(settings.audit), settings.as_json, default or Effort()
    effort = replace(
        default, starts=settings.audit_starts or default.starts, steps=settings.audit_steps or default.steps
    )
    folder = find_run(run, root=settings.out)
    with Bars(Console(stderr=True), doing="Auditing") as progress:
        try:
            result = audit_folder(
                folder,
                effort,
                limit=settings.limit,
                seed=settings.seed,
                device=str(resolve_device(settings.device)),
                observer=progress,
            )
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:  # the encoder may be the user's code, which fails in any way
            if is_out_of_memory(error):
                raise
            said = one_line(error, limit=200)
            raise UserError(f"the audit of '{run}' failed: {type(error).__name__}: {said}") from error
    report = write_certify_report(folder)
    content = result.model_dump(mode="json")
    if as_json:
        say_json(json.dumps(content | {"broken": len(result.broken), "report": str(report)}, indent=2))
    else:
        show_audit(content, Console())
        say(f"{result.passes:,} encoder passes in {result.seconds:.0f} s. Report: {report}")
    return 1 if result.broken else 0


# `robustvlm predict`: rows on standard output or into a file, words beside them, the exit code

_ROWS_PER_TABLE = 200


def predict_and_show(command: Command, settings: Settings) -> None:
    """Ask the model about all images, and write or show a row for each as they come."""
    from robustvlm.cli.console import Bars, Console
    from robustvlm.commands.predict.record import verdict_of
    from robustvlm.commands.predict.work import Work
    from robustvlm.report.screen import show
    from robustvlm.report.sections import Closing

    asked = cast("PredictSettings", settings)
    if asked.written_as == "parquet" and asked.to_stdout and sys.stdout.isatty():
        raise UserError("parquet is no text for a terminal: pass --to FILE, or another --format")
    console = Console(stderr=asked.to_stdout)
    with console.status(command.loading) if console.live else Bars(console, doing=command.loading):
        work = Work(asked)
    with Bars(console) as progress, _written(work, console) as write:
        progress.begin(command.doing, work.total)
        for rows in work.batches():
            write(rows)
            progress.advance(len(rows))
        if not work.counts.images:
            work.require_some()
    for remark in work.remarks:
        console.print(f"Note: {remark}", markup=False, highlight=False, soft_wrap=True)
    closing = [] if asked.to is None or asked.to_stdout else [Closing({"Predictions": asked.to})]
    show(console, [verdict_of(work.counts, work.about)], *closing)
    work.require_some()
    first = work.counts.first_fault
    if asked.strict and first is not None:
        raise UserError(
            f"{work.counts.faults:,} of {work.counts.images:,} images could not be read; the first, "
            f"'{first.image}': {first.reason}"
        )


@contextmanager
def _written(work: Work, console: Console) -> Iterator[Any]:
    """Yield what takes rows: a file, standard output, or the terminal, in tables of a bounded length."""
    from robustvlm.commands.predict.record import opened

    settings = work.settings
    if settings.written_as != "table":
        to = None if settings.to_stdout else settings.to
        with opened(settings.written_as, to, work.about, work.counts) as sink:
            yield sink.write
        return
    waiting: list[Prediction] = []

    def write(rows: list[Prediction]) -> None:
        waiting.extend(rows)
        while len(waiting) >= _ROWS_PER_TABLE:
            _print(work, console, waiting[:_ROWS_PER_TABLE])
            del waiting[:_ROWS_PER_TABLE]

    yield write
    if waiting:
        _print(work, console, waiting)


def _print(work: Work, console: Console, rows: list[Prediction]) -> None:
    from robustvlm.commands.predict.record import table_of
    from robustvlm.report.screen import show

    show(console, [table_of(rows, work.about)])


# `robustvlm report`: one run as HTML, or several side by side; and the same for machines

_FORMS = ("html", "json", "md", "tex", "csv", "junit", "sarif")


def _show_schema(wanted: bool) -> None:
    if wanted:
        from robustvlm.report.document import SCHEMA

        say_json(SCHEMA.read_text(encoding="utf-8").rstrip("\n"))
        raise typer.Exit


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders, names of runs under runs/, or a folder of runs.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The file to write [default: RUN/report.html, FOLDER/index.html; comparison.html for several; other "
            "formats go to standard output].",
            rich_help_panel="Output",
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="html is the page; json, md, tex, csv, junit and sarif are the same report for machines and CI.",
            rich_help_panel="Output",
        ),
    ] = "html",
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            help="End with exit code 1 if this holds of a run, e.g. 'robust_accuracy.low<30%'; a test case in junit.",
            rich_help_panel="Output",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the numbers as JSON, with the path of the report.", rich_help_panel="Output"
        ),
    ] = False,
    methods: Annotated[
        bool,
        typer.Option(
            "--methods",
            help="Print a methods paragraph for a paper, with BibTeX, and write nothing.",
            rich_help_panel="Output",
        ),
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            callback=_show_schema,
            is_eager=True,
            help="Print the JSON schema of --format json.",
            rich_help_panel="Output",
        ),
    ] = False,
) -> None:
    """Write the report of a run, compare several runs on the images they share (paired tests), or list a folder's.

    An evaluation named first has the attack runs of its model beside it: clean, under corruptions, under attack.
    """
    del schema
    if form not in _FORMS:
        raise UserError(f"unknown --format '{form}': {nearest(form, _FORMS)}")
    if as_json and form != "html":
        raise UserError(f"--json and --format {form} contradict each other: --format json has the numbers too")
    if methods:
        if form != "html" or fail_if:
            raise UserError("--methods prints its own words: leave out --format and --fail-if")
        _print_methods(runs, out, as_json=as_json)
    elif form != "html":
        _write_as(form, runs, out, fail_if or [])
    else:
        _write_pages(runs, out, as_json=as_json)
        if fail_if:
            _end_if_shut(_batch(runs, fail_if))


def _batch(runs: Sequence[str], fail_if: Sequence[str]) -> Batch:
    from robustvlm.commands.index import batch_of
    from robustvlm.runs.records import find_run

    return batch_of([find_run(run) for run in runs], fail_if)


def _write_as(form: str, runs: Sequence[str], out: Path | None, fail_if: Sequence[str]) -> None:
    """Print runs for machines, or write them to a file; the same text in both."""
    from robustvlm.report.formats import written
    from robustvlm.report.page import write_page

    batch = _batch(runs, fail_if)
    text = written(batch, form)
    if out is not None:
        as_json = form in ("json", "sarif")
        shown = visible_json(json_without_secrets(text)) if as_json else visible(without_secrets(text))
        write_page(out, shown + "\n")
        say(f"Report: {out}")
    elif form in ("json", "sarif"):
        say_json(text)
    else:
        say(text)
    _end_if_shut(batch)


def _end_if_shut(batch: Batch) -> None:
    """End with exit code 1 where a condition holds; one that could not be put to a run counts as one that does."""
    asked = any(told.gates for told in batch.runs)
    failed = [f"{gate.text} ({told.run.name})" for told in batch.runs for gate in told.gates if gate.holds]
    failed += [f"{one.folder} cannot be read ({one.reason})" for one in batch.left_out if one.fault and asked]
    if failed:
        say(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _write_pages(runs: Sequence[str], out: Path | None, *, as_json: bool) -> None:
    """Write the page of one run, of several side by side, or of a folder of them."""
    # The libraries behind reports take a second to load; other commands and --help should not wait for them.
    from robustvlm.cli.console import Bars, Console
    from robustvlm.commands.attack.compare import apart, compare, write_comparison
    from robustvlm.commands.attack.record import load_run
    from robustvlm.commands.evaluate.beside import write_beside
    from robustvlm.commands.index import entries, holds_runs, write_index
    from robustvlm.runs.records import find_run

    folders = [find_run(run) for run in runs]
    content: dict[str, Any]
    if len(folders) == 1 and holds_runs(folders[0]):
        with Bars(Console(stderr=True)) as progress:
            listed = entries(folders[0], progress)
        index = write_index(folders[0], out, listed)
        content = {"report": str(index), "runs": [entry.as_dict() for entry in listed], "comparisons": []}
        if as_json:
            say_json(json.dumps(content, indent=2, ensure_ascii=False))
        else:
            say(f"Index: {index}")
        return
    evaluated = len(folders) > 1 and manifest_of(folders[0])["kind"] == "evaluate"
    if evaluated:
        path = write_beside(folders, out)
    else:
        path = write_report(folders[0], out) if len(folders) == 1 else write_comparison(folders, out)
    records = [load_run(folder) for folder in folders] if len(folders) > 1 and not evaluated else []
    for sentence in apart(records, [record.name for record in records]):
        say(f"note: {sentence}", err=True)
    if not as_json:
        say(f"Report: {path}")
        return
    found: Sequence[FinishedRun[Any]] = [open_run(folder) for folder in folders[: len(folders) if evaluated else 1]]
    comparisons = []
    if records:
        found = records
        comparisons = [c.as_dict([r.name for r in records]) for c in compare(*records)]
    content = {"report": str(path), "runs": [_shown(run) for run in found], "comparisons": comparisons}
    say_json(json.dumps(content, indent=2, ensure_ascii=False))


def _print_methods(runs: Sequence[str], out: Path | None, *, as_json: bool) -> None:
    from robustvlm.report.methods import methods_of
    from robustvlm.runs.records import find_run, read_drawn

    if len(runs) > 1 or out is not None:
        given = "several runs" if len(runs) > 1 else "--out"
        raise UserError(f"--methods prints the paragraph of one run, got {given}: name one run, without --out")
    folder = find_run(runs[0])
    made = methods_of(manifest_of(folder), drawn=read_drawn(folder / "summary.json"))
    if as_json:
        content = {"text": made.text, "latex": made.latex, "bibtex": made.bibtex}
        say_json(json.dumps(content, indent=2, ensure_ascii=False))
        return
    for part in ("Words", made.text, "LaTeX (natbib)", made.latex, "BibTeX", made.bibtex):
        say(part + "\n")


def _shown(run: FinishedRun[Any]) -> dict[str, Any]:
    from robustvlm.report.document import summary_of

    return {"name": run.name, "folder": str(run.folder), "summary": summary_of(run)}
