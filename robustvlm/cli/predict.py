"""`robustvlm predict` in a shell: rows on standard output or into a file, words beside them, the exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from robustvlm.errors import UserError
from robustvlm.runs.run import Command
from robustvlm.runs.settings import Settings

if TYPE_CHECKING:
    from robustvlm.cli.console import Console
    from robustvlm.commands.predict import PredictSettings
    from robustvlm.commands.predict.rows import Prediction
    from robustvlm.commands.predict.work import Work

_ROWS_PER_TABLE = 200


def predict_and_show(command: Command, settings: Settings) -> None:
    """Ask the model about all images, and write or show a row for each as they come."""
    from robustvlm.cli.console import Console
    from robustvlm.cli.progress import Bars
    from robustvlm.commands.predict.rows import verdict_of
    from robustvlm.commands.predict.work import Work
    from robustvlm.report.screen import show
    from robustvlm.report.sections import Closing

    asked = cast("PredictSettings", settings)
    if asked.written_as == "parquet" and asked.to_stdout and sys.stdout.isatty():
        raise UserError("parquet is no text for a terminal: pass --to FILE, or another --format")
    console = Console(stderr=asked.to_stdout)
    with console.status(command.loading) if console.is_terminal else nullcontext():
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
    from robustvlm.commands.predict.rows import opened

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
    from robustvlm.commands.predict.rows import table_of
    from robustvlm.report.screen import show

    show(console, [table_of(rows, work.about)])
