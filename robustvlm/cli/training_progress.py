"""The progress of a training, drawn by rich."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from robustvlm.cli.closing import interruptible
from robustvlm.cli.console import Console
from robustvlm.core.ranks import current_ranks
from robustvlm.report.wording import duration
from robustvlm.stats import Mean, Rate
from robustvlm.training import Estimate, TrainingObserver, Validation, Warned


class TrainingProgress(TrainingObserver):
    """A bar with the latest loss terms and the time left; a line for the estimate, each validation and each warning."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[terms]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def began(self, total: int, done: int) -> None:
        if done:
            self._console.print(f"Going on after {done:,} of {total:,} steps.")
        self._task = self._bars.add_task("Training", total=total, completed=done, terms="")

    def estimated(self, estimate: Estimate) -> None:
        self._console.print(
            f"{estimate.steps:,} steps to go: {estimate.passes:,} encoder passes, about {duration(estimate.seconds)}."
        )

    def stepped(self, step: int, terms: Mapping[str, float]) -> None:
        if self._task is not None:
            shown = " ".join(f"{escape(name)} {value:.3g}" for name, value in list(terms.items())[:4])
            self._bars.update(self._task, completed=step, terms=shown)

    def validated(self, found: Validation) -> None:
        shown = [] if found.train_loss is None else [f"loss {found.train_loss:.4g}"]
        for name, value in found.measures.items():
            if isinstance(value, (Rate, Mean)):
                shown.append(f"{escape(name)} {_words(value)}")
        self._console.print(f"Step {found.step:,}: {', '.join(shown)}", highlight=False, soft_wrap=True)

    def warned(self, warning: Warned) -> None:
        self._console.print(
            f"[bold]Warning[/bold], {escape(warning.name)}: {escape(warning.message)}", highlight=False, soft_wrap=True
        )


@contextmanager
def shown_training(console: Console, what: str, folder: Path) -> Iterator[TrainingProgress]:
    """Say what begins (in rich's markup) and in which folder, and yield its progress; Ctrl-C says how to go on."""
    console.print(f"{what} -> {escape(str(folder))}")
    if current_ranks().size > 1:
        console.print(f"{current_ranks().size} processes share every batch.")
    with interruptible(f"the last checkpoint is kept in '{folder}'"), TrainingProgress(console) as progress:
        yield progress


def _words(found: Rate | Mean) -> str:
    if found.value is None:
        return "-"
    if isinstance(found, Mean):
        return f"{found.value:.3f}"
    return f"{found.value:.1%} ({found.low:.1%}-{found.high:.1%})"
