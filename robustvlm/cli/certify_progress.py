"""The progress of a certify run, drawn by rich."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from robustvlm.certify import format_up
from robustvlm.cli.console import Console
from robustvlm.evaluation.certifying.observer import CertifyObserver, Forecast
from robustvlm.runs.certify_rows import CertifyFact


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
