"""Sound models pass every question of the sanity probe, whatever they are and whatever the ball."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import PIXELS, Curved, Linear, images

from robustvlm.attacks import Case, FeatureAway, Misclassify, Oracle, Superclass, SuperclassAll, ThreatModel
from robustvlm.attacks.honesty import MOST_IMAGES, RANGES, Sanity, inspect_model

BALLS = [ThreatModel("Linf", 1 / 255), ThreatModel("Linf", 0.5), ThreatModel("L2", 0.1), ThreatModel("L2", 5.0)]


def inspected(model: nn.Module, count: int = 24, *, ball: ThreatModel = BALLS[0], goal=None, **options) -> Sanity:
    x = images(count)
    with torch.no_grad():
        label = model(x).argmax(1)
    settings = {"random": False, "classes": 5, **options}
    return inspect_model(Oracle(model), x, goal or Misclassify(), Case(label), ball, **settings)


@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [Linear, Curved])
def test_a_sound_model_says_what_it_does(kind, seed, ball):
    found = inspected(kind(classes=5, seed=seed), ball=ball)
    assert not found.probabilities
    assert found.noise_wins <= 2  # steps as large as these may overshoot where the model is curved
    assert found.gradient_wins >= 20
    assert found.derivative is not None
    assert found.derivative > 0.95
    assert found.right == found.images == 24
    assert set(found.ranges) == set(RANGES)
    assert all(gained == 0 for gained, _ in found.ranges.values())


def test_goals_that_sum_several_conditions_are_differentiated_as_they_are():
    levels = [Superclass(torch.arange(5), "0"), Superclass(torch.tensor([0, 0, 1, 1, 2]), "1")]
    found = inspected(Curved(), goal=SuperclassAll(levels))
    assert found.derivative is not None
    assert found.derivative > 0.95
    assert found.noise_wins <= 2


class Features(Curved):
    def forward(self, x):
        return nn.functional.normalize(super().forward(x), dim=1)


def test_a_feature_goal_is_asked_away_from_the_image_where_its_gradient_vanishes():
    model, x = Features(), images(24)
    reference = model(x).detach()
    case = Case(torch.zeros(24, dtype=torch.int64), reference=reference)
    ball = ThreatModel("Linf", 8 / 255)
    found = inspect_model(Oracle(model), x, FeatureAway(), case, ball, random=False, classes=None)
    assert found.gradient_wins >= 20
    assert found.derivative is not None
    assert found.derivative > 0.9
    assert found.right is None
    assert not found.probabilities


def test_the_cost_is_bounded_and_as_stated():
    model = Linear(classes=5)
    oracle = Oracle(model)
    x = images(50)
    inspect_model(oracle, x, Misclassify(), Case(torch.zeros(50, dtype=torch.int64)), BALLS[0], random=False, classes=5)
    assert oracle.passes.backward == MOST_IMAGES
    assert oracle.passes.forward == 16 * MOST_IMAGES


def test_unknown_labels_leave_out_the_question_of_the_range():
    x = images(8)
    case = Case(torch.full((8,), 7))
    found = inspect_model(Oracle(Curved(classes=8)), x, Misclassify(), case, BALLS[0], random=False, classes=5)
    assert found.right is None
    assert found.ranges == {}


def test_the_same_answer_for_everything_is_right_on_one_class_by_luck():
    class Bright(Linear):
        """Says class 0 of whatever is outside [0, 1]."""

        def forward(self, x):
            outside = (x.flatten(1).amax(1) > 1) | (x.flatten(1).amin(1) < 0)
            return super().forward(x) + 1e4 * outside[:, None] * torch.eye(5)[0]

    x, case = images(24), Case(torch.zeros(24, dtype=torch.int64))
    found = inspect_model(Oracle(Bright(5)), x, Misclassify(), case, BALLS[0], random=False, classes=5)
    assert found.right is not None
    assert found.right < 20
    assert all(gained == 0 for gained, _ in found.ranges.values())


def test_scores_that_happen_to_be_small_are_no_probabilities():
    class Small(Linear):
        def forward(self, x):
            return torch.sigmoid(super().forward(x))

    assert not inspected(Small(classes=5)).probabilities


def test_an_unmeasurable_derivative_is_not_judged():
    class Flat(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 5) + 0 * x.flatten(1).sum(1, keepdim=True)

    assert PIXELS > 5
    assert inspected(Flat()).derivative is None


class Wavy(nn.Module):
    """Sound, and as curved per distance in L2 at any resolution: sines of random projections of the image."""

    def __init__(self, side: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(5)
        self.directions = nn.Parameter(5 * torch.randn(4, 3 * side * side, generator=draws))

    def forward(self, x):
        return torch.sin(x.flatten(1) @ self.directions.T)


class HalfPrecision(nn.Module):
    """Sound, and computed in float16 inside."""

    def __init__(self, side: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(6)
        self.directions = nn.Parameter(torch.randn(4, 3 * side * side, generator=draws))

    def forward(self, x):
        return x.half().float().flatten(1) @ self.directions.T


class HalfHidden(Wavy):
    """Shows its gradient of one half of every output only."""

    def forward(self, x):
        return super().forward(x) + super().forward(x.detach().flip(-1))


@pytest.mark.parametrize(
    ("kind", "side", "honest"),
    [
        (Wavy, 16, True),
        (Wavy, 224, True),
        (HalfPrecision, 224, True),
        (HalfHidden, 16, False),
        (HalfHidden, 224, False),
    ],
)
def test_the_gradient_is_believed_at_any_resolution_where_it_is_right(kind, side, honest):
    x = torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.25
    case = Case(torch.zeros(8, dtype=torch.int64))
    found = inspect_model(Oracle(kind(side)), x, Misclassify(), case, BALLS[0], random=False, classes=4)
    assert found.derivative is not None
    assert found.derivative > 0.95 if honest else found.derivative < 0.85
