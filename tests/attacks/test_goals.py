"""Goals: margins and verdicts agree, superclasses follow the predicted class, losses lead where the goal lies."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import CHANNELS, SIDE, Curved, Linear

from robustvlm.attacks import (
    APGD,
    FOOLED,
    PGD,
    ROBUST,
    AcceptedMistake,
    Case,
    Deny,
    FeatureAway,
    FeatureTo,
    Goal,
    Intrude,
    Job,
    LaneEngine,
    Misclassify,
    Oracle,
    Superclass,
    SuperclassAll,
    Targeted,
    ThreatModel,
    objective,
    parse_attacks,
)
from robustvlm.attacks.goals import GOALS, GoalKind, GoalWords, Known, goal_words, read_goals
from robustvlm.attacks.objectives import OBJECTIVES
from robustvlm.attacks.perturb import perturb
from robustvlm.errors import UserError

K = 6
FINE, COARSE = Superclass(torch.arange(K), "0"), Superclass(torch.tensor([0, 0, 1, 1, 2, 2]), "1")
COARSEST = Superclass(torch.tensor([0, 0, 0, 0, 1, 1]), "2")
ALL = SuperclassAll([FINE, COARSE, COARSEST])
LOGIT_GOALS: list[Goal] = [Misclassify(), Targeted(2), COARSE, ALL]
REFUSABLE: list[Goal] = [AcceptedMistake(), Deny(), Intrude()]


def outputs(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("goal", [*LOGIT_GOALS, *REFUSABLE], ids=lambda goal: type(goal).__name__)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_goal_is_reached_exactly_where_its_margin_is_negative(goal: Goal, seed: int) -> None:
    output = outputs(32, K + (goal in REFUSABLE), seed)
    case = Case(torch.arange(32) % K, torch.full((32,), 3))
    assert torch.equal(goal.reached(output, case), goal.margin(output, case) < 0)


@pytest.mark.parametrize("goal", [Misclassify(), Targeted(2), COARSE, ALL, *REFUSABLE], ids=lambda goal: goal.spec)
@pytest.mark.parametrize("name", ["margin", "dlr"])
def test_what_boundary_attacks_climb_is_above_zero_exactly_where_the_goal_is_reached(goal: Goal, name: str) -> None:
    output = outputs(400, K + (goal in REFUSABLE), 5)
    case = Case(torch.arange(400) % K, torch.full((400,), 3), outputs(400, 2, 6) if goal.refers else None)
    reached = goal.reached(output, case)
    assert 10 < int(reached.sum()) < 390
    assert torch.equal(goal.boundary(output, objective(name), case) > 0, reached)


def test_objectives_tell_as_many_outcomes_apart_as_there_are_superclasses() -> None:
    assert [goal.outcomes(K) for goal in (Misclassify(), FINE, COARSE, ALL)] == [K, K, 3, 2]
    found = perturb(Curved(), images(2), [0, 1], eps=0.01, goal=Superclass(torch.tensor([0, 0, 1, 1, 1]), "1"),
                    attack="apgd-dlr:steps=1,apgd-t:steps=1", lanes=2)  # fmt: skip
    assert [said for said in found.remarks if "with 2 the margin takes its place" in said] == [
        "Attack 'apgd-dlr:steps=1': DLR needs 3 classes: with 2 the margin takes its place.",
        "Attack 'apgd-t:steps=1': targeted DLR needs 4 classes: with 2 the margin takes its place.",
    ]


class NeverRefuses(Curved):
    """Accepts every image, so that an accepted mistake is any mistake."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return torch.cat([logits, torch.full_like(logits[:, :1], 3.0)], 1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("attack", ["fab:steps=15", "fab-t:steps=15:futility=off", "fmn:steps=15"])
def test_boundary_attacks_do_as_well_where_success_is_the_same_event(attack: str, norm: str) -> None:
    groups, eps = torch.tensor([0, 0, 1, 1, 2]), {"Linf": 0.02, "L2": 0.15}[norm]
    coarse, every = Superclass(groups, "1"), SuperclassAll([Superclass(torch.arange(5), "0"), Superclass(groups, "1")])
    pairs = [(Misclassify(), Curved(), AcceptedMistake(), NeverRefuses()), (coarse, Curved(), every, Curved())]
    for one, model, same, other in pairs:
        found = [margins(goal, each, attack, norm, eps) for goal, each in ((one, model), (same, other))]
        assert 2 <= sum(margin < 0 for margin in found[0]) < 30
        assert sum(margin < 0 for margin in found[0]) == sum(margin < 0 for margin in found[1])


def margins(goal: Goal, model: torch.nn.Module, attack: str, norm: str, eps: float) -> list[float]:
    x, jobs = images(30), list[Job]()
    with torch.no_grad():
        output, label = model(x), Curved()(x).argmax(1)
    reference = goal.reference(output, label)
    for i in range(30):
        known = None if reference is None else reference[i]
        jobs.append(Job(str(i), i, x[i], int(label[i]), tuple(goal.targets(output[i], int(label[i]), 9)), known))
    engine = LaneEngine(Oracle(model), parse_attacks(attack)[0], ThreatModel(norm, eps), lanes=30, seed=0, goal=goal)
    return [result.margin if result.outcome == FOOLED else 1.0 for result in engine.run(jobs)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_superclass_verdicts_are_those_of_the_predicted_class_and_nest(seed: int) -> None:
    output, case = outputs(64, K, seed), Case(torch.arange(64) % K)
    predicted = output.argmax(1)
    for goal in (FINE, COARSE, COARSEST):
        expected = goal.groups[predicted] != goal.groups[case.label]
        assert torch.equal(goal.reached(output, case), expected)
    assert torch.equal(FINE.reached(output, case), Misclassify().reached(output, case))
    # Wrong at a coarse level is wrong at every finer one, so "all" is the coarsest.
    assert not (COARSEST.reached(output, case) & ~COARSE.reached(output, case)).any()
    assert torch.equal(ALL.reached(output, case), COARSEST.reached(output, case))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_serves_every_goal_with_finite_useful_gradients(name: str) -> None:
    case = Case(torch.tensor([0, 1, 0, 1]), torch.tensor([4, 5, 4, 5]), torch.ones(4, 2))
    for goal in [*LOGIT_GOALS, *REFUSABLE]:
        output = outputs(4, K + (goal in REFUSABLE), 1).requires_grad_(True)
        loss = goal.loss(output, objective(name), case)
        assert loss.shape == (4,)
        (grad,) = torch.autograd.grad(loss.sum(), output)
        assert grad.isfinite().all()
    output = outputs(4, K, 1)
    assert torch.allclose(
        FINE.loss(output, objective(name), case), Misclassify().loss(output, objective(name), case)
    ), "the finest level is plain misclassification"


def test_superclass_targets_are_the_leaders_of_the_other_superclasses() -> None:
    clean = torch.tensor([5.0, 9.0, 1.0, 2.0, 4.0, 3.0])
    assert COARSE.targets(clean, 0, 9) == [4, 3]
    assert COARSE.targets(clean, 0, 1) == [4]
    assert Misclassify().targets(clean, 1, 2) == [0, 4]
    assert Targeted(2).targets(clean, 1, 9) == [2]


def test_the_loss_for_all_levels_leaves_out_levels_where_target_and_label_are_kin() -> None:
    output, label = outputs(1, K, 3), torch.tensor([0])
    loss = ALL.loss(output, objective("ce-t"), Case(label, torch.tensor([1])))
    assert loss.item() == pytest.approx(FINE.loss(output, objective("ce-t"), Case(label, torch.tensor([1]))).item())


def test_a_rejected_mistake_is_none() -> None:
    output = torch.tensor([[1.0, 2.0, -0.1], [1.0, 2.0, 0.1], [2.0, 1.0, 0.1]])
    case = Case(torch.zeros(3, dtype=torch.int64))
    assert AcceptedMistake().reached(output, case).tolist() == [False, True, False]
    assert AcceptedMistake().prediction(output).tolist() == [-1, 1, 0]
    assert Deny().reached(output, case).tolist() == [True, False, False]
    assert Intrude().reached(output, case).tolist() == [False, True, True]


def attack(model: torch.nn.Module, goal: Goal, jobs: list[Job], eps: float = 0.3, steps: int = 20, **options):
    engine = LaneEngine(
        Oracle(model), options.pop("attack", PGD(n_iter=steps)), ThreatModel("Linf", eps), lanes=4, seed=0, goal=goal,
        **options,
    )  # fmt: skip
    return sorted(engine.run(jobs), key=lambda result: result.job.index)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def test_targeted_and_superclass_attacks_reach_what_they_aim_at() -> None:
    model = Linear(K)
    jobs = [Job(str(i), i, x, label=int(model(x[None]).argmax())) for i, x in enumerate(images(8))]
    for result in attack(model, Targeted(2), [job for job in jobs if job.label != 2]):
        assert (result.outcome, result.prediction) == (FOOLED, 2)
    for result in attack(model, COARSE, jobs):
        assert result.outcome == FOOLED
        assert COARSE.groups[result.prediction] != COARSE.groups[result.job.label]


class UnitFeatures(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Curved(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.inner(x), dim=1)


@pytest.mark.parametrize("attacker", [PGD(n_iter=30), APGD(n_iter=30), PGD(name="fgsm", n_iter=1, random_start=False)])
def test_feature_attacks_leave_the_image_although_the_gradient_vanishes_there(attacker) -> None:
    model = UnitFeatures()
    x = images(6)
    jobs = [Job(str(i), i, image, -1, (), model(image[None])[0].detach()) for i, image in enumerate(x)]
    for result in attack(model, FeatureAway(0.5), jobs, attack=attacker, leave=False):
        reached = torch.nn.functional.cosine_similarity(
            model(result.adversarial[None]), model(result.job.pixels[None])
        ).item()
        assert result.cosine == pytest.approx(reached, abs=1e-5)
        assert result.cosine < 0.999
        assert (result.outcome == FOOLED) == (reached < 0.5)


def test_feature_attacks_reach_a_target() -> None:
    model = UnitFeatures()
    x = images(6)
    goal = FeatureTo(model(x[5:])[0].detach())
    jobs = [Job(str(i), i, image, 0, (), model(image[None])[0].detach()) for i, image in enumerate(x[:5])]
    results = attack(model, goal, jobs, eps=0.6, steps=40)
    assert all(result.outcome == FOOLED for result in results)
    for result in results:
        feature = model(result.adversarial[None])[0]
        assert feature @ goal.target > feature @ result.job.reference


class Doubtful(torch.nn.Module):
    """A linear classifier that accepts bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear(K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.inner(x), (x.mean((1, 2, 3)) - 0.5)[:, None]], dim=1)


def test_an_accepted_mistake_has_to_meet_both_conditions() -> None:
    """At first a step against the class darkens the image; only both gradients together succeed."""
    model, x = Doubtful(), images(6) * 0.2 + 0.42
    clean = model(x)
    assert (clean[:, -1] > 0).all()
    jobs = []
    for i, image in enumerate(x):
        row = clean[i]
        label = int(row[:-1].argmax())
        reference = torch.stack([row[label] - row[:-1].topk(2).values[1], row[-1]]).detach()
        jobs.append(Job(str(i), i, image, label, (), reference))
    for result in attack(model, AcceptedMistake(), jobs, eps=0.2, steps=40):
        output = model(result.adversarial[None])[0]
        assert result.outcome == FOOLED
        assert result.prediction == int(output[:-1].argmax()) != result.job.label
        assert output[-1] > 0
    assert all(result.outcome == FOOLED and result.prediction == -1 for result in attack(model, Deny(), jobs, eps=0.2))


def test_without_leaving_an_image_goes_on_to_its_lowest_margin() -> None:
    model = Linear(K)
    jobs = [Job(str(i), i, x, label=int(model(x[None]).argmax())) for i, x in enumerate(images(5))]
    first = attack(model, Misclassify(), jobs)
    last = attack(model, Misclassify(), jobs, leave=False)
    assert all(result.outcome == FOOLED for result in (*first, *last))
    assert all(b.steps > a.steps and b.margin < a.margin for a, b in zip(first, last, strict=True))
    tiny = attack(model, Misclassify(), jobs, eps=1e-6, leave=False)
    assert all(result.outcome == ROBUST for result in tiny)


def test_a_kind_that_is_added_is_read_checked_and_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    words = GoalWords("dogs", "make a dog of", "images without dogs", "no dog", "not a dog", "All were dogs.")
    into = GoalKind(
        ("into:CLASS",),
        lambda rest, known: (Targeted(list(known.class_names).index(rest), rest),),
        lambda rest, *_: replace(words, title=rest),
        refuses=False,
    )
    known = Known("a:model", ("cat", "dog"))
    monkeypatch.setitem(GOALS, "into", into)
    (goal,) = read_goals("into:dog", known)
    assert isinstance(goal, Targeted)
    assert goal.target == 1
    assert goal_words("into:dog").title == "dog"
    for text, said in (("into", "says not which one: pass into:CLASS"), ("int:dog", "did you mean 'into'")):
        with pytest.raises(UserError, match=said):
            read_goals(text, known)
    with pytest.raises(UserError, match="the goal into is for models that never refuse: attack 'a:model' without"):
        read_goals("into:dog", replace(known, can_reject=True))
    monkeypatch.delitem(GOALS, "into")
    with pytest.raises(UserError, match=r"unknown goal 'into:dog'.*or your own MODULE:CALLABLE"):
        read_goals("into:dog", known)
    assert goal_words("into:dog").title == "the goal into:dog", "a run stays readable without it"


def test_goals_that_a_model_alone_cannot_have() -> None:
    for text, said in (
        ("superclass:1", "pass robustvlm.attacks.Superclass"),
        ("feature:a dog", "pass robustvlm.attacks.FeatureTo"),
        ("targeted:dog", "pass the class's number"),
        ("deny", "the goal deny needs a model that may refuse"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            read_goals(text, Known.of_model(torch.nn.Linear(2, 2)))
