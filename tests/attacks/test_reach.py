"""Giving up classes that are out of reach: the rule, what it spares, and that no success is lost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import Curved, Linear, attack_all, fooled, right_jobs

from robustvlm.attacks import Job, LaneEngine, Oracle, TargetedAPGD, ThreatModel, objective, parse_attacks
from robustvlm.attacks.apgd import LONGEST_WALK
from robustvlm.attacks.base import BEYOND, DONE, State
from robustvlm.attacks.fab import FAB, boundary_step
from robustvlm.attacks.futility import FIRST_STEP, learn, nothing_known, out_of_reach, reach, safety

THREATS = [ThreatModel("Linf", 0.02), ThreatModel("L2", 0.15)]
NORMS = ["Linf", "L2"]


def known(distances: list[float], shortest: float) -> State:
    state = nothing_known(torch.zeros(1, 3, 2, 2))
    for distance in distances:
        state = learn(
            state, torch.tensor([distance]), torch.tensor([shortest]), torch.tensor([1.0 if shortest < 9 else -1.0])
        )
    return state


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.floats(0.01, 1), st.integers(0, 100))
def test_a_class_is_given_up_only_if_all_recent_evidence_exceeds_the_factor(distances, shortest, step):
    state = known(distances, shortest)
    least = min([*distances[-5:], shortest])
    assert reach(state).item() == pytest.approx(least)
    given_up = out_of_reach(state, torch.tensor([step]), 0.1).item()
    assert given_up == (step >= FIRST_STEP and torch.tensor(least) > safety(torch.tensor(step)) * 0.1)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["apgd-t", "fab-t"])
def test_a_point_where_the_model_breaks_down_is_no_evidence(name: str, loss: float) -> None:
    (attack,) = parse_attacks(f"{name}:steps=40")
    threat, x0 = ThreatModel("Linf", 0.01), torch.full((1, 3, 2, 2), 0.5)
    state = attack.begin(x0, threat, torch.Generator(), 0) | {"x": x0 + 0.19}
    for _ in range(5):
        state = learn(state, torch.tensor([0.2]), torch.tensor([0.3]), torch.tensor([-1.0]))
    after = attack.advance(state, torch.tensor([loss]), torch.ones_like(x0), torch.tensor([8]), threat)
    assert not after[DONE].any()
    assert not after[BEYOND].any()
    assert not after["shortest"].isfinite().any()
    assert torch.equal(after["distances"], state["distances"])


def test_a_boundary_never_crossed_is_never_out_of_reach():
    assert not out_of_reach(known([0.9] * 8, shortest=10.0), torch.tensor([50]), 0.01).item()


def test_the_factor_only_falls_and_stays_above_one():
    factors = safety(torch.arange(FIRST_STEP, 200))
    assert (factors.diff() <= 0).all()
    assert factors.min() > 1


@pytest.mark.parametrize("norm", NORMS)
def test_distance_is_exact_on_a_linear_model(norm):
    model = Linear(classes=2)
    x0 = torch.stack([job.pixels for job in right_jobs(model, 6)]) * 0.2 + 0.4
    x = (x0 + 0.05 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1).requires_grad_(True)
    gap = model(x)[:, 1] - model(x)[:, 0]
    (grad,) = torch.autograd.grad(gap.sum(), x)
    _, distance = boundary_step(x0, x.detach(), gap.detach(), grad, norm)
    w = model.layer.weight[1] - model.layer.weight[0]
    logits = model(x0)
    exact = (logits[:, 1] - logits[:, 0]).abs() / (w.abs().sum() if norm == "Linf" else w.norm())
    assert torch.allclose(distance[exact < 0.3], exact[exact < 0.3], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("threat", THREATS, ids=NORMS)
@pytest.mark.parametrize("name", ["fab-t:steps=60", "apgd-t:steps=60"])
def test_the_same_images_are_fooled_for_fewer_passes(name, threat):
    model = Curved(seed=4)
    jobs = right_jobs(model, 20, seed=4)
    attack = parse_attacks(name)[0]
    on = attack_all(model, attack, threat, jobs)
    off = attack_all(model, dataclasses.replace(attack, futility=False), threat, jobs)
    assert 0 < len(fooled(off)) < len(jobs)
    assert fooled(on) >= fooled(off)
    saved = [(a.passes, b.passes) for a, b in zip(on, off, strict=True) if b.outcome == "robust"]
    assert sum(a for a, _ in saved) < 0.75 * sum(b for _, b in saved)


def drive(model: nn.Module, attack: TargetedAPGD, job: Job, threat: ThreatModel) -> tuple[list[Tensor], bool]:
    """Return all points of the first sub-run, and whether it was ended."""
    state = attack.begin(job.pixels[None], threat, torch.Generator().manual_seed(0), 0)
    points, label, target = [], torch.tensor([job.label]), torch.tensor([job.targets[0]])
    for step in range(attack.n_points()):
        x = state["x"].detach().requires_grad_(True)
        loss = attack.objective(model(x), label, target)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        points.append(x.detach())
        state = attack.advance(state, loss.detach(), grad, torch.tensor([step]), threat)
        if DONE in state and bool(state[DONE]):
            return points, True
    return points, False


def test_after_the_walk_the_iterations_are_the_published_ones():
    model = Curved(seed=3)
    attack = TargetedAPGD(n_iter=15)
    plain = dataclasses.replace(attack, futility=False)
    followed = given_up = 0
    for job in right_jobs(model, 12):
        threat = ThreatModel("Linf", 0.02)
        walked, ended = drive(model, attack, job, threat)
        published, _ = drive(model, plain, job, threat)
        assert len(published) == 16
        assert torch.equal(walked[0], job.pixels[None])
        if any(torch.equal(point, published[0]) for point in walked):  # the walk was over
            tail = walked[-16:]
            assert len(walked) >= FIRST_STEP + 1 + 16
            assert ended
            assert len(walked) <= attack.n_points()
            assert all(torch.equal(a, b) for a, b in zip(tail, published, strict=True))
            followed += 1
        else:
            given_up += 1
    assert followed
    assert given_up


def test_a_walk_ends_once_its_class_is_shown_to_be_near_or_far_and_else_at_its_longest():
    model, attack, threat = Curved(seed=3), TargetedAPGD(n_iter=1), ThreatModel("Linf", 0.02)
    walked = [len(drive(model, attack, job, threat)[0]) for job in right_jobs(model, 40)]
    assert min(walked) >= FIRST_STEP + 1
    assert max(walked) <= LONGEST_WALK + 3
    assert len(set(walked)) > 5


@pytest.mark.parametrize("lanes", [1, 7])
def test_apgd_t_walks_by_the_margin_as_fab_t_does(lanes):
    model, jobs, threat = Curved(seed=3), right_jobs(Curved(seed=3), 12), ThreatModel("Linf", 0.01)
    looked, walked = (
        {result.job.image_id: result.beyond for result in attack_all(model, attack, threat, jobs, lanes=lanes)}
        for attack in (TargetedAPGD(n_iter=12), FAB())
    )
    given_up = [(image, target) for image, known in looked.items() for target in known]
    assert len(given_up) > 5
    for image, target in given_up:
        if looked[image][target] > threat.eps:
            assert walked[image][target] == looked[image][target]


def test_fab_gives_nothing_up_by_the_quotient_of_dlr():
    attack = FAB(objective=objective("dlr-t"))
    assert BEYOND not in attack.begin(torch.zeros(1, 3, 2, 2), THREATS[0], torch.Generator(), 0)
    assert attack.walk_points(0) == 0


def test_iterations_of_different_lanes_do_not_mix():
    model, jobs = Curved(seed=3), right_jobs(Curved(seed=3), 20)
    attack, threat = TargetedAPGD(n_iter=12), ThreatModel("Linf", 0.02)
    alone = attack_all(model, attack, threat, jobs, lanes=1, precision="fp64")
    together = attack_all(model, attack, threat, jobs, lanes=7, precision="fp64")
    assert [(r.outcome, r.steps, r.run) for r in alone] == [(r.outcome, r.steps, r.run) for r in together]
    assert len({r.steps for r in alone}) > 5


@pytest.mark.parametrize("attack", [FAB(), TargetedAPGD()], ids=["fab-t", "apgd-t"])
def test_engines_that_look_for_the_worst_point_give_up_nothing(attack):
    assert not attack.exhaustive().futility
    oracle, threat = Oracle(Curved()), ThreatModel("Linf", 0.01)
    assert LaneEngine(oracle, attack, threat, lanes=2, seed=0, leave=True).attack.futility
    assert not LaneEngine(oracle, attack, threat, lanes=2, seed=0, leave=False).attack.futility


def test_futility_needs_an_objective_whose_sign_tells_success():
    assert TargetedAPGD(objective=objective("ce-t")).n_points() == 101
    assert not TargetedAPGD(objective=objective("ce-t")).leaves_ball
    assert TargetedAPGD(objective=objective("margin-t")).n_points() == 162
    assert parse_attacks("apgd-t:futility=off")[0].n_points() == 101
    assert not parse_attacks("fab-t:futility=off")[0].futility


def test_untargeted_fab_gives_nothing_up():
    results = attack_all(Curved(), parse_attacks("fab:steps=15")[0], ThreatModel("Linf", 1e-4), right_jobs(Curved(), 4))
    assert {result.steps for result in results} == {15}


@pytest.mark.parametrize("threat", THREATS, ids=NORMS)
@pytest.mark.parametrize("names", ["apgd-t:steps=40,fab-t:steps=60", "fab-t:steps=60,apgd-t:steps=40"])
def test_what_one_attack_shows_of_a_class_spares_the_next_its_look(names, threat):
    model = Curved(seed=4)
    jobs = right_jobs(model, 24, seed=4)
    first, second = parse_attacks(names)
    shown = attack_all(model, first, threat, jobs)
    told = [dataclasses.replace(job, beyond=result.beyond) for job, result in zip(jobs, shown, strict=True)]
    alone, after = attack_all(model, second, threat, jobs), attack_all(model, second, threat, told)
    assert [result.outcome for result in after] == [result.outcome for result in alone]
    left = [i for i, result in enumerate(shown) if result.outcome == "robust"]
    assert any(shown[i].beyond for i in left)
    assert all(radius > threat.eps for result in shown for radius in result.beyond.values())
    saved = [alone[i].passes - after[i].passes for i in left if shown[i].beyond]
    assert min(saved) > 0
    # One look at the image is left of a sub-run whose class is known to be out of reach.
    spared = [i for i in left if len(shown[i].beyond) == len(jobs[i].targets)]
    assert {after[i].passes for i in spared} == {2 * len(jobs[i].targets) for i in spared}


def test_what_is_known_of_a_smaller_radius_spares_nothing():
    model, attack = Curved(seed=4), parse_attacks("fab-t:steps=30")[0]
    small, large = ThreatModel("Linf", 0.01), ThreatModel("Linf", 0.02)
    jobs = right_jobs(model, 12, seed=4)
    known = [dataclasses.replace(job, beyond=dict.fromkeys(job.targets, 0.015)) for job in jobs]
    for threat, spared in ((small, True), (large, False)):
        fresh, told = attack_all(model, attack, threat, jobs), attack_all(model, attack, threat, known)
        assert ([result.passes for result in told] != [result.passes for result in fresh]) == spared


def test_a_users_attack_spares_the_others_nothing(monkeypatch):
    attack, job = TargetedAPGD(n_iter=5), right_jobs(Curved(seed=4), 4)
    threat = ThreatModel("Linf", 0.005)
    assert any(result.beyond for result in attack_all(Curved(seed=4), attack, threat, job))
    monkeypatch.setattr("robustvlm.attacks.engine.catalog.is_foreign", lambda _: True)
    assert not any(result.beyond for result in attack_all(Curved(seed=4), attack, threat, job))
