"""The progress of every kind of run, drawn by rich on standard error."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Literal

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

from robustvlm.certify import format_up
from robustvlm.cli.console import Console
from robustvlm.commands.certify.store import CertifyFact, CertifyObserver, Forecast
from robustvlm.runs.settings import Observer as RunObserver

# The progress of a certify run, drawn by rich


class CertifyProgress(CertifyObserver):
    """One bar: images done, share certified, samples saved by early stopping, passes per second, time left.

    The time left counts samples and not images: an image takes thousands of them, and is certified as a whole.
    """

    def __init__(self, console: Console, *, samples: int) -> None:
        self._console, self._samples = console, samples
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total: int | None = None
        self._images = self._known = self._certified = self._used = self._passes = 0
        self._began = time.monotonic()

    def __enter__(self) -> CertifyProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def forecast(self, forecast: Forecast) -> None:
        self._console.print(forecast_line(forecast))

    def begin(self, total: int | None, done: int) -> None:
        self._began, self._total, self._known = time.monotonic(), total, done
        self._task = self._bars.add_task("Certifying", total=total, completed=done, rate="", speed="", left="")

    def passed(self, rows: int, used: int) -> None:
        del used
        self._passes += rows
        self._update()

    def image_done(self, fact: CertifyFact | None) -> None:
        self._images += 1
        if fact is not None:
            self._certified += fact.radius > 0.0
            self._used += fact.n + fact.n_pilot
        if self._task is not None:
            self._bars.advance(self._task)
        self._update()

    def _update(self) -> None:
        if self._task is None:
            return
        speed = self._passes / max(time.monotonic() - self._began, 1e-9)
        rate = saved = ""
        if self._images:
            rate = f"certified {self._certified / self._images:.0%}"
            saved = f", samples saved {1.0 - self._used / (self._samples * self._images):.0%}"
        self._bars.update(self._task, rate=rate + saved, speed=f"{speed:,.0f} passes/s", left=self._left(speed))

    def _left(self, speed: float) -> str:
        if self._total is None or not speed:
            return ""
        mean = self._used / self._images if self._images else self._samples
        work = (self._total - self._known) * mean - self._passes
        return f"left {clock(max(0.0, work / speed))}"


def forecast_line(forecast: Forecast) -> str:
    """Return the forecast in words.

    Example:
        >>> forecast_line(Forecast(10, 1000, 10_000, 42.0, 0.5))
        '10 images, at most 1,000 samples each: up to 10,000 encoder passes, about 0:42; radius at best 0.5'
    """
    images = "images" if forecast.images is None else f"{forecast.images:,} images"
    cost = ""
    if forecast.passes is not None and forecast.seconds is not None:
        cost = f": up to {forecast.passes:,} encoder passes, about {clock(forecast.seconds)}"
    kept = f"; kept features take {forecast.cache_bytes / 1e6:,.1f} MB" if forecast.cache_bytes else ""
    best = format_up(forecast.best_radius, 3)
    return f"{images}, at most {forecast.samples:,} samples each{cost}; radius at best {best}{kept}"


def clock(seconds: float) -> str:
    """Return a duration as minutes or hours.

    Example:
        >>> clock(42), clock(3700)
        ('0:42', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# The progress of a run of any kind, drawn by rich

Plain = Literal["", "begin", "end"]


class Bars(RunObserver):
    """One bar a stage: pieces done, words of the run, encoder passes per second, time left; and its lines of text.

    Args:
        console: to draw on; without a terminal there are no bars.
        plain: whether a line for each stage stands in their place: when it begins, or when it ends with its cost.
    """

    def __init__(self, console: Console, *, plain: Plain = "") -> None:
        self._console, self._plain = console, plain
        self._bars = Progress(
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._reset()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._bars.stop()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print(f"[bold]Warning[/bold]: {escape(text)}", highlight=False, soft_wrap=True)

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        self._close()
        self._reset()
        self._title = title
        if self._plain == "begin" and not self._console.is_terminal:
            self._console.print(title, markup=False)
        self._task = self._bars.add_task(title, total=total, completed=done, words="", speed="")

    def advance(self, count: int = 1, **shown: str) -> None:
        self._done += count
        self._shown.update(shown)
        if self._task is not None:
            words = " ".join(f"{name.replace('_', ' ')} {text}" for name, text in self._shown.items())
            self._bars.update(self._task, advance=count, words=words)

    def passed(self, used: int, passes: int) -> None:
        del used
        self._passes += passes
        if self._task is not None:
            speed = self._passes / max(time.monotonic() - self._began, 1e-9)
            self._bars.update(self._task, speed=f"{speed:,.0f} passes/s")

    def _reset(self) -> None:
        self._began, self._passes, self._done = time.monotonic(), 0, 0
        self._shown: dict[str, str] = {}

    def _close(self) -> None:
        """End the stage: its bar is full, whatever total was expected."""
        if self._task is None:
            return
        self._bars.update(self._task, total=self._bars.tasks[self._task].completed)
        if self._plain == "end" and not self._console.is_terminal and self._done:
            seconds = time.monotonic() - self._began
            line = f"{self._title}: {self._done} images, {self._passes:,} passes, {seconds:.0f} s"
            self._console.print(line, markup=False)
        self._task = None
