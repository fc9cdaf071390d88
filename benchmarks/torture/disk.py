"""Fill the disk under every command: it must end in one line, and go on to the same results when there is room."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.torture.commands import Bench, Command
from benchmarks.torture.compare import differences
from benchmarks.torture.forking import Ended


@dataclass
class Full:
    """What came of the full disks of one command."""

    name: str
    filled: int = 0
    passed: int = 0
    bad: int = 0
    failed: int = 0
    differ: int = 0
    notes: list[str] = field(default_factory=list)


def torture(bench: Bench, item: Command, times: int, draws: random.Random) -> Full:
    """Let one command run out of room so often, each time at another point."""
    straight = bench.straight(item) / item.result
    ignored = frozenset(
        line.partition(" = ")[0] for line in differences(bench.straight(item, again=True) / item.result, straight)
    )
    before = _size(bench.place(f"disk-{item.name}-before", item.needs))
    needed = _size(bench.straight(item)) - before
    found = Full(item.name)
    for number in range(times):
        room = int(before + needed * draws.uniform(0.02, 0.98)) // 4096 * 4096 + 4096
        with _small_disk(bench, item, f"disk-{item.name}-{number}", room) as (place, limited):
            ended = limited()
            if ended.code == 0:
                found.passed += 1
                continue
            found.filled += 1
            if not ended.refused or not ({"full", "space"} & set(ended.complaints[0].lower().split())):
                found.bad += 1
                found.notes.append(f"`robustvlm {item.line}` in {room:,} bytes: exit code {ended.code}: {_last(ended)}")
        again = bench.run(item.words, place)
        if again.code != 0:
            found.failed += 1
            found.notes.append(f"`robustvlm {item.line}` after {room:,} bytes, repeated: {_last(again)}")
        elif differ := differences(place / item.result, straight, ignored=ignored):
            found.differ += 1
            found.notes.append(f"`robustvlm {item.line}` after {room:,} bytes, repeated: {'; '.join(differ[:5])}")
        shutil.rmtree(place, ignore_errors=True)
    return found


@contextmanager
def _small_disk(bench: Bench, item: Command, name: str, room: int) -> Iterator[tuple[Path, Callable[[], Ended]]]:
    """Yield a place with little room and what runs the command there; its files outlive the small disk."""
    place = bench.place(name, item.needs)
    small = bench.root / f"{name}-small"
    small.mkdir()
    if os.geteuid() == 0 and _mount(small, room):
        try:
            with contextlib.suppress(OSError):
                shutil.copytree(place, small, dirs_exist_ok=True)
            yield place, lambda: bench.run(item.words, small)
            shutil.rmtree(place)
            shutil.copytree(small, place)
        finally:
            subprocess.run(["umount", "-l", str(small)], check=False)
    else:  # no right to mount: no file may grow beyond what the room would have left for it
        largest = max((path.stat().st_size for path in _files(bench.straight(item))), default=0)
        yield place, lambda: bench.run(item.words, place, prepare=lambda: _limit(min(room, largest)))


def _mount(folder: Path, room: int) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0


def _limit(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _files(place: Path) -> Iterator[Path]:
    return (path for path in place.rglob("*") if path.is_file())


def _size(place: Path) -> int:
    """Bytes on a disk that gives every file whole pages."""
    return sum((path.stat().st_size + 4095) // 4096 * 4096 for path in _files(place))


def _last(ended: Ended) -> str:
    lines = [line for line in ended.err.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing said"
