"""The vote of noisy copies: closed forms of linear classifiers, error probabilities by simulation, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor, nn

from robustvlm.attacks.perturb import perturb
from robustvlm.certify.means import clopper_pearson_lower
from robustvlm.defenses.classifier import ZeroShot
from robustvlm.defenses.votes import ABSTAIN, Smoothed, certify_tensors
from robustvlm.errors import UserError
from robustvlm.models import load_model

SIGMA = 0.25


class Side(nn.Module):
    """Two classes on the sides of the hyperplane where the first pixel is `where`; its smoothing has closed forms."""

    def __init__(self, where: float = 0.5) -> None:
        super().__init__()
        self.where = nn.Parameter(torch.tensor(where))

    def forward(self, x: Tensor) -> Tensor:
        ahead = x[:, 0, 0, 0] - self.where
        return torch.stack([ahead, -ahead], dim=1)


def at(values: list[float]) -> Tensor:
    """Images whose first pixel has these values; the others matter to nobody."""
    x = torch.rand(len(values), 1, 2, 2)
    x[:, 0, 0, 0] = torch.tensor(values)
    return x


def test_the_radius_approaches_the_distance_from_the_plane_and_never_passes_it() -> None:
    distances = torch.tensor([0.05, 0.1, 0.2, 0.3], dtype=torch.float64)
    found = certify_tensors(Smoothed(Side(), SIGMA, lanes=1024), at([0.5 + float(d) for d in distances]), n=20_000)
    assert found.classes.tolist() == [0, 0, 0, 0]
    assert bool((found.radius <= distances + 1e-6).all())
    assert bool((found.radius >= distances - 0.03).all())


def test_the_radius_is_cohens_of_the_votes() -> None:
    found = Smoothed(Side(), SIGMA).certify(at([0.6, 0.9, 0.51]), n=700, alpha=0.01, n0=50)
    lower = clopper_pearson_lower((found.votes * 700).round().numpy(), 700, 0.01)
    wanted = [max(0.0, SIGMA * float(norm.ppf(p))) for p in lower]
    assert found.radius.tolist() == pytest.approx(wanted, abs=1e-12)
    assert found.classes.tolist() == [0 if r > 0 else ABSTAIN for r in wanted]


def test_radii_are_wrong_no_more_often_than_alpha() -> None:
    distance, alpha, runs = 0.06, 0.1, 600
    smoothed, x = Smoothed(Side(), SIGMA, lanes=2048), at([0.5 + distance])
    # One call over many images that differ only where nothing looks: each has noise of its own.
    found = certify_tensors(smoothed, torch.cat([x + 0 * x, *[at([0.5 + distance]) for _ in range(runs - 1)]]), n=64,
                            alpha=alpha, n0=16)  # fmt: skip
    wrong = (found.radius > distance + 1e-6) | (found.classes == 1)
    assert int(wrong.sum()) <= binom.ppf(1 - 1e-6, runs, alpha)
    assert int((found.classes == 0).sum()) > runs / 10


@pytest.mark.parametrize("distance", [0.0, 0.02])
def test_another_class_than_the_smoothed_one_is_named_no_more_often_than_alpha(distance: float) -> None:
    alpha, runs, n = 0.1, 1500, 40
    smoothed = Smoothed(Side(), SIGMA, n=n, lanes=2048)
    answers = smoothed.predict(at([0.5 + distance] * runs), alpha=alpha)
    # On the plane itself both classes are right or wrong alike: naming any is the error.
    wrong = answers != ABSTAIN if distance == 0 else answers == 1
    assert int(wrong.sum()) <= binom.ppf(1 - 1e-6, runs, alpha)
    # The exact chance of class 0: so many of n votes as the two-sided test asks for.
    needed = next(k for k in range(n // 2, n + 1) if 2 * binom.sf(k - 1, n, 0.5) <= alpha)
    chance = binom.sf(needed - 1, n, norm.cdf(distance / SIGMA))
    spread = math.sqrt(chance * (1 - chance) / runs)
    assert abs(float((answers == 0).double().mean()) - chance) < 5 * spread


def test_answers_follow_the_seed_and_the_image_and_the_model_but_not_the_batch() -> None:
    x, smoothed = at([0.55, 0.6, 0.65, 0.7, 0.8]), Smoothed(Side(), SIGMA)
    every = smoothed.certify(x, n=300)
    assert torch.equal(every.votes, smoothed.certify(x, n=300).votes)
    rows = torch.tensor([4, 1, 2])
    assert torch.equal(every.votes[rows], smoothed.certify(x[rows], n=300).votes)
    assert not torch.equal(every.votes, smoothed.certify(x, n=300, seed=1).votes)
    assert not torch.equal(every.votes, Smoothed(Side(0.5 + 1e-7), SIGMA).certify(x, n=300).votes)


def test_it_is_a_module_that_can_be_attacked() -> None:
    smoothed = Smoothed(Side(), 0.05, n=32, lanes=256)
    x = at([0.53, 0.95, 0.52, 0.99])
    shares = smoothed(x)
    assert shares.shape == (4, 2)
    assert shares.exp().sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    found = perturb(smoothed, x, [0, 0, 0, 0], eps=0.2, attack="pgd", steps=3, lanes=4, eot=2, draws=5)
    assert found.fooled.tolist() == [True, False, True, False]


def test_the_model_is_used_in_evaluation_mode_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), Side()).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    smoothed = Smoothed(model, SIGMA)
    model.train()
    smoothed.predict(at([0.9, 0.1]))
    smoothed.certify(at([0.9]), n=100)
    assert model.training
    assert model[0].training
    assert model[1].where.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_pass_that_fails_is_a_vote_for_none() -> None:
    class Failing(Side):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, 0, 1, 1, None] > 0.5, super().forward(x), torch.nan)

    x = at([0.95, 0.95])
    x[:, 0, 1, 1] = torch.tensor([0.5, 1.0])
    smoothed = Smoothed(Failing(), SIGMA)
    smoothed.predict(x[1:])  # the model is tried out on the first images, which have to work
    found = smoothed.certify(x, n=500)
    assert found.votes[0] < 0.6
    assert found.classes.tolist() == [ABSTAIN, 0]


def test_an_encoder_votes_with_class_names() -> None:
    vlm = load_model("tiny")
    smoothed = Smoothed(vlm, sigma=0.05, n=8, classes=["apple", "dog"], templates=["a drawing of {}"])
    assert isinstance(smoothed.asked.model, ZeroShot)
    assert smoothed.predict(torch.rand(1, 3, 64, 64)).shape == (1,)
    with pytest.raises(UserError, match=r"knows no classes: pass classes="):
        Smoothed(vlm, sigma=0.05)


class Lucky(Side):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(len(x), 1)


class Together(Side):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Refusing(Side):
    can_reject = True


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Smoothed(Side(), 0), "sigma must be above 0"),
        (lambda: Smoothed(Side(), 0.1, n=0), "n must be a whole number"),
        (lambda: Smoothed(Smoothed(Side(), 0.1), 0.1), "smoothed already"),
        (lambda: Smoothed(Refusing(), 0.1), "never refuse"),
        (lambda: Smoothed(Lucky(), 0.1).predict(at([0.5])), "draws at random"),
        (lambda: Smoothed(Together(), 0.1).certify(at([0.5, 0.7])), "other images of the batch"),
        (lambda: Smoothed(Side(), 0.1).predict(at([0.5]), alpha=0), "alpha"),
        (lambda: Smoothed(Side(), 0.1).certify(at([0.5]), n=0), "n must be"),
        (lambda: certify_tensors(Side(), at([0.5])), r"pass Smoothed\(model"),  # type: ignore[arg-type]
        (lambda: Smoothed(Side(), 0.1).predict(at([0.5]) * 255), "divide 8-bit images by 255"),
    ],
)  # fmt: skip
def test_what_no_vote_can_be_taken_of_is_one_line(make: object, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
