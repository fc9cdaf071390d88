"""The Poincare ball against its axioms, other formulas, and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustvlm.defenses.finetune.hyperbolic import (
    check_curvature,
    distance,
    distances,
    exp0,
    hyp_avg,
    log0,
    mobius_add,
    project,
)
from robustvlm.errors import UserError

curvatures = st.sampled_from([0.1, 1.0, 3.0])
seeds = st.integers(0, 2**31)


def tangents(seed: int, count: int, *, size: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return tangent vectors of lengths up to `size`, in 5 dimensions."""
    draws = torch.Generator().manual_seed(seed)
    v = torch.randn(count, 5, generator=draws, dtype=torch.float64)
    return (v / v.norm(dim=-1, keepdim=True) * torch.rand(count, 1, generator=draws, dtype=torch.float64) * size).to(
        dtype
    )


def points(seed: int, count: int, r: float, **options: float) -> Tensor:
    return exp0(tangents(seed, count, **options) / math.sqrt(r), r)


@given(seeds, curvatures)
@settings(max_examples=40, deadline=None)
def test_distance_is_a_metric(seed: int, r: float) -> None:
    x, y, z = points(seed, 3, r)
    assert distance(x, y, r) == distance(y, x, r)
    assert distance(x, x, r) == 0
    assert distance(x, y, r) > 0
    assert distance(x, z, r) <= distance(x, y, r) + distance(y, z, r) + 1e-12


@given(seeds, curvatures)
@settings(max_examples=40, deadline=None)
def test_distance_agrees_with_artanh_and_arcosh_forms(seed: int, r: float) -> None:
    x, y = points(seed, 2, r)
    by_sum = 2 / math.sqrt(r) * torch.atanh(math.sqrt(r) * mobius_add(-x, y, r).norm())
    gap_x, gap_y = (1 - r * p.square().sum() for p in (x, y))
    by_arcosh = torch.acosh(1 + 2 * r * (x - y).square().sum() / (gap_x * gap_y)) / math.sqrt(r)
    assert distance(x, y, r).item() == pytest.approx(by_sum.item(), rel=1e-9)
    assert distance(x, y, r).item() == pytest.approx(by_arcosh.item(), rel=1e-6)


@given(seeds, curvatures)
@settings(max_examples=40, deadline=None)
def test_distance_does_not_change_under_translation(seed: int, r: float) -> None:
    x, y, a = points(seed, 3, r, size=1.0)
    moved = distance(mobius_add(a, x, r), mobius_add(a, y, r), r)
    assert moved.item() == pytest.approx(distance(x, y, r).item(), rel=1e-9)


@given(seeds, curvatures)
@settings(max_examples=40, deadline=None)
def test_exp_and_log_are_inverse_and_lengths_are_distances_to_the_origin(seed: int, r: float) -> None:
    v = tangents(seed, 4) / math.sqrt(r)
    x = exp0(v, r)
    torch.testing.assert_close(log0(x, r), v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(exp0(log0(x, r), r), x)
    torch.testing.assert_close(distance(torch.zeros_like(x), x, r), 2 * v.norm(dim=-1))


@given(seeds, curvatures)
@settings(max_examples=40, deadline=None)
def test_matrix_of_distances_agrees_with_rows(seed: int, r: float) -> None:
    x, y = points(seed, 3, r), points(seed + 1, 4, r)
    expected = torch.stack([torch.stack([distance(a, b, r) for b in y]) for a in x])
    torch.testing.assert_close(distances(x, y, r), expected, rtol=1e-9, atol=1e-7)
    narrow = distances(x.float(), y.float(), r)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, rtol=1e-3, atol=1e-3)


@given(seeds, curvatures)
@settings(max_examples=40, deadline=None)
def test_midpoint_of_two_is_the_middle_of_the_geodesic(seed: int, r: float) -> None:
    x, y = points(seed, 2, r)
    middle = hyp_avg(torch.stack([x, y]), torch.ones(1, 2, dtype=torch.float64), r)[0]
    # The geodesic from x to y at half time: x + (1/2) * (-x + y), with Mobius operations.
    half = exp0(log0(mobius_add(-x, y, r), r) / 2, r)
    torch.testing.assert_close(middle, mobius_add(x, half, r), rtol=1e-8, atol=1e-10)
    assert distance(x, middle, r).item() == pytest.approx(distance(x, y, r).item() / 2, rel=1e-8)


@given(seeds, curvatures)
@settings(max_examples=40, deadline=None)
def test_weighted_midpoints_agree_with_klein_coordinates(seed: int, r: float) -> None:
    x = points(seed, 5, r)
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    klein = 2 * x / (1 + r * x.square().sum(-1, keepdim=True))
    lorentz = 1 / (1 - r * klein.square().sum(-1)).sqrt()
    mean = (weights * lorentz) @ klein / (weights * lorentz).sum(-1, keepdim=True)
    expected = mean / (1 + (1 - r * mean.square().sum(-1, keepdim=True)).sqrt())
    torch.testing.assert_close(hyp_avg(x, weights, r), expected, rtol=1e-7, atol=1e-10)


def test_average_of_nothing_is_the_origin_and_of_one_point_itself() -> None:
    x = points(0, 3, 1.0)
    found = hyp_avg(x, torch.tensor([[0.0, 0.0, 0.0], [0.0, 7.0, 0.0]]), 1.0)
    assert torch.equal(found[0], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(found[1], x[1])


def test_average_moves_with_a_translation_of_all_points() -> None:
    x, a = points(3, 4, 1.0, size=1.0), points(4, 1, 1.0, size=1.0)
    weights = torch.ones(1, 4, dtype=torch.float64)
    moved = hyp_avg(mobius_add(a.expand(4, 5), x, 1.0), weights, 1.0)
    torch.testing.assert_close(moved, mobius_add(a, hyp_avg(x, weights, 1.0), 1.0), rtol=1e-8, atol=1e-10)


def test_small_curvature_is_euclidean_up_to_a_factor_of_two() -> None:
    x, y = points(5, 2, 1.0, size=0.8)
    assert distance(x, y, 1e-9).item() == pytest.approx(2 * (x - y).norm().item(), rel=1e-6)
    torch.testing.assert_close(exp0(x, 1e-9), x, rtol=1e-6, atol=0)
    torch.testing.assert_close(mobius_add(x, y, 1e-9), x + y, rtol=1e-6, atol=1e-8)
    flat = hyp_avg(torch.stack([x, y]), torch.ones(1, 2), 1e-9)[0]
    torch.testing.assert_close(flat, (x + y) / 2, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-6, 1.0, 30.0, 1e8])
def test_values_and_gradients_are_finite_from_the_origin_to_the_rim(dtype: torch.dtype, length: float) -> None:
    other = tangents(6, 1, dtype=dtype)
    v = (other / other.norm() * length).requires_grad_()
    for r in (0.1, 1.0, 3.0):
        x, y = exp0(v, r), exp0(other, r)
        both = torch.cat([x, y, x])
        total = (
            distance(x, y, r).sum()
            + distance(x, x.detach(), r).sum()
            + distances(both, both, r).sum()
            + hyp_avg(both, torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), r).sum()
            + log0(x, r).sum()
            + mobius_add(x, -y, r).sum()
        )
        (gradient,) = torch.autograd.grad(total, v)
        assert torch.isfinite(total)
        assert torch.isfinite(gradient).all()
        assert r * x.square().sum() < 1


@given(seeds, curvatures)
@settings(max_examples=4, deadline=None)
def test_gradients_agree_with_differences(seed: int, r: float) -> None:
    v, w = tangents(seed, 3).requires_grad_(), tangents(seed + 1, 3)
    weights = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: distances(exp0(a, r), exp0(w, r), r), (v,))
    assert torch.autograd.gradcheck(lambda a: hyp_avg(exp0(a, r), weights, r), (v,))
    assert torch.autograd.gradcheck(lambda a: log0(mobius_add(exp0(a, r), exp0(w, r), r), r), (v,))


def test_projection_leaves_inner_points_alone() -> None:
    x = torch.tensor([[0.2, 0.3], [0.0, 0.0], [30.0, 40.0]])
    kept = project(x, 4.0)
    assert torch.equal(kept[:2], x[:2])
    assert kept[2].norm().item() == pytest.approx(0.999 / 2)


def test_half_precision_and_autocast_compute_in_single_precision() -> None:
    x = points(8, 4, 1.0).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = distances(x, x.float().roll(1, 0), 1.0), hyp_avg(x, torch.ones(2, 4), 1.0), exp0(x, 1.0)
    assert all(value.dtype == torch.float32 for value in found)
    expected = distances(x.double(), x.double().roll(1, 0), 1.0)
    np.testing.assert_allclose(found[0].numpy(), expected.numpy(), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("r", [0.0, -1.0, math.nan, math.inf])
def test_impossible_curvature_is_refused(r: float) -> None:
    with pytest.raises(UserError, match="curvature"):
        check_curvature(r)
