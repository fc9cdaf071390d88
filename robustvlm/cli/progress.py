"""The progress of an attack run, drawn by rich on standard error."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from robustvlm.attacks import FOOLED
from robustvlm.cli.console import Console
from robustvlm.evaluation.observer import Observer
from robustvlm.report.wording import forecast
from robustvlm.runs.summary import Estimate


class AttackProgress(Observer):
    """One bar per stage: images done, success rate so far, encoder passes per second, time left.

    Without a terminal it writes one plain line at the end of every stage instead.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._reset()

    def __enter__(self) -> AttackProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_stage()
        self._bars.stop()

    def forecast(self, estimate: Estimate) -> None:
        self._console.print(forecast(estimate))

    def begin_stage(self, title: str, total: int | None, done: int) -> None:
        self._close_stage()
        self._reset()
        self._title = title
        self._task = self._bars.add_task(title, total=total, completed=done, rate="", speed="")

    def passed(self, used: int, passes: int) -> None:
        del used
        self._passes += passes
        speed = self._passes / max(time.monotonic() - self._began, 1e-9)
        self._update(speed=f"{speed:,.0f} passes/s")

    def image_done(self, outcome: str | None) -> None:
        self._images += 1
        if outcome is not None:
            self._fooled += outcome == FOOLED
            self._update(rate=f"fooled {self._fooled / self._images:.0%}")
        if self._task is not None:
            self._bars.advance(self._task)

    def _update(self, **fields: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, **fields)  # type: ignore[arg-type]  # extra fields of any name are allowed

    def _reset(self) -> None:
        self._began, self._passes, self._images, self._fooled = time.monotonic(), 0, 0, 0

    def _close_stage(self) -> None:
        if self._task is None:
            return
        self._bars.update(self._task, total=self._bars.tasks[self._task].completed)
        if not self._console.is_terminal and self._images:
            seconds = time.monotonic() - self._began
            line = f"{self._title}: {self._images} images, {self._passes:,} passes, {seconds:.0f} s"
            self._console.print(line, markup=False)
        self._task = None
