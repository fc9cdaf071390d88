"""FMN: closed forms on linear models, the radius of a run changes nothing of its walk, exact balls; own attacks."""

# ruff: noqa: ARG002  (attacks of tests need not use all they are given)
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from test_fab import shortest
from torch import Tensor
from toy import Curved, Linear, attack_all, fooled, right_jobs

from robustvlm.attacks import ATTACKS, FMN, PGD, LaneAttack, Objective, ThreatModel, objective, parse_attacks
from robustvlm.attacks.catalog import own_attack
from robustvlm.attacks.threat import NORMS
from robustvlm.errors import UserError


@pytest.mark.parametrize("norm", NORMS)
def test_two_class_linear_model_gives_the_distance_to_the_boundary(norm):
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
    found = shortest(model, FMN(n_iter=200), jobs, norm)
    inside = exact < 0.3
    assert inside.sum() > 10
    assert (found >= exact * (1 - 1e-4)).all()
    assert (found[inside] <= exact[inside] * 1.02 + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_is_fooled_exactly_where_the_shortest_perturbation_fits(norm):
    model = Curved()
    jobs = right_jobs(model, 20)
    lengths = shortest(model, FMN(n_iter=30), jobs, norm)
    found = lengths[lengths.isfinite()]
    assert len(found) > 15
    for eps in found.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist():
        results = attack_all(model, FMN(n_iter=30), ThreatModel(norm, eps), jobs)
        near = {row for row, length in enumerate(lengths.tolist()) if abs(length - eps) < 1e-6}
        fits = {row for row, length in enumerate(lengths.tolist()) if length <= eps}
        assert fooled(results) - near == fits - near
        for result in results:
            assert (result.linf if norm == "Linf" else result.l2) <= eps
            assert float(result.adversarial.min()) >= 0
            assert float(result.adversarial.max()) <= 1


def test_objectives_without_a_sign_and_senseless_numbers_are_refused():
    for text, said in [
        ("fmn:objective=ce", "whose sign tells success"),
        ("fmn:alpha=0", "alpha must be above 0"),
        ("fmn:gamma=0.95", "gamma must be above 0 and at most 0.9"),
    ]:
        with pytest.raises(UserError, match=said):
            parse_attacks(text)
    assert parse_attacks("fmn:gamma=0.1:steps=7")[0].gamma == 0.1


def test_the_table_has_every_attack_once_and_makes_it_under_its_name():
    assert list(ATTACKS) == sorted(ATTACKS)
    assert {"fgsm", "pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "fmn", "square"} <= set(ATTACKS)
    assert {name: make().name for name, make in ATTACKS.items()} == {name: name for name in ATTACKS}


# ---- attacks of the user's: what they promise is not believed


@dataclass(frozen=True, kw_only=True)
class Leap(LaneAttack):
    """Far along the gradient, whatever the ball, and says that it stays inside."""

    name: str = "leap"
    n_iter: int = 5
    objective: Objective = objective("margin")

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> dict[str, Tensor]:
        return {"x0": x0, "x": x0.clone()}

    def advance(
        self, state: dict[str, Tensor], loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel
    ) -> dict[str, Tensor]:
        return state | {"x": (state["x"] + grad.sign()).clamp(0, 1)}


class Stray(Leap):
    def begin(self, x0, threat, generator, run):
        return {"x0": x0, "x": (x0 + 0.5 * torch.where(x0 < 0.5, 1.0, -1.0))}


class Crowd(Leap):
    def advance(self, state, loss, grad, step, threat):
        return state | {"x": state["x"] + 0.01 * grad.mean(0, keepdim=True)}


class Numb(Leap):
    def advance(self, state, loss, grad, step, threat):
        return state | {"x": state["x"] * float("nan")}


class Silent(Leap):
    def advance(self, state, loss, grad, step, threat):
        return None


def test_points_outside_the_ball_never_count():
    model = Linear()
    results = attack_all(model, Leap(), ThreatModel("Linf", 1e-6), right_jobs(model, 8))
    assert fooled(results) == set()
    assert all(result.linf <= 1e-6 for result in results)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Stray, "must begin inside the ball"),
        (Crowd, "must treat lanes on their own"),
        (Numb, "x must be finite pixels"),
        (Silent, "must return a state"),
        (dict, "'my:thing': expected an attack .*, got a dict"),
        (lambda: 1 / 0, "'my:thing' failed: ZeroDivisionError"),
        (3, "is a int, not a callable that returns an attack"),
    ],
)
def test_what_does_not_keep_the_contract_is_refused_in_one_line(make, said):
    with pytest.raises(UserError, match=said) as error:
        own_attack("my:thing", make)
    assert "\n" not in str(error.value)


def test_what_keeps_it_is_taken():
    assert own_attack("my:thing", Leap).n_iter == 5
    assert isinstance(PGD().for_random_model(), PGD)
    assert not PGD().for_random_model().detect_cycles
