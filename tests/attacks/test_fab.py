"""FAB: closed forms on linear models, the paper's step, the authors' implementation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from toy import Curved, Linear, attack_all, fooled, images, right_jobs

from robustvlm.attacks import Job, LaneAttack, ThreatModel, objective, parse_attacks
from robustvlm.attacks.fab import FAB
from robustvlm.attacks.threat import lengths
from robustvlm.errors import UserError

THREATS = [ThreatModel("Linf", 0.03), ThreatModel("L2", 0.2)]
NORMS = ["Linf", "L2"]


def shortest(model: nn.Module, attack: LaneAttack, jobs: list[Job], norm: str, target: int = 0) -> Tensor:
    """Drive the attack by hand, without an engine that ends it: the shortest success met per image, or infinity."""
    threat = ThreatModel(norm, 0.01)
    draws = torch.Generator().manual_seed(0)
    states = [attack.begin(job.pixels[None], threat, draws, 0) for job in jobs]
    state = {name: torch.cat([one[name] for one in states]) for name in states[0]}
    label = torch.tensor([job.label for job in jobs])
    targets = torch.tensor([job.targets[target] for job in jobs])
    found = torch.full((len(jobs),), float("inf"))
    for step in range(attack.n_iter + 1):
        x = state["x"].detach().requires_grad_(True)
        logits = model(x)
        loss = attack.objective(logits, label, targets)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        length = lengths(x.detach() - state["x0"], norm)
        found = torch.where(logits.argmax(1) != label, torch.minimum(found, length), found)
        state = attack.advance(state, loss.detach(), grad, torch.full_like(label, step), threat)
    return found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["fab", "fab-t"])
def test_two_class_linear_model_gives_the_distance_to_the_boundary(norm, name):
    """For logits W x the least norm is m / ||w_y - w_other||_dual when no pixel meets 0 or 1."""
    model = Linear(classes=2)
    jobs = [dataclasses.replace(job, pixels=0.4 + 0.2 * job.pixels) for job in right_jobs(model)]
    logits = model(torch.stack([job.pixels for job in jobs]))
    jobs = [
        dataclasses.replace(job, label=int(z.argmax()), targets=(1 - int(z.argmax()),))
        for job, z in zip(jobs, logits, strict=True)
    ]
    difference = model.layer.weight[0] - model.layer.weight[1]
    exact = (logits[:, 0] - logits[:, 1]).abs() / (difference.abs().sum() if norm == "Linf" else difference.norm())
    found = shortest(model, parse_attacks(name, steps=15)[0], jobs, norm)
    inside = exact < 0.3
    assert inside.sum() > 10
    assert (found >= exact * (1 - 1e-4)).all()
    assert (found[inside] <= exact[inside] * 1.01 + 1e-6).all()


@pytest.mark.parametrize("threat", THREATS, ids=NORMS)
def test_first_step_is_the_papers(threat):
    """At the image both steps are the same, so the first iterate is x0 + eta * (nearest point of the plane - x0)."""
    model, attack = Linear(), FAB(n_iter=1)
    x0 = images(1) * 0.2 + 0.4
    state = attack.begin(x0, threat, torch.Generator(), 0)
    x = state["x"].requires_grad_(True)
    gap = model(x)[0, 1] - model(x)[0, 0]
    (w,) = torch.autograd.grad(gap, x)
    state = attack.advance(state | {"x": x.detach()}, gap.detach()[None], w, torch.zeros(1).long(), threat)
    size = gap.abs() / (w.abs().sum() if threat.norm == "Linf" else w.norm())
    along = w.sign() if threat.norm == "Linf" else w / w.norm()
    assert torch.allclose(state["x"], x0 - 1.05 * gap.sign() * size * along, atol=1e-5)


def test_a_success_is_pulled_back_before_the_next_step():
    """With no overshoot, no bias and a flat objective at a success, what is left is the pull towards the image."""
    attack = FAB(beta=0.6, futility=False)
    x0 = torch.full((2, 3, 2, 2), 0.5)
    state = {"x0": x0, "x": x0 + 0.1}
    loss, flat = torch.tensor([0.3, -0.3]), torch.zeros_like(x0)
    moved = attack.advance(state, loss, flat, torch.zeros(2).long(), THREATS[0])["x"]
    assert torch.allclose(moved[0], x0[0] + 0.06)
    assert torch.allclose(moved[1], x0[1] + 0.1)


@pytest.mark.parametrize("threat", THREATS, ids=NORMS)
@pytest.mark.parametrize("name", ["fab:restarts=2", "fab-t"])
def test_only_points_inside_the_ball_count(threat, name):
    model = Curved()
    results = attack_all(model, parse_attacks(name, steps=20)[0], threat, right_jobs(model, 40))
    assert 0 < len(fooled(results)) < len(results)
    for result in results:
        assert (result.linf if threat.norm == "Linf" else result.l2) <= threat.eps
        logits = model(result.adversarial[None])[0]
        assert (logits.argmax().item() != result.job.label) == (result.outcome == "fooled")


@pytest.mark.parametrize("threat", THREATS, ids=NORMS)
def test_first_run_of_a_target_starts_at_the_image_and_restarts_within_half_the_radius(threat):
    attack, x0 = FAB(n_restarts=3), images(1)
    starts = [attack.begin(x0, threat, torch.Generator().manual_seed(run), run)["x"] for run in range(6)]
    away = torch.stack([lengths(x - x0, threat.norm)[0] for x in starts])
    assert away[[0, 3]].max() == 0
    assert away[[1, 2, 4, 5]].min() > 0
    assert away.max() <= threat.eps / 2 * (1 + 1e-6)
    assert [attack.target_rank(run) for run in range(6)] == [0, 0, 0, 1, 1, 1]
    assert not torch.equal(attack.away_from_image().begin(x0, threat, torch.Generator(), 0)["x"], x0)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_those_of_the_authors_implementation(norm):
    """Per image and target the shortest success is at most theirs at equal iterations, but for a percent or two."""
    from pyautoattack.fab_pt import FABAttack_PT

    model = Curved(seed=3)
    jobs = right_jobs(model, 40, seed=5)
    x, y = torch.stack([job.pixels for job in jobs]), torch.tensor([job.label for job in jobs])
    theirs = FABAttack_PT(model, norm=norm, n_iter=30, targeted=True, device="cpu")
    for rank in range(4):
        theirs.target_class = rank + 2
        moved = theirs.attack_single_run(x, y, is_targeted=True)
        found = lengths(moved - x, norm)
        found = torch.where(found > 0, found, torch.inf)
        ours = shortest(model, FAB(n_iter=30), jobs, norm, rank)
        ratio = ours / found
        assert (ratio.nan_to_num(1.0) > 1.02).sum() <= 2
        assert ratio[found.isfinite()].median() <= 1.002


@pytest.mark.parametrize("threat", [ThreatModel("Linf", 0.015), ThreatModel("L2", 0.2)], ids=NORMS)
def test_fools_what_the_authors_implementation_fools(threat):
    from pyautoattack.fab_pt import FABAttack_PT

    model = Curved(seed=3)
    jobs = right_jobs(model, 80, seed=5)
    x, y = torch.stack([job.pixels for job in jobs]), torch.tensor([job.label for job in jobs])
    theirs = FABAttack_PT(
        model, norm=threat.norm, eps=threat.eps, n_iter=20, targeted=True, device="cpu", n_target_classes=4
    )
    moved = theirs.perturb(x, y)
    inside = lengths(moved - x, threat.norm) <= threat.eps
    broken = {i for i in range(80) if inside[i] and model(moved)[i].argmax() != y[i]}
    results = attack_all(model, FAB(n_iter=20), threat, jobs)
    assert 0 < len(broken) < 80
    assert fooled(results) >= broken
    every = attack_all(model, FAB(n_iter=20, futility=False), threat, jobs)
    assert fooled(every) == fooled(results)
    assert {result.steps for result in every if result.outcome == "robust"} == {4 * 20}


def test_a_model_without_gradient_leaves_the_image_where_it_is():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([2.0, 1.0]) + 0 * x.flatten(1)[:, :2]

    jobs = [Job(str(i), i, image, 0, (1,)) for i, image in enumerate(images(3))]
    for result in attack_all(Constant(), FAB(n_iter=5), THREATS[0], jobs):
        assert result.outcome == "robust"
        assert torch.equal(result.adversarial, result.job.pixels)


def test_objectives_whose_sign_does_not_tell_success_are_refused():
    with pytest.raises(UserError, match="margin-t"):
        FAB(objective=objective("ce-t"))
    with pytest.raises(UserError, match="sign"):
        parse_attacks("fab:objective=ce")
    assert parse_attacks("fab:objective=dlr")[0].objective.name == "dlr"
