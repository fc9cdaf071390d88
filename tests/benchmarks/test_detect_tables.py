"""The detection benchmark's own arithmetic: rows, ranges over seeds, choices of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.detect import selective
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


def test_wrong_answers_are_a_share_of_images_and_of_the_answers_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four images two are answered, one of them wrongly: a quarter of the images, and half of the answers."""
    answers = (np.array([True, True, False, False]), np.array([0, 1, 0, 0]))
    monkeypatch.setattr(selective, "_answers", lambda *_: answers)
    clean = selective.Seen(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    found = selective._under(None, None, None, clean, {"pushed": clean.features})  # type: ignore[arg-type]
    assert found == ["0.250 / 0.250 (0.500 of answers)"] * 2
    answers[0][:] = False
    assert selective._under(None, None, None, clean, {"pushed": clean.features})[0] == "0.000 / 0.000"  # type: ignore[arg-type]


def test_the_table_says_of_how_many_images_it_is() -> None:
    some = [selective.Seen(torch.zeros(n, 2), torch.zeros(n)) for n in (2500, 2499, 556, 100)]
    said = selective.counts(*some)
    assert "2,500 test images set the thresholds, 2,499 others are judged" in said
    assert "100 of them attacked, and 556 emoji" in said
