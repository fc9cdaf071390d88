"""The detection benchmark's own arithmetic: rows, ranges over seeds, choices of images."""

from __future__ import annotations

import torch

from benchmarks.detect.tables import Found, judge, subset, table


def test_a_table_has_the_mean_and_the_range_over_seeds() -> None:
    found: Found = {}
    known = torch.tensor([3.0, 2.0])
    judge(found, "good", known, {"near": torch.tensor([1.0, 0.0])})
    judge(found, "good", known, {"near": torch.tensor([2.5, 0.0])})
    assert table(found, ["near"]).splitlines()[2] == "| good | .875 (.750-1.00) | .250 (.000-.500) |"


def test_choices_are_seeded_and_distinct() -> None:
    first, again, other = subset(100, 0.5, 0), subset(100, 0.5, 0), subset(100, 0.5, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == 50
