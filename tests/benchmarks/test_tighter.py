"""The comparison of newer bounds: what an early answer took of the copies, and whose copies are kept."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks import tighter
from benchmarks.common import kept_features
from robustvlm.errors import UserError


def test_an_early_answer_took_its_pilot_too() -> None:
    rows = np.eye(6)[0] + 0.15 * np.random.default_rng(0).standard_normal((500, 6))
    found = tighter._early(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.eye(6)[:4])
    asked = [f"{claim} at {share}" for claim in ("class", "topk", "recall") for share in (0.5, 0.9)]
    assert all(tighter.PILOT / 500 < found[name] <= 1.0 for name in asked)
    assert all(0.0 < share <= 1.0 for share in found.values())


def test_kept_copies_of_another_model_are_refused(tmp_path: Path) -> None:
    path, of = tmp_path / "copies.npz", {"model": "a", "samples": 3}
    made = kept_features(path, of, lambda: {"rows": np.arange(3.0)})
    again = kept_features(path, of, lambda: pytest.fail("drawn again"))
    assert set(again) == set(made) == {"rows"}
    np.testing.assert_array_equal(again["rows"], made["rows"])
    with pytest.raises(UserError, match=r"was made with model 'a' \(asked for: 'b'\)"):
        kept_features(path, {**of, "model": "b"}, lambda: {})
    np.savez(path, rows=np.arange(3.0))
    with pytest.raises(UserError, match="does not say what it was made with"):
        kept_features(path, of, lambda: {})
