"""Kill a command at numbered write events and at random moments, repeat it, and compare with a straight run."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.torture.commands import Bench, Command
from benchmarks.torture.compare import differences

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link", "os.symlink")


@dataclass
class Kills:
    """What came of the kills of one command."""

    name: str
    events: int
    at_events: int = 0
    at_random: int = 0
    failed: int = 0
    differ: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.failed + self.differ


class Counter:
    """A number that a child counts up and its parent reads."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return int.from_bytes(self._shared[:8], "little")

    def up(self) -> int:
        found = self.value + 1
        self._shared[:8] = found.to_bytes(8, "little")
        return found


def watch_writes(counter: Counter, inside: Path, *, kill_at: int | None = None) -> Callable[[], None]:
    """Return what makes a child count every change to files in `inside`, and die at the one with this number.

    Files are opened for writing, renamed, removed, made into folders, truncated, synced; a line of a journal counts
    three times: before it, in the middle of it, and after it.
    """

    def install() -> None:
        def event() -> bool:
            return counter.up() == kill_at

        def audit(name: str, arguments: tuple[Any, ...]) -> None:
            if (
                (name in _CHANGES or (name == "open" and _writes(arguments)))
                and _within(arguments[0], inside)
                and event()
            ):
                _die()

        sys.addaudithook(audit)
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            if event():
                _die()
            sync(descriptor)

        os.fsync = fsync  # type: ignore[assignment]
        _watch_journal(event)

    return install


def _watch_journal(event: Callable[[], bool]) -> None:
    from robustvlm.commands.common.store import Journal

    append = Journal.append

    def watched(self: Journal, fact: dict[str, Any]) -> None:
        if event():
            _die()
        if event():  # half a line reaches the file
            with self.path.open("ab") as handle:
                handle.write(repr(fact).encode("utf-8", "replace")[:20])
                handle.flush()
            _die()
        append(self, fact)
        if event():
            _die()

    Journal.append = watched  # type: ignore[method-assign]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _within(path: Any, inside: Path) -> bool:
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    return os.path.abspath(os.fsdecode(path)).startswith(f"{inside}{os.sep}")


def torture(bench: Bench, item: Command, kills: int, draws: random.Random) -> Kills:
    """Kill one command so often, half at numbered events and half at random moments."""
    straight = bench.straight(item) / item.result
    ignored = frozenset(
        line.partition(" = ")[0] for line in differences(bench.straight(item, again=True) / item.result, straight)
    )
    counter = Counter()
    whole = bench.place(f"count-{item.name}", item.needs)
    ended = bench.run(item.words, whole, prepare=watch_writes(counter, whole))
    found = Kills(item.name, counter.value)
    # The first kill of a place is at an event, as long as there are numbers left, the others at random moments.
    points = _spread(counter.value, (kills + 1) // 2, draws)
    chain = misses = 0
    while found.at_events + found.at_random < kills and misses <= kills:
        chain += 1
        place, story = bench.place(f"kill-{item.name}-{chain}", item.needs), list[str]()
        for _ in range(draws.choice((1, 1, 2))):
            point = points.pop() if points and not story else None
            if point is not None:
                dead = bench.run(item.words, place, prepare=watch_writes(Counter(), place, kill_at=point))
                found.at_events += dead.code == -signal.SIGKILL
                story.append(f"event {point}")
            else:
                moment = draws.uniform(0.05, 1.0) * ended.seconds
                dead = bench.run(item.words, place, kill_after=moment)
                found.at_random += dead.code == -signal.SIGKILL
                story.append(f"{moment:.2f} s")
            misses += dead.code != -signal.SIGKILL  # it was through before
            if dead.code not in (-signal.SIGKILL, 0):
                found.failed += 1
                found.notes.append(_note(item, story, f"exit code {dead.code}: {dead.err[-300:]}"))
        _judge(bench, item, place, straight, ignored, found, story)
    return found


def _judge(
    bench: Bench, item: Command, place: Path, straight: Path, ignored: frozenset[str], found: Kills, story: list[str]
) -> None:
    last = bench.run(item.words, place)
    if last.code != 0:
        found.failed += 1
        found.notes.append(_note(item, story, f"exit code {last.code}: {last.err[-300:]}"))
        return
    differ = differences(place / item.result, straight, ignored=ignored)
    if differ:
        found.differ += 1
        found.notes.append(_note(item, story, "; ".join(differ[:5])))
    else:
        shutil.rmtree(place, ignore_errors=True)


def _note(item: Command, story: Sequence[str], what: str) -> str:
    return f"`robustvlm {item.line}` killed at {', then '.join(story)}, repeated: {' '.join(what.split())}"


def _spread(events: int, count: int, draws: random.Random) -> list[int]:
    """Return so many event numbers, spread over all of them, in random order."""
    count = min(count, events)
    points = [draws.randrange(i * events // count, (i + 1) * events // count) + 1 for i in range(count)]
    draws.shuffle(points)
    return points
