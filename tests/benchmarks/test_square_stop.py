"""The comparison of Square with and without its futility stop: what its row counts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks.square_futility import compare


@dataclass
class Answer:
    outcome: str
    steps: int

    @property
    def passes(self) -> int:
        return self.steps + 1


def test_the_row_counts_late_and_lost_successes_and_the_passes_of_robust_images():
    off = {"a": ("fooled", 20), "b": ("fooled", 900), "c": ("robust", 999), "d": ("robust", 999)}
    on = {"a": ("fooled", 20), "b": ("robust", 500), "c": ("robust", 499), "d": ("robust", 299)}
    without, with_stop = ({name: Answer(*seen) for name, seen in run.items()} for run in (off, on))
    assert compare(without, with_stop) == ("4", "2", "1", "1", "1000", "400", "0.40")
