"""Bad options, files, folders, cards and archives by the hundred, and how the program takes each of them."""

from __future__ import annotations

import random
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.torture import planted, seeded
from benchmarks.torture.bad import Bad, write_good_files
from benchmarks.torture.commands import BY_NAME, Bench
from benchmarks.torture.forking import Ended, in_parallel

REFUSED, WORKED, TRACEBACK, HUNG, SILENT, OTHER = "refused", "worked", "traceback", "hung", "silent", "other"
OUTCOMES = (REFUSED, WORKED, TRACEBACK, HUNG, SILENT, OTHER)


@dataclass
class Tally:
    """Outcomes by kind of input, and the faults to be mended."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, bad: Bad, ended: Ended) -> None:
        """Count one input."""
        outcome = judged(bad, ended)
        self.counts.setdefault(bad.kind, Counter())[outcome] += 1
        if outcome not in (REFUSED, WORKED):
            last = [line for line in (ended.err or ended.out).splitlines() if line.strip()][-1:]
            self.faults.append(f"{outcome}: {bad.kind}: {bad.what[:150]}: `robustvlm {bad.line[:200]}` -> {last}")

    def total(self, outcome: str) -> int:
        """How many inputs had this outcome."""
        return sum(found[outcome] for found in self.counts.values())


def judged(bad: Bad, ended: Ended) -> str:
    """Return the outcome of one bad input."""
    if ended.hung:
        return HUNG
    if ended.traceback:
        return TRACEBACK
    if ended.refused:
        return REFUSED
    if ended.code == 0:
        told = bad.clue is not None and bad.clue in ended.out + ended.err
        return SILENT if bad.wrong and not told else WORKED
    return OTHER


def generate(count: int, draws: random.Random) -> list[Bad]:
    """Return so many bad inputs: a fixed list of every kind first, then seeded ones of all kinds by turns."""
    fixed = [*planted.contents(), *planted.strange_files()]
    draws.shuffle(fixed)
    found = fixed[: count * 2 // 3]
    endless = [seeded.options(draws), seeded.cards(draws), seeded.damage(draws)]
    while len(found) < count:
        found.append(next(endless[len(found) % len(endless)]))
    return found


def torture(bench: Bench, bad: list[Bad], *, workers: int = 1) -> Tally:
    """Give every bad input to the program, by so many processes side by side."""
    for name in sorted({need for item in bad for need in item.needs}):
        bench.straight(BY_NAME[name])
    if workers == 1:
        return _given(bench, bad, range(len(bad)))
    tallies = in_parallel(lambda part: _given(bench, bad, range(part, len(bad), workers)), workers)
    whole = Tally()
    for tally in tallies:
        whole.faults += tally.faults
        for kind, counts in tally.counts.items():
            whole.counts.setdefault(kind, Counter()).update(counts)
    return whole


def _given(bench: Bench, bad: list[Bad], numbers: range) -> Tally:
    tally = Tally()
    for number in numbers:
        item = bad[number]
        place = bench.place(f"bad-{number}", item.needs)
        write_good_files(place)
        item.spoil(place)
        tally.add(item, bench.run(shlex.split(item.line), place))
        shutil.rmtree(place, ignore_errors=True)
    return tally
