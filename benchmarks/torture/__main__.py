"""Kill, feed with nonsense, starve and bereave the program, and count what is lost; prints Markdown tables.

    python -m benchmarks.torture --kills 200 --inputs 1000
    python -m benchmarks.torture --quick

The exit code is 1 if anything was lost, differed, hung, ended in a traceback or passed in silence.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.common import markdown
from benchmarks.torture import disk, inputs, kills, ranks
from benchmarks.torture.commands import BY_NAME, COMMANDS, Bench, Command
from benchmarks.torture.forking import in_parallel, load_everything

T = TypeVar("T")

_QUICK = {"kills": 12, "inputs": 60, "disks": 6, "ranks": 2}
_OF_INPUTS = ("inputs", *inputs.OUTCOMES)


def main() -> int:
    """Run all parts; return 1 if there was a fault."""
    options = _options()
    began = time.monotonic()
    load_everything()
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        root = Path(options.out or scratch)
        bench = Bench(root / "bench", timeout=options.timeout)
        commands = [item for item in COMMANDS if item.name != "tuned" and options.only in ("", item.name)]
        print(f"`python -m benchmarks.torture {' '.join(sys.argv[1:])}`\n", flush=True)
        notes: list[str] = []
        notes += _kills(bench, commands, options)
        notes += _disks(bench, commands, options)
        notes += _inputs(bench, options)
        notes += _ranks(bench, options)
    for note in notes:
        print(f"- {note}")
    print(f"\n{len(notes)} faults in {(time.monotonic() - began) / 60:.0f} minutes")
    return int(bool(notes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--disks", type=int, default=44, help="full disks")
    parser.add_argument("--ranks", type=int, default=12, help="killed ranks")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--only", default="", help="torture this command alone, with kills and full disks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a command hangs")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--out", default=None, help="folder to work in, kept [default: a temporary one]")
    found = parser.parse_args()
    if found.quick:
        vars(found).update(_QUICK)
    return found


def _kills(bench: Bench, commands: list[Command], options: argparse.Namespace) -> list[str]:
    if options.kills == 0:
        return []
    found = _by_commands(
        bench, commands, options.kills, options.workers,
        lambda item, count: kills.torture(bench, item, count, _draws(options, f"kill {item.name}")),
    )  # fmt: skip
    rows: list[list[object]] = [[k.name, k.events, k.at_events, k.at_random, k.failed, k.differ] for k in found]
    header = ("killed", "write events of a run", "kills at events", "at random moments", "resumes failed", "differ")
    _table(header, [*rows, _sums("all", rows)])
    return [note for k in found for note in k.notes]


def _disks(bench: Bench, commands: list[Command], options: argparse.Namespace) -> list[str]:
    if options.disks == 0:
        return []
    found = _by_commands(
        bench, commands, options.disks, options.workers,
        lambda item, count: disk.torture(bench, item, count, _draws(options, f"disk {item.name}")),
    )  # fmt: skip
    rows: list[list[object]] = [[f.name, f.filled, f.passed, f.bad, f.failed, f.differ] for f in found]
    header = ("disk of", "was full", "sufficed", "no clear line", "resumes failed", "differ")
    _table(header, [*rows, _sums("all", rows)])
    return [note for f in found for note in f.notes]


def _inputs(bench: Bench, options: argparse.Namespace) -> list[str]:
    if options.inputs == 0:
        return []
    bad = inputs.generate(options.inputs, _draws(options, "inputs"))
    found = inputs.torture(bench, bad, workers=options.workers)
    rows: list[list[object]] = [
        [kind, counts.total(), *(counts[outcome] for outcome in inputs.OUTCOMES)]
        for kind, counts in sorted(found.counts.items())
    ]
    _table(("bad", *_OF_INPUTS), [*rows, _sums("all", rows)])
    return found.faults


def _ranks(bench: Bench, options: argparse.Namespace) -> list[str]:
    if options.ranks == 0:
        return []
    found = ranks.torture(bench, options.ranks, _draws(options, "ranks"))
    header = ("ranks killed", "others late", "slowest, s", "no clear line", "resumes failed", "differ")
    row = [found.killed, found.late, f"{found.slowest:.1f}", found.noisy, found.failed, found.differ]
    _table(header, [row])
    return found.notes


def _draws(options: argparse.Namespace, purpose: str) -> random.Random:
    return random.Random(f"{options.seed} {purpose}")


def _by_commands(
    bench: Bench, commands: list[Command], total: int, workers: int, work: Callable[[Command, int], T]
) -> list[T]:
    """Return what `work` gives for each command with its share of the total, in the order of the commands."""
    shares = [(item, count) for item, count in zip(commands, _shares(total, len(commands)), strict=True) if count]
    for name in sorted({need for item, _ in shares for need in item.needs}):
        bench.straight(BY_NAME[name])
    parts = in_parallel(lambda part: [work(*share) for share in shares[part::workers]], workers)
    return [parts[number % workers][number // workers] for number in range(len(shares))]


def _shares(total: int, parts: int) -> list[int]:
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def _sums(name: str, rows: list[list[object]]) -> list[object]:
    columns: Callable[[int], int] = lambda i: sum(int(str(row[i])) for row in rows)  # noqa: E731
    return [name, *(columns(i) for i in range(1, len(rows[0])))]


def _table(header: tuple[str, ...], rows: list[list[object]]) -> None:
    print(markdown(header, rows), end="\n\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
