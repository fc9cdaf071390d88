"""The progress of a detect run, drawn by rich."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from robustvlm.cli.console import Console
from robustvlm.evaluation.detecting.observer import DetectObserver


class DetectProgress(DetectObserver):
    """One bar per stage; without a terminal, one plain line at its beginning."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> DetectProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, title: str, total: int | None, done: int) -> None:
        self._close()
        if not self._console.is_terminal:
            self._console.print(title, markup=False)
        self._task = self._bars.add_task(title, total=total, completed=done)

    def advance(self, images: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, images)

    def _close(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=self._bars.tasks[self._task].completed)
