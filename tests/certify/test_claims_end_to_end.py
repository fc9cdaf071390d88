"""Claims against encoders whose smoothed feature is known in closed form, sampled by the engine."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from robustvlm.certify import (
    Certifier,
    ClassAtRadius,
    ClassRadius,
    FeatureRadius,
    FeatureTest,
    Finding,
    Job,
    OpensetRadius,
    SamplingEngine,
    VocabularyRadius,
    VoteAtRadius,
    VoteRadius,
)
from robustvlm.certify.feature import vector_radius
from robustvlm.certify.openset import contrast_vectors

SIGMA = 0.5


def sample(
    encode: Callable[[Tensor], Tensor], make: Callable[[], Certifier], *, first: float = 0.0, seed: int = 0
) -> Finding:
    """Certify one image whose first pixel is `first` and whose others are zero."""
    pixels = torch.zeros(3, 2, 2)
    pixels[0, 0, 0] = first
    engine = SamplingEngine(encode, seed=seed, lanes=512)
    return next(iter(engine.run([Job("x", 0, pixels)], lambda _: make()))).finding


def circle(k: float) -> Callable[[Tensor], Tensor]:
    """O2: f = (cos kz, sin kz) along the first pixel z; the smoothed feature turns by exactly k eps."""

    def encode(noisy: Tensor) -> Tensor:
        z = k * noisy.flatten(1)[:, 0]
        return torch.stack([z.cos(), z.sin()], dim=1)

    return encode


def halfspace(b: float) -> Callable[[Tensor], Tensor]:
    """O1: the first class's feature where z <= b, the second's beyond."""

    def encode(noisy: Tensor) -> Tensor:
        inside = noisy.flatten(1)[:, 0] <= b
        return torch.stack([inside, ~inside], dim=1).float()

    return encode


def test_feature_radius_on_the_circle() -> None:
    """||m|| = exp(-1/8), so T4 gives .6924 with all samples in the world; the truth is pi / 3."""
    found = sample(circle(1.0), lambda: FeatureRadius(cos0=0.5, sigma=SIGMA, alpha=0.001, n=6000, n_pilot=600))
    assert found.r is not None
    assert 0.86 < found.r <= math.exp(-0.125)
    assert 0.655 < found.radius <= vector_radius(math.exp(-0.125), 0.5, SIGMA) < math.pi / 3
    assert 0.0 < found.columns["paper_radius"] < found.columns["fcsb_radius"] < 0.4454
    assert found.columns["fcsb_radius"] < found.columns["cone_radius"] < 0.5177
    assert found.columns["cdf_radius"] < math.pi / 3
    assert found.columns["direction_radius"] < math.pi / 3


def test_the_published_bound_uses_the_unsmoothed_anchor() -> None:
    """At z = 0 the anchor is the smoothed direction; the bound is then S = (1 + ||m||) / 2 less Hoeffding."""
    n = 4000
    found = sample(circle(1.0), lambda: FeatureRadius(cos0=0.5, sigma=SIGMA, alpha=0.001, n=n, n_pilot=400))
    plug_in = found.columns["paper_s"] + math.sqrt(math.log(1000.0) / (2 * n))
    assert plug_in == pytest.approx(0.5 * (1.0 + math.exp(-0.125)), abs=0.01)


def test_feature_test_agrees_with_the_radius_and_needs_far_fewer_samples() -> None:
    found = sample(circle(1.0), lambda: FeatureTest(radius=0.4, cos0=0.5, sigma=SIGMA, alpha=0.001, n=10_000))
    assert (found.stop, found.radius) == ("certified", 0.4)
    assert found.n <= 320
    beyond = sample(circle(1.0), lambda: FeatureTest(radius=0.75, cos0=0.5, sigma=SIGMA, alpha=0.001, n=10_000))
    assert (beyond.stop, beyond.radius) == ("futile", 0.0)
    assert beyond.n < 5000


def test_a_radius_beyond_the_table_is_given_up_without_a_sample() -> None:
    certifier = FeatureTest(radius=10.0, cos0=0.5, sigma=SIGMA, alpha=0.001, n=1000)
    assert certifier.request() is None
    assert (certifier.finding().stop, certifier.finding().n) == ("futile", 0)


@pytest.mark.parametrize("make", [VoteRadius, ClassRadius, VocabularyRadius])
def test_class_claims_never_reach_beyond_the_half_space(make: type) -> None:
    """P(first) = Phi(b / sigma): the class changes exactly at distance b, for the vote as for the mean."""
    text = np.eye(2)
    found = sample(halfspace(0.6), lambda: make(text=text, sigma=SIGMA, alpha=0.001, n=6000, n_pilot=600))
    assert found.prediction == 0
    assert (0.2 if make is VocabularyRadius else 0.5) < found.radius < 0.6


@pytest.mark.parametrize("make", [VoteAtRadius, ClassAtRadius])
def test_class_tests_on_the_half_space(make: type) -> None:
    text = np.eye(2)
    found = sample(halfspace(0.6), lambda: make(text=text, radius=0.3, sigma=SIGMA, alpha=0.001, n=6000, n_pilot=200))
    assert (found.stop, found.radius) == ("certified", 0.3)
    assert found.n < 1500
    beyond = sample(halfspace(0.6), lambda: make(text=text, radius=0.65, sigma=SIGMA, alpha=0.001, n=6000, n_pilot=200))
    assert beyond.radius == 0.0
    assert beyond.stop in ("futile", "exhausted")


def test_a_class_with_a_twin_is_never_certified() -> None:
    text = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for early in (False, True):
        common = {"text": text, "sigma": SIGMA, "alpha": 0.001, "n": 600, "n_pilot": 200}
        make = (lambda c=common: ClassAtRadius(radius=0.1, **c)) if early else (lambda c=common: ClassRadius(**c))
        assert sample(halfspace(0.6), make).radius == 0.0


@pytest.mark.parametrize(("tau", "side"), [(0.3, "openset-accept"), (0.8, "openset-reject")])
def test_openset_sides_on_the_half_space(tau: float, side: str) -> None:
    """The score <m, e0> = Phi((b - z) / sigma) reaches tau exactly at distance |b - sigma Phi^-1(tau)|."""
    from scipy.special import ndtri

    b = 0.6 if side == "openset-accept" else 0.0
    vectors = contrast_vectors(np.array([[1.0, 0.0]]), [], 0.0)
    true = abs(b - SIGMA * ndtri(tau))
    common = {"vectors": vectors, "tau": tau, "sigma": SIGMA, "alpha": 0.001, "n": 6000, "n_pilot": 600}
    found = sample(halfspace(b), lambda: OpensetRadius(**common))
    assert found.claim == side
    assert found.prediction == (side == "openset-accept")
    assert 0.15 < found.radius < true
    inside = sample(halfspace(b), lambda: OpensetRadius(**common, radius=0.1))
    assert (inside.radius, inside.stop) == (0.1, "certified")
    assert sample(halfspace(b), lambda: OpensetRadius(**common, radius=1.1 * true)).radius == 0.0


def test_rounded_features_give_smaller_radii() -> None:
    text = np.eye(2)
    exact, rounded = (
        sample(
            circle(0.8), lambda e=e: ClassRadius(text=text, sigma=SIGMA, alpha=0.001, n=2000, n_pilot=200, rounding=e)
        ).radius
        for e in (0.0, 0.05)
    )
    assert 0.0 < rounded < exact
    ball, wider = (
        sample(
            circle(0.8),
            lambda e=e: VocabularyRadius(text=text, sigma=SIGMA, alpha=0.001, n=2000, n_pilot=200, rounding=e),
        ).radius
        for e in (0.0, 0.05)
    )
    assert 0.0 < wider < ball


@pytest.mark.parametrize("claim", ["feature", "class", "vote"])
def test_sequential_tests_keep_their_level_at_the_edge(claim: str) -> None:
    """At a radius just beyond what the population certifies (feature) or beyond the truth (class), few runs certify."""
    alpha, runs = 0.05, 60
    text = np.eye(2)
    makes: dict[str, Callable[[], Certifier]] = {
        # The norm that radius .7 asks for is above the true one.
        "feature": lambda: FeatureTest(radius=0.70, cos0=0.5, sigma=SIGMA, alpha=alpha, n=400),
        "class": lambda: ClassAtRadius(text=text, radius=0.301, sigma=SIGMA, alpha=alpha, n=500, n_pilot=100),
        "vote": lambda: VoteAtRadius(text=text, radius=0.301, sigma=SIGMA, alpha=alpha, n=500, n_pilot=100),
    }
    encode = circle(1.0) if claim == "feature" else halfspace(0.3)
    false = sum(sample(encode, makes[claim], seed=seed).radius > 0.0 for seed in range(runs))
    assert false <= 9  # Binomial(60, .05) exceeds it with probability 1e-3
