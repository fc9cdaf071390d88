"""Metrics against torchmetrics, a loop in plain Python, and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_calibration_error, multiclass_accuracy

from robustvlm.commands.evaluate.measures import (
    calibration_bins,
    calibration_error,
    correct,
    expected_calibration_error,
    superclass_correct,
)

pairs = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60)


def by_loop(confidences: list[float], right: list[bool], n_bins: int) -> float:
    """The definition, image by image, with exact comparisons at the edges."""
    error = 0.0
    for m in range(n_bins):
        inside = [i for i, p in enumerate(confidences) if m / n_bins < p <= (m + 1) / n_bins or (m == 0 and p == 0)]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            error += len(inside) / len(confidences) * abs(accuracy - confidence)
    return error


@given(pairs=pairs, n_bins=st.sampled_from([1, 2, 4, 8, 15, 16]))
def test_calibration_error_equals_its_definition(pairs: list[tuple[float, bool]], n_bins: int) -> None:
    confidences, right = [p for p, _ in pairs], [r for _, r in pairs]
    found = expected_calibration_error(torch.tensor(confidences), torch.tensor(right), n_bins=n_bins)
    assert found == pytest.approx(by_loop(confidences, right, n_bins), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_equals_torchmetrics(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    confidences = torch.rand(500, generator=random, dtype=torch.float64)
    right = torch.rand(500, generator=random) < confidences**2
    # Their binary error compares the probability of class 1 with its frequency, which is ours with "right" as class 1.
    theirs = binary_calibration_error(confidences, right.int(), n_bins=15, norm="l1")
    assert expected_calibration_error(confidences, right) == pytest.approx(float(theirs), abs=1e-12)


@settings(max_examples=30)
@given(pairs=pairs, cut=st.integers(0, 60))
def test_bins_of_parts_add_up(pairs: list[tuple[float, bool]], cut: int) -> None:
    confidences, right = torch.tensor([p for p, _ in pairs]), torch.tensor([r for _, r in pairs])
    parts = calibration_bins(confidences[:cut], right[:cut]) + calibration_bins(confidences[cut:], right[cut:])
    assert torch.allclose(parts, calibration_bins(confidences, right), atol=1e-12)
    assert parts[0].sum() == len(pairs)


def test_calibrated_and_overconfident_in_closed_form() -> None:
    right = torch.tensor([True] * 7 + [False] * 3)
    assert expected_calibration_error(torch.full((10,), 0.7, dtype=torch.float64), right) == pytest.approx(0)
    assert expected_calibration_error(torch.ones(10), right) == pytest.approx(0.3)
    assert expected_calibration_error(torch.zeros(10), right) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="no images"):
        calibration_error(torch.zeros(3, 15))


def test_a_bin_holds_its_upper_edge() -> None:
    confidences, right = torch.tensor([0.5, 0.75]), torch.tensor([False, True])
    assert expected_calibration_error(confidences, right, n_bins=2) == pytest.approx((0.5 + 0.25) / 2)


def test_accuracy_equals_torchmetrics() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 7, generator=random)
    labels = torch.randint(0, 7, (400,), generator=random)
    theirs = multiclass_accuracy(logits, labels, num_classes=7, average="micro")
    assert math.isclose(correct(logits, labels).float().mean(), theirs, abs_tol=1e-7)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_coarser_superclasses_are_never_harder(pairs: list[tuple[int, int]]) -> None:
    predictions, labels = torch.tensor(pairs).T
    levels = [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1], [0] * 6]
    right = [superclass_correct(predictions, labels, torch.tensor(level)) for level in levels]
    assert torch.equal(right[0], predictions == labels)
    for finer, coarser in itertools.pairwise(right):
        assert (coarser | ~finer).all()
    assert right[-1].all()
    assert right[1].tolist() == [p // 2 == y // 2 for p, y in pairs]
