"""The step to a hyperplane in the pixel box: optimal, exact, and defined where no plane is in reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from robustvlm.attacks.fab import step_to_plane

NORMS = ["Linf", "L2"]


def case(seed: int, dim: int, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """A point with pixels at 0 and 1 among others, a normal with zeros, and a gap at a share of what the box allows."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.rand(1, dim, generator=draws, dtype=torch.float64)
    x = torch.where(torch.rand(1, dim, generator=draws) < 0.2, x.round(), x)
    w = torch.randn(1, dim, generator=draws, dtype=torch.float64) ** 3
    w = torch.where(torch.rand(1, dim, generator=draws) < 0.2, 0.0, w)
    w[:, 0] = 1.0
    up = (w.clamp_min(0) * (1 - x) - w.clamp_max(0) * x).sum(1)
    down = (w.clamp_min(0) * x - w.clamp_max(0) * (1 - x)).sum(1)
    return x, w, reach * torch.where(torch.tensor(reach > 0), up, down)


def by_sorting(x: Tensor, w: Tensor, gap: float, norm: str) -> Tensor:
    """Second implementation: what a level closes is piecewise linear in it; sort the kinks and pick the piece."""
    sign = 1.0 if gap >= 0 else -1.0
    direction = np.sign(w.numpy()[0]) * sign
    room = np.where(direction > 0, 1 - x.numpy()[0], x.numpy()[0]) * (direction != 0)
    weight = np.abs(w.numpy()[0])
    speed = np.where(direction != 0, 1.0 if norm == "Linf" else weight, 0.0)
    kinks = np.sort(room[direction != 0] / speed[direction != 0])
    closed = [(weight * np.minimum(t * speed, room)).sum() for t in kinks]
    piece = int(np.searchsorted(closed, abs(gap)))
    if piece == len(kinks):
        return torch.from_numpy(direction * room)
    below, at = (0.0, 0.0) if piece == 0 else (kinks[piece - 1], closed[piece - 1])
    rise = closed[piece] - at
    level = below if rise == 0 else below + (kinks[piece] - below) * (abs(gap) - at) / rise
    return torch.from_numpy(direction * np.minimum(level * speed, room))


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), dim=st.integers(1, 40), reach=st.floats(-0.999, 0.999))
def test_equals_the_sorting_solution_and_stays_in_the_box(norm, seed, dim, reach):
    x, w, gap = case(seed, dim, reach)
    delta = step_to_plane(x, w, gap, norm)
    assert (w * delta).sum().item() == pytest.approx(gap.item(), abs=1e-9)
    assert (x + delta).min() >= -1e-12
    assert (x + delta).max() <= 1 + 1e-12
    assert torch.allclose(delta[0], by_sorting(x, w, gap.item(), norm), atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), reach=st.floats(0.05, 0.95))
def test_linf_length_is_that_of_the_linear_program(seed, reach):
    """min t subject to <w, delta> = gap, |delta_i| <= t, x + delta in the box."""
    x, w, gap = case(seed, 8, reach)
    eye, one = np.eye(8), np.ones((8, 1))
    bounds = [(-v, 1 - v) for v in x[0].tolist()]
    best = linprog(
        c=[0.0] * 8 + [1.0],
        A_ub=np.block([[eye, -one], [-eye, -one]]), b_ub=np.zeros(16),
        A_eq=[[*w[0].tolist(), 0.0]], b_eq=gap.numpy(),
        bounds=[*bounds, (0, None)],
    )  # fmt: skip
    assert best.success
    assert step_to_plane(x, w, gap, "Linf").abs().max().item() == pytest.approx(best.fun, abs=1e-7)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), reach=st.floats(0.05, 0.9))
def test_l2_length_is_that_of_a_general_solver(seed, reach):
    x, w, gap = case(seed, 6, reach)
    normal = w[0].numpy()
    best = minimize(
        lambda d: (d**2).sum(), np.zeros(6), jac=lambda d: 2 * d, method="SLSQP",
        bounds=[(-v, 1 - v) for v in x[0].tolist()],
        constraints={"type": "eq", "fun": lambda d: normal @ d - gap.item(), "jac": lambda _: normal},
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    if best.success:
        assert step_to_plane(x, w, gap, "L2").norm().item() == pytest.approx(best.fun**0.5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_without_the_box_in_the_way_it_is_the_textbook_projection(norm):
    draws = torch.Generator().manual_seed(0)
    x, w = torch.full((5, 3, 2, 2), 0.5), torch.randn(5, 3, 2, 2, generator=draws)
    gap = torch.tensor([0.1, -0.1, 0.02, -0.3, 0.0])
    delta = step_to_plane(x, w, gap, norm)
    flat = w.flatten(1)
    length = gap.abs() / (flat.abs().sum(1) if norm == "Linf" else flat.norm(dim=1))
    along = flat.sign() if norm == "Linf" else flat / flat.norm(dim=1, keepdim=True)
    assert torch.allclose(delta.flatten(1), along * (gap.sign() * length)[:, None], atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_lanes_do_not_see_each_other(norm):
    cases = [case(seed, 12, reach) for seed, reach in enumerate([-0.9, -0.1, 0.3, 0.99, 1.7])]
    together = step_to_plane(*(torch.cat(parts) for parts in zip(*cases, strict=True)), norm)
    for row, one in enumerate(cases):
        assert torch.equal(together[row], step_to_plane(*one, norm)[0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reach", [1.0, 1.5, -4.0])
def test_a_plane_out_of_reach_leads_to_the_nearest_vertex(norm, reach):
    x, w, gap = case(3, 10, reach)
    moved = (x + step_to_plane(x, w, gap, norm))[0]
    uphill = (w[0] * reach) > 0
    assert torch.allclose(moved[w[0] != 0], uphill[w[0] != 0].double(), atol=1e-9)
    assert torch.equal(moved[w[0] == 0], x[0][w[0] == 0])


@pytest.mark.parametrize("norm", NORMS)
def test_no_normal_and_no_gap_move_nothing(norm):
    x = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    w = torch.stack([torch.zeros(7), torch.ones(7), torch.zeros(7)])
    assert torch.equal(step_to_plane(x, w, torch.tensor([0.5, 0.0, 0.0]), norm), torch.zeros_like(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6])
def test_float32_planes_of_any_scale_are_met(norm, scale):
    """Squares of a normal of 1e-20 and below underflow in float32; the step must stay finite and in the box."""
    draws = torch.Generator().manual_seed(1)
    x, w = torch.rand(4, 3000, generator=draws), torch.randn(4, 3000, generator=draws) * scale
    gap = 0.01 * w.abs().sum(1)
    delta = step_to_plane(x, w, gap, norm)
    assert delta.isfinite().all()
    assert ((x + delta) >= -1e-6).all()
    assert ((x + delta) <= 1 + 1e-6).all()
    assert torch.allclose((w.double() * delta.double()).sum(1) / scale, gap.double() / scale, rtol=1e-4)
