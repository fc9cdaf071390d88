"""Who may give up early: attacks of the user's that build on ours, and goals whose loss tells how far they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from toy import Curved, Linear, attack_all, fooled, images, right_jobs

from robustvlm.attacks import (
    FAB,
    PGD,
    AcceptedMistake,
    Case,
    Deny,
    FeatureAway,
    Goal,
    Job,
    LaneAttack,
    LaneEngine,
    Misclassify,
    Objective,
    Oracle,
    Square,
    Superclass,
    SuperclassAll,
    Targeted,
    TargetedAPGD,
    ThreatModel,
    objective,
    parse_attacks,
)


@dataclass(frozen=True, kw_only=True)
class Mine(TargetedAPGD):
    """A user's variant: it is not of the package, and walks by the margin all the same."""


@dataclass(frozen=True, kw_only=True)
class Keeps(PGD):
    """A user's attack with entries that are called as those of others are, and mean something else."""

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> dict[str, Tensor]:
        return super().begin(x0, threat, generator, run) | {"walking": torch.full((1, 2), 0.5), "reach": x0}


@dataclass(frozen=True, kw_only=True)
class OtherSquare(Square):
    """A user's search that has nothing but the name of ours."""

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> dict[str, Tensor]:
        del threat, generator, run
        return {"x0": x0, "x": x0.clone()}

    def advance(
        self, state: dict[str, Tensor], loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel
    ) -> dict[str, Tensor]:
        del loss, grad, step, threat
        return state


class Late(Misclassify):
    """A user's goal: what is maximised is above zero only long after a wrong class."""

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        return super().loss(output, objective, case) - 20


def facts(attack: LaneAttack, threat: ThreatModel, lanes: int = 8) -> list[object]:
    model = Curved(seed=3)
    results = attack_all(model, attack, threat, right_jobs(model, 12), lanes=lanes)
    return [(r.outcome, r.passes, r.run, r.margin, r.beyond) for r in results]


@pytest.mark.parametrize("lanes", [3, 8])
def test_a_users_variant_of_apgd_t_walks_as_ours_does(lanes):
    threat = ThreatModel("Linf", 0.01)
    ours, mine = facts(TargetedAPGD(n_iter=8), threat, lanes), facts(Mine(n_iter=8), threat, lanes)
    # What it has shown spares no other attack anything; all else is the same.
    assert [fact[:4] for fact in mine] == [fact[:4] for fact in ours]
    assert any(fact[4] for fact in ours)


def test_entries_of_a_users_state_mean_nothing_to_the_engine():
    threat = ThreatModel("Linf", 0.01)
    assert facts(Keeps(n_iter=6), threat) == facts(PGD(n_iter=6), threat)


def test_a_users_square_with_another_state_knows_nothing_of_gradients():
    assert facts(OtherSquare(n_iter=3), ThreatModel("Linf", 0.01))


def run(goal: Goal, attack: LaneAttack, eps: float) -> set[int]:
    model = Curved(seed=3)
    engine = LaneEngine(Oracle(model), attack, ThreatModel("Linf", eps), lanes=8, seed=0, goal=goal)
    return fooled(list(engine.run(right_jobs(model, 8))))


@pytest.mark.parametrize("attack", [TargetedAPGD(n_iter=12, objective=objective("margin-t")), Square(n_iter=560)])
def test_where_the_loss_does_not_tell_success_nothing_is_given_up(attack):
    found = run(Late(), attack, 0.008)
    assert found
    assert found == run(Late(), replace(attack, futility=False), 0.008)


GROUPS = torch.tensor([0, 0, 1, 1, 2])
LEVELS = SuperclassAll([Superclass(torch.arange(5), "0"), Superclass(GROUPS, "1")])


@pytest.mark.parametrize(
    ("goal", "aimed", "free"),
    [
        (Misclassify(), True, True),
        (Targeted(1), True, True),
        (Superclass(GROUPS, "1"), True, True),
        (LEVELS, False, True),
        (AcceptedMistake(), False, False),
        (Deny(), True, True),
        (Late(), False, False),
    ],
)
def test_each_goal_says_whether_its_loss_tells_success(goal, aimed, free):
    for attack, may in ((TargetedAPGD(), aimed), (FAB(), aimed), (Square(), free)):
        engine = LaneEngine(Oracle(Curved()), attack, ThreatModel("Linf", 0.01), lanes=2, seed=0, goal=goal)
        assert engine.attack.futility == may


@pytest.mark.parametrize("goal", [Misclassify(), Superclass(GROUPS, "1"), LEVELS, Targeted(1), Deny()])
def test_the_loss_is_above_zero_wherever_a_goal_that_says_so_is_reached(goal):
    output = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    case = Case(torch.randint(0, 5, (2000,), generator=torch.Generator().manual_seed(1)))
    reached = goal.reached(output, case)
    assert 100 < reached.sum() < 1990
    assert (goal.loss(output, objective("margin"), case)[reached] > 0).all()


def test_apgd_t_does_not_walk_from_an_image_where_the_gradient_vanishes():
    model = Curved(seed=3)
    engine = LaneEngine(
        Oracle(model), TargetedAPGD(), ThreatModel("Linf", 0.01), lanes=2, seed=0, goal=FeatureAway(0.5)
    )
    assert engine.attack.walk_points(0) == 0


class BreaksOutside(Linear):
    """Finite in the ball around images of [0.3, 0.7], and nowhere further away from grey."""

    def forward(self, x: Tensor) -> Tensor:
        far = (x - 0.5).abs().flatten(1).amax(1, keepdim=True) > 0.205
        return torch.where(far, torch.nan, super().forward(x))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["apgd-t", "fab-t", "fab-t:futility=off", "fab", "fmn", "fmn:restarts=2"])
def test_what_breaks_outside_the_ball_says_nothing_of_the_image(name: str, precision: str) -> None:
    """A walk that comes there turns back, and what follows inside the ball is made."""
    model, x = BreaksOutside(), 0.3 + 0.4 * images(12)
    order = model(x).argsort(descending=True).tolist()
    jobs = [Job(str(i), i, x[i], order[i][0], tuple(order[i][1:])) for i in range(12)]
    (attack,) = parse_attacks(f"{name}:steps=20")
    found = {}
    for each in (model, Linear()):
        results = attack_all(each, attack, ThreatModel("Linf", 0.005), jobs, lanes=12, precision=precision)
        assert {result.outcome for result in results} == {"robust", "fooled"}
        assert all(not result.beyond or min(result.beyond.values()) > 0 for result in results)
        found[each] = fooled(results)
    plain = found.popitem()[1]
    assert found[model] == plain
