"""The comparison of newer bounds: what an early answer took of the copies."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks import tighter


def test_an_early_answer_took_its_pilot_too() -> None:
    rows = np.eye(6)[0] + 0.15 * np.random.default_rng(0).standard_normal((500, 6))
    found = tighter._early(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.eye(6)[:4])
    asked = [f"{claim} at {share}" for claim in ("class", "topk", "recall") for share in (0.5, 0.9)]
    assert all(tighter.PILOT / 500 < found[name] <= 1.0 for name in asked)
    assert all(0.0 < share <= 1.0 for share in found.values())
