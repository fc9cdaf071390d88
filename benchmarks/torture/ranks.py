"""Kill one of two ranks, started by hand or by torchrun: the other must end within 30 s, with one line; then go on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.torture.commands import BY_NAME, Bench, Command
from benchmarks.torture.compare import differences

LONGEST = 30.0
_RANKED = ("attack", "finetune", "purify")


@dataclass
class Ranks:
    """What came of the killed ranks."""

    killed: int = 0
    late: int = 0
    noisy: int = 0
    failed: int = 0
    differ: int = 0
    slowest: float = 0.0
    notes: list[str] = field(default_factory=list)


def torture(bench: Bench, times: int, draws: random.Random) -> Ranks:
    """Kill a rank so often, of the commands that can be shared, at random moments."""
    found = Ranks()
    for number in range(times):
        item = BY_NAME[_RANKED[number % len(_RANKED)]]
        victim = draws.randrange(2)
        place = bench.place(f"ranks-{number}", item.needs)
        _killed(bench, item, place, victim, by_hand=number % 4 != 3, found=found, draws=draws)
    return found


def _killed(
    bench: Bench, item: Command, place: Path, victim: int, *, by_hand: bool, found: Ranks, draws: random.Random
) -> None:
    ranks = _by_hand(item.words, place) if by_hand else _by_torchrun(item.words, place)
    what = f"`robustvlm {item.line}`, two ranks {'by hand' if by_hand else 'by torchrun'}, rank {victim} killed"
    try:
        pids = _pids(ranks, place, by_hand=by_hand)
        if pids is None:
            return
        time.sleep(draws.uniform(0.0, 3.0))
        try:
            os.kill(pids[victim], signal.SIGKILL)
        except ProcessLookupError:
            return  # it was through
        began = time.monotonic()
        found.killed += 1
        other = ranks[1 - victim] if by_hand else ranks[0]
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(timeout=3 * LONGEST)
        seconds = time.monotonic() - began
        found.slowest = max(found.slowest, seconds)
        if seconds > LONGEST:
            found.late += 1
            found.notes.append(f"{what}: the other ended after {seconds:.0f} s")
        said = (place / f"err{1 - victim}").read_text(errors="replace") if by_hand else ""
        if "frame #" in said or "Traceback" in said or (other.returncode != 0 and said.count("error: ") > 1):
            found.noisy += 1
            found.notes.append(f"{what}: {said[-300:]}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    _go_on(bench, item, place, what, found)


def _go_on(bench: Bench, item: Command, place: Path, what: str, found: Ranks) -> None:
    """Repeat the command with one process; training with other sums of gradients may differ in the last bits."""
    again = bench.run(item.words, place)
    if again.code != 0:
        found.failed += 1
        found.notes.append(f"{what}, repeated alone: exit code {again.code}: {again.err[-300:]}")
    elif item.name == "attack" and (differ := differences(place / item.result, bench.straight(item) / item.result)):
        found.differ += 1
        found.notes.append(f"{what}, repeated alone: {'; '.join(differ[:5])}")


def _environment(place: Path) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(place.parent / "cache")}


def _by_hand(words: Sequence[str], place: Path) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        where = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with (place / f"err{rank}").open("wb") as err:
            command = [sys.executable, "-m", "robustvlm", *words]
            environment = _environment(place) | where
            started.append(subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=err))
    return started


def _by_torchrun(words: Sequence[str], place: Path) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "robustvlm", *words]
    quiet = subprocess.DEVNULL
    return [subprocess.Popen(command, cwd=place, env=_environment(place), stdout=quiet, stderr=quiet)]


def _pids(ranks: list[subprocess.Popen[bytes]], place: Path, *, by_hand: bool) -> list[int] | None:
    """Wait until the run has begun; return the processes' ids by rank, or None when it ended first."""
    while not (place / "runs" / "r" / "manifest.json").exists():
        if any(process.poll() is not None for process in ranks):
            return None
        time.sleep(0.02)
    if by_hand:
        return [process.pid for process in ranks]
    children = Path(f"/proc/{ranks[0].pid}/task/{ranks[0].pid}/children").read_text().split()
    by_rank = {}
    for child in map(int, children):
        for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                by_rank[int(variable[5:])] = child
    return [by_rank[rank] for rank in range(2)] if len(by_rank) == 2 else None
