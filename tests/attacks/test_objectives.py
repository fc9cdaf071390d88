"""Objectives against plain-Python second implementations of the published formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.attacks import Misclassify, margin, objective
from robustvlm.attacks.objectives import OBJECTIVES
from robustvlm.errors import UserError

# Hundredths: closer logits would test the guard against division by zero instead of the formula.
rows = st.lists(st.integers(-2000, 2000).map(lambda n: n / 100), min_size=2, max_size=9, unique=True)


def reference(name: str, z: list[float], y: int, t: int) -> float:
    others = max(value for i, value in enumerate(z) if i != y)
    top = sorted(z, reverse=True)
    if name == "ce":
        return math.log(sum(math.exp(v - max(z)) for v in z)) + max(z) - z[y]
    if name == "ce-t":
        return z[t] - max(z) - math.log(sum(math.exp(v - max(z)) for v in z))
    if name == "margin" or (name == "dlr" and len(z) < 3):
        return others - z[y]
    if name == "margin-t" or (name == "dlr-t" and len(z) < 3):
        return z[t] - z[y]
    if name == "dlr":
        return -(z[y] - others) / (top[0] - top[2])
    if len(z) == 3:
        return -(z[y] - z[t]) / (top[0] - top[2])
    return -(z[y] - z[t]) / (top[0] - (top[2] + top[3]) / 2)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(rows, st.randoms())
def test_matches_a_second_implementation(name, z, random):
    y = random.randrange(len(z))
    t = random.choice([i for i in range(len(z)) if i != y])
    logits = torch.tensor([z], dtype=torch.float64)
    found = objective(name)(logits, torch.tensor([y]), torch.tensor([t])).item()
    assert found == pytest.approx(reference(name, z, y, t), rel=1e-6, abs=1e-8)


@given(rows)
def test_margin_is_positive_exactly_when_the_label_wins(z):
    logits = torch.tensor([z], dtype=torch.float64)
    for y in range(len(z)):
        assert (margin(logits, torch.tensor([y])).item() > 0) == (logits.argmax().item() == y)


@given(rows, st.floats(0.1, 10), st.floats(-5, 5))
def test_dlr_ignores_scale_and_shift_of_the_logits(z, scale, shift):
    if len(z) < 3:
        return
    logits, y = torch.tensor([z], dtype=torch.float64), torch.tensor([0])
    assert objective("dlr")(logits * scale + shift, y, y).item() == pytest.approx(
        objective("dlr")(logits, y, y).item(), rel=1e-5, abs=1e-7
    )


def test_fallbacks_are_stated_for_few_classes_only():
    assert objective("dlr").fallback(2)
    assert objective("dlr-t").fallback(2)
    assert objective("dlr-t").fallback(3)
    assert objective("dlr").fallback(3) is None
    assert objective("dlr-t").fallback(4) is None
    assert objective("ce").fallback(2) is None


def test_targets_are_the_likeliest_wrong_classes():
    assert Misclassify().targets(torch.tensor([0.0, 9.0, 3.0, 5.0]), 1, 2) == [3, 2]
    assert Misclassify().targets(torch.tensor([0.0, 9.0]), 0, 9) == [1]


def test_unknown_objective_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'dlr'"):
        objective("dlrr")
