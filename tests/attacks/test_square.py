"""Square: proposals against their definition, budgets, independence of lanes, the authors' implementation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Curved, attack_all, fooled, images, right_jobs

from robustvlm.attacks import LaneEngine, Oracle, ThreatModel
from robustvlm.attacks.square import (
    Square,
    bump,
    offsets,
    on_sphere,
    propose_l2,
    propose_linf,
    square_share,
    start_l2,
    start_linf,
    window,
)
from robustvlm.attacks.threat import pixel_box

LINF, L2 = ThreatModel("Linf", 0.02), ThreatModel("L2", 0.2)
BOTH = pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@BOTH
def test_recorded_points_lie_in_the_ball_and_explain_their_outcome(threat):
    model = Curved()
    results = attack_all(model, Square(n_iter=80), threat, right_jobs(model))
    assert 0 < len(fooled(results)) < len(results)
    for result in results:
        delta = result.adversarial.double() - result.job.pixels.double()
        assert (delta.abs().max() if threat.norm == "Linf" else delta.norm()) <= threat.eps
        assert result.adversarial.min() >= 0
        assert result.adversarial.max() <= 1
        prediction = model(result.adversarial[None])[0].argmax().item()
        assert (prediction != result.job.label) == (result.outcome == "fooled")


@BOTH
def test_answers_do_not_depend_on_neighbours_lanes_or_order(threat):
    model, attack = Curved().double(), Square(n_iter=60, n_restarts=2)
    jobs = right_jobs(Curved(), 10)
    alone = attack_all(model, attack, threat, jobs, lanes=1, precision="fp64")
    together = attack_all(model, attack, threat, jobs[::-1], lanes=7, precision="fp64")
    for a, b in zip(alone, together, strict=True):
        assert (a.outcome, a.steps, a.run) == (b.outcome, b.steps, b.run)
        assert torch.allclose(a.adversarial, b.adversarial, atol=1e-12)


def test_only_forward_passes_are_made_and_the_budget_is_kept():
    model = Curved()
    oracle = Oracle(model)
    engine = LaneEngine(oracle, Square(n_iter=30, futility=False), ThreatModel("Linf", 1e-5), lanes=4, seed=0)
    results = list(engine.run(right_jobs(model, 4)))
    assert {(result.outcome, result.steps, result.passes) for result in results} == {("robust", 30, 31)}
    assert (oracle.passes.forward, oracle.passes.backward) == (31 * 4, 0)


@BOTH
def test_the_best_point_is_the_one_that_proposals_start_from(threat):
    attack, x0 = Square(n_iter=12), images(1)
    state = attack.begin(x0, threat, seeded(), 0)
    seen, losses = [], [-3.0, -5.0, -2.0, -2.0, float("nan"), -1.0, -4.0]
    for step, loss in enumerate(losses):
        seen.append(state["x"])
        state = attack.advance(state, torch.tensor([loss]), torch.empty(0), torch.tensor([step]), threat)
        best = max(range(step + 1), key=lambda at: losses[at] if losses[at] == losses[at] else float("-inf"))
        assert torch.equal(state["x_best"], seen[best])
        assert not torch.equal(state["x"], seen[best])


def test_square_shares_follow_the_published_schedule():
    """p is halved at queries 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000 (section 5)."""
    changes = [q for q in range(1, 10_000) if square_share(q, 10_000, 0.8) != square_share(q - 1, 10_000, 0.8)]
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert [square_share(q, 10_000, 0.8) for q in (0, 9_999)] == [0.8, 0.8 / 512]
    assert all(square_share(q, 500, 0.8) == square_share(20 * q, 10_000, 0.8) for q in range(500))


@given(
    seed=st.integers(0, 1000),
    channels=st.sampled_from([1, 3, 4]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_linf_proposals_change_one_square_to_ends_of_the_box(seed, channels, height, width, data):
    lanes, draws = 3, seeded(seed)
    x0 = torch.rand(lanes, channels, height, width, generator=draws)
    low, high = pixel_box(x0, 0.1)
    best = torch.cat([start_linf(low[i : i + 1], high[i : i + 1], draws) for i in range(lanes)])
    limit = min(height, width)
    side = torch.tensor(data.draw(st.lists(st.integers(1, limit), min_size=lanes, max_size=lanes)))
    proposal = propose_linf(best, low, high, side, torch.rand(lanes, 4, generator=draws))
    assert ((proposal == low) | (proposal == high)).all()
    for lane in range(lanes):
        changed = (proposal[lane] != best[lane]).any(0)
        rows, columns = torch.nonzero(changed.any(1)).flatten(), torch.nonzero(changed.any(0)).flatten()
        assert len(rows), "a proposal that changes nothing wastes a query"
        assert rows.max() - rows.min() < side[lane]
        assert columns.max() - columns.min() < side[lane]


def test_linf_start_is_made_of_vertical_stripes():
    x0 = torch.full((1, 3, 5, 7), 0.5)
    x = start_linf(*pixel_box(x0, 0.1), seeded())
    assert (x == x[:, :, :1]).all()
    assert 0 < (x > x0).float().mean() < 1


def test_windows_reach_every_place_equally_often():
    side = torch.full((40_000,), 3)
    top, left = offsets(torch.rand(40_000, 2, generator=seeded()), side, 6, 5)
    counts = torch.bincount(top * 3 + left, minlength=12)
    assert len(counts) == 12
    assert (counts - 40_000 / 12).abs().max() < 5 * math.sqrt(40_000 / 12)
    assert window(6, 5, top, left, side).sum(dim=(1, 2, 3)).eq(9).all()


def rings(height: int, width: int) -> torch.Tensor:
    """Eq. 2 of the paper for one half, entry by entry as printed (rows and columns from 1)."""
    n = max(height // 2, width // 2)
    values = torch.zeros(height, width, dtype=torch.float64)
    for r in range(1, height + 1):
        for s in range(1, width + 1):
            inner = n - max(abs(r - height // 2 - 1), abs(s - width // 2 - 1))
            values[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(inner + 1))
    return values


@pytest.mark.parametrize("side", [2, 3, 5, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_bumps_follow_the_published_formula(side, turned):
    half = side // 2
    first, second = rings(half, side), rings(side - half, side)
    expected = torch.cat([first / first.norm(), -second / second.norm()])
    expected = (expected.T if turned else expected) / math.sqrt(2)
    at = (torch.tensor([1]), torch.tensor([2]), torch.tensor([side]), torch.tensor([turned]))
    values = bump(10, 11, *at)
    assert torch.allclose(values[0, 0, 1 : 1 + side, 2 : 2 + side].double(), expected, atol=1e-5)
    assert values.square().sum() == pytest.approx(1, abs=1e-5)


def test_l2_proposals_move_the_perturbation_of_one_window_into_another():
    x0 = torch.full((4, 3, 12, 12), 0.5)
    best = torch.cat([start_l2(x0[:1], L2, seeded(lane)) for lane in range(4)])
    side, draws = torch.tensor([3, 5, 7, 3]), torch.rand(4, 6, generator=seeded(9))
    proposal = propose_l2(best, x0, side, draws, L2)
    first, second = (window(12, 12, *offsets(draws[:, at : at + 2], side, 12, 12), side) for at in (0, 2))
    before, after = (best - x0).double(), (proposal - x0).double()
    energies = [(delta.square() * (first | second)).sum(dim=(2, 3)) for delta in (before, after)]
    assert torch.allclose(*energies, rtol=1e-3)
    untouched = ~(first | second).expand_as(after)
    assert torch.allclose(before[untouched], after[untouched], rtol=1e-3)
    assert after[(second & ~first).expand_as(after)].abs().max() < 1e-6
    assert torch.allclose(after.flatten(1).norm(dim=1), torch.tensor(L2.eps).double(), rtol=1e-4)


def test_l2_proposals_spend_what_clipping_left_unused():
    x0 = torch.full((1, 3, 12, 12), 0.5)
    best = on_sphere(torch.randn(1, 3, 12, 12, generator=seeded()), x0, ThreatModel("L2", 0.1))
    proposal = propose_l2(best, x0, torch.tensor([3]), torch.rand(1, 6, generator=seeded(1)), L2)
    assert (proposal - x0).norm().item() == pytest.approx(L2.eps, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 4, 4), (3, 14, 9), (4, 7, 20)])
@BOTH
def test_every_shape_of_image_is_taken(shape, threat):
    attack, x0 = Square(n_iter=20), torch.rand(1, *shape, generator=seeded())
    state = attack.begin(x0, threat, seeded(1), 0)
    for step in range(21):
        delta = state["x"].double() - x0.double()
        assert (delta.abs().max() if threat.norm == "Linf" else delta.norm()) <= threat.eps
        assert 0 <= state["x"].min() <= state["x"].max() <= 1
        state = attack.advance(state, torch.tensor([-1.0]), torch.empty(0), torch.tensor([step]), threat)


def test_lanes_are_taken_up_again_whether_searches_may_be_given_up_or_not():
    model = Curved()
    jobs = right_jobs(model, 20)
    for attack in (Square(n_iter=30), Square(n_iter=30, futility=False)):
        assert len(attack_all(model, attack, ThreatModel("Linf", 0.05), jobs, lanes=4)) == 20


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.02), pytest.param("L2", 0.2, marks=pytest.mark.slow)])
def test_square_is_as_strong_as_the_authors_implementation(norm, eps):
    """With the schedule stretched as ours is, and windows that reach the last row and column, as theirs never do.

    As published they find less: 34 of 80 images where ours finds 44 (Linf), 26 where ours finds 31 (L2).
    """
    from pyautoattack.square import SquareAttack

    class Everywhere(SquareAttack):
        def random_int(self, low=0, high=1, shape=(1,)):
            return super().random_int(low, high + 1, shape)

    model = Curved(seed=3)
    jobs = right_jobs(model, 80, seed=5)
    x, y = torch.stack([job.pixels for job in jobs]), torch.tensor([job.label for job in jobs])
    broken = {"theirs": 0, "ours": 0, "ours with half the queries": 0}
    for seed in range(2):
        theirs = Everywhere(model, norm=norm, eps=eps, n_queries=150, device="cpu", seed=seed, resc_schedule=True)
        broken["theirs"] += int((model(theirs.perturb(x, y)).argmax(1) != y).sum())
        for name, queries in (("ours", 150), ("ours with half the queries", 75)):
            attack = Square(n_iter=queries, futility=False)
            broken[name] += len(fooled(attack_all(model, attack, ThreatModel(norm, eps), jobs, lanes=80, seed=seed)))
    assert 0 < broken["theirs"] - 3 <= broken["ours"] < 2 * len(jobs)
    assert broken["ours with half the queries"] < broken["theirs"] - 3  # so that the comparison can tell
