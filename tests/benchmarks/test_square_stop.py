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
    off = {
        "a": Answer("fooled", 20),
        "b": Answer("fooled", 900),
        "c": Answer("robust", 999),
        "d": Answer("robust", 999),
    }
    on = {"a": Answer("fooled", 20), "b": Answer("robust", 500), "c": Answer("robust", 499), "d": Answer("robust", 299)}
    assert compare(off, on) == ("4", "2", "1", "1", "1000", "400", "0.40")
