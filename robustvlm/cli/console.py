"""The console of rich that every command draws on, which trusts no text, and the bars of a run's progress on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, NoReturn

from rich import progress
from rich.cells import cell_len, set_cell_size
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.errors import MarkupError
from rich.markup import escape
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from robustvlm.runs.settings import Observer as RunObserver
from robustvlm.text import visible, without_secrets


class Console(RichConsole):
    r"""A console that shows control characters in texts as escapes, cuts secrets, and leaves `:names:` as they are.

    Example:
        >>> console = Console(width=60)
        >>> console.print("a\x1b[2Jb :cat: [/no markup]")
        a\x1b[2Jb :cat: [/no markup]
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, quiet=quiet, width=width, emoji=False)

    @property
    def live(self) -> bool:
        """Whether lines can be drawn over: FORCE_COLOR, as notebooks and CI set it, makes no terminal of a file."""
        return self.is_terminal and self.file.isatty()

    def on_broken_pipe(self) -> NoReturn:
        """Say to the program that the reader has gone away (`| head`), which is no fault; rich would end it here."""
        raise BrokenPipeError

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a string as a text; one that is no valid markup is taken as it stands."""
        text = _fit(text)
        try:
            return super().render_str(text, **settings)
        except MarkupError:
            return super().render_str(text, **(settings | {"markup": False}))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of anything that can be drawn."""
        if isinstance(renderable, Text) and _fit(renderable.plain) != renderable.plain:
            renderable = Text(
                _fit(renderable.plain),
                renderable.style,
                justify=renderable.justify,
                overflow=renderable.overflow,
                no_wrap=renderable.no_wrap,
                end=renderable.end,
            )
        return super().render(renderable, options)


def _fit(text: str) -> str:
    return visible(without_secrets(text))


class _Stage(progress.ProgressColumn):
    """A stage on one line: title, what is done of how much, time spent and left; what else there is, where it fits."""

    def __init__(self, console: RichConsole) -> None:
        super().__init__(Column(no_wrap=True))
        self._console = console

    def render(self, task: progress.Task) -> Text:
        """Return the line."""
        count = f"{task.completed:,.0f}" if task.completed or task.total is not None else ""
        count += "" if task.total is None else f"/{task.total:,.0f}"
        left = None if task.total is None else 0.0 if task.finished else task.time_remaining
        return Text(
            stage_line(
                self._console.width,
                _fit(" ".join(task.description.split())),
                count,
                f"{_clock(task.elapsed)} left {_clock(left)}",
                [*task.fields["words"], task.fields["speed"]],
                None if task.total is None else task.percentage / 100,
            )
        )


def stage_line(width: int, title: str, count: str, times: str, more: Sequence[str], share: float | None) -> str:
    """Return a line of progress no wider than the terminal.

    Count and times are always whole. The title is cut where need be; of what else is known as much is shown as there is
    room for, in its order, and a bar in what is left.

    Example:
        >>> stage_line(60, "Training", "5/20", "0:00:10 left 0:00:30", ["loss 0.4", "9,999 passes/s"], 0.25)
        'Training                    5/20 0:00:10 left 0:00:30'
        >>> stage_line(80, "Training", "5/20", "0:00:10 left 0:00:30", ["loss 0.4"], 0.25)
        'Training               ━━━━╌╌╌╌╌╌╌╌╌╌╌╌      5/20 loss 0.4 0:00:10 left 0:00:30'
    """
    count = f"{count:>9}"
    room, words = width - len(count) - len(times) - 3, ""
    # Beyond 22 characters a title has what the words leave.
    longest = max(22, room - sum(len(word) + 1 for word in more if word) - 1)
    title = set_cell_size(title, max(4, min(max(22, cell_len(title)), longest, room)))
    room -= cell_len(title)
    for word in more:
        if word and len(word) < room:
            words, room = f"{words} {word}", room - len(word) - 1
    bar = ""
    if share is not None and room > 8:
        size = min(24, room - 1)
        full = round(size * min(share, 1.0))
        bar = f" {'━' * full}{'╌' * (size - full)}"
    return f"{title}{bar} {count}{words} {times}"


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=max(0, int(seconds))))


Plain = Literal["", "begin", "end"]
EVERY = 30.0
"""Seconds between two lines at most, where there is no terminal to draw bars on."""


class Bars(RunObserver):
    """One bar a stage: pieces done of all, words of the run, passes per second, time left; and its lines of text.

    Without a terminal there are no bars. A line says instead how far the stage is, every 30 seconds, whatever the run
    is busy with: whoever reads a log can tell slow from stuck.

    Args:
        console: to draw on.
        plain: whether each stage has a line as well: when it begins, or when it ends with its cost.
        doing: what is done before a stage begins, or without any.
        every, clock: seconds between two lines, by this clock.
    """

    def __init__(
        self,
        console: Console,
        *,
        plain: Plain = "",
        doing: str = "",
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._plain = console, plain
        self._every, self._clock, self._ended = every, clock, threading.Event()
        self._teller = threading.Thread(target=self._tell, name="progress", daemon=True)
        self._bars = progress.Progress(_Stage(console), console=console, disable=not console.live)
        self._task: progress.TaskID | None = None
        self._title, self._before = doing or "Working", 0
        self._total: int | None = None
        self._told = clock()
        self._reset()

    def __enter__(self) -> Bars:
        self._bars.start()
        if not self._console.live and not self._console.quiet:
            self._teller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._teller.is_alive():
            self._teller.join()
        self._close()
        self._bars.stop()

    def _tell(self) -> None:
        # A batch, a download or a check may take minutes and report nothing: the clock alone decides.
        with suppress(OSError, ValueError):  # whoever read the lines went away, which the run itself will notice
            while not self._ended.wait(max(0.0, self._told + self._every - self._clock())):
                self.tick()

    def tick(self) -> None:
        """Say how far the stage is, if nothing has been said of it for long enough."""
        if self._clock() - self._told >= self._every:
            self._told = self._clock()
            self._console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def line(self) -> str:
        """Return what is done, of how much, and how long the rest will take, on one line."""
        spent, done, total, now = self._clock() - self._began, self._before + self._done, self._total, self._done
        if total is None:
            count = f"{done:,} done, " if done else ""
            return f"{self._title}: {count}{_span(spent)} so far"
        left = f"about {_span(max(0, total - done) * spent / now)} left" if now else "time left not known yet"
        return f"{self._title}: {done:,} of {total:,}, {left}"

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print(f"[bold]Warning[/bold]: {escape(text)}", highlight=False, soft_wrap=True)

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        self._close()
        self._reset()
        self._title, self._total, self._before = title, total, done
        if self._plain == "begin" and not self._console.live:
            self._console.print(title, markup=False)
        self._task = self._bars.add_task(title, total=total, completed=done, words=(), speed="")

    def advance(self, count: int = 1, **shown: str) -> None:
        self._done += count
        self._shown.update(shown)
        if self._task is not None:
            words = [f"{name.replace('_', ' ')} {text}" for name, text in self._shown.items()]
            self._bars.update(self._task, advance=count, words=words)

    def passed(self, used: int, passes: int) -> None:
        del used
        self._passes += passes
        if self._task is not None:
            speed = self._passes / max(self._clock() - self._began, 1e-9)
            self._bars.update(self._task, speed=f"{speed:,.0f} passes/s")

    def _reset(self) -> None:
        self._began, self._passes, self._done = self._clock(), 0, 0
        self._shown: dict[str, str] = {}

    def _close(self) -> None:
        """End the stage: its bar is full, whatever total was expected."""
        if self._task is None:
            return
        self._bars.update(self._task, total=self._bars.tasks[self._task].completed)
        if self._plain == "end" and not self._console.live and self._done:
            seconds = self._clock() - self._began
            line = f"{self._title}: {self._done} images, {self._passes:,} passes meanwhile, {seconds:.0f} s"
            self._console.print(line, markup=False)
        self._task = None


def _span(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
