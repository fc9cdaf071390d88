"""Coverage by simulation on encoders whose true radius is known, most of them extremal, so that slack hides nothing."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from robustvlm.certify import vote_radius
from robustvlm.certify.bands import ell_band
from robustvlm.certify.classes import ClassTest, class_margin_radius
from robustvlm.certify.feature import PredictableDirection, norm_lower_bound, required_norm, vector_radius
from robustvlm.certify.shapes import cdf_lower, layer_cake
from robustvlm.certify.tangent import TangentTest

RUNS = [pytest.param(120, id="light"), pytest.param(1500, id="heavy", marks=pytest.mark.slow)]
ALPHA = 0.1


def assert_covered(invalid: int, runs: int, alpha: float = ALPHA) -> None:
    """Fail if so many violations would be a one in ten thousand event at the stated alpha."""
    assert invalid <= binom.ppf(0.9999, runs, alpha)


def extremal_encoder(r: float, a: float, theta: float) -> Callable[[np.ndarray], np.ndarray]:
    """The sphere-valued encoder that attains T4: unit features of the noise's shift coordinate, angle theta at a."""
    t = np.arange(-9.0, 14.0, 0.01)
    weights = np.exp(-t * t / 2) * 0.01 / np.sqrt(2 * np.pi)

    def vectors(x: np.ndarray, at: np.ndarray) -> np.ndarray:
        ratio = np.exp(a * at - a * a / 2)
        return np.stack([x[0] - ratio * np.sin(theta), ratio * np.cos(theta) - x[1]], axis=-1)

    def value(x: np.ndarray) -> float:
        return float(weights @ np.linalg.norm(vectors(x, t), axis=1) - x[0] * r) if x[0] >= 0 else 1e9

    best = minimize(value, (1.0, 0.5), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 2000}).x

    def encode(at: np.ndarray) -> np.ndarray:
        field = vectors(best, at)
        return np.asarray(field / np.linalg.norm(field, axis=1, keepdims=True))

    return encode


@pytest.mark.parametrize("runs", RUNS)
def test_feature_certificates_hold_for_the_extremal_encoder(runs: int) -> None:
    radius = vector_radius(0.7, 0.5, 1.0)
    encode, rng = extremal_encoder(0.7, radius, np.pi / 3), np.random.default_rng(0)
    norms = [
        norm_lower_bound(PredictableDirection(2).scores(encode(rng.standard_normal(400))), ALPHA) for _ in range(runs)
    ]
    just_beyond = required_norm(0.5, radius + 1e-6)  # a norm bound that reaches this certifies too large a radius
    assert_covered(sum(norm >= just_beyond for norm in norms), runs)
    assert vector_radius(float(np.median(norms)), 0.5, 1.0) > 0.7 * radius  # and not by being vacuous


LAWS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], np.ndarray, np.ndarray]] = {
    "bernoulli": (lambda rng, n: (rng.random(n) < 0.85).astype(float), np.array([1.0]), np.array([0.85])),
    "two levels": (
        lambda rng, n: np.where(rng.random(n) < 0.9, 0.95, 0.2),
        np.array([0.2, 0.95]),
        np.array([1.0, 0.9]),
    ),
    "ramp": (
        lambda rng, n: ndtr(1.2 + 0.5 * rng.standard_normal(n)),
        np.linspace(0.0, 1.0, 20_001)[1:-1],
        ndtr((1.2 - ndtri(np.linspace(0.0, 1.0, 20_001)[1:-1])) / 0.5),
    ),
}


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("law", LAWS)
def test_distribution_bounds_hold_for_all_shifts_at_once(law: str, runs: int) -> None:
    draw, levels, survival = LAWS[law]
    shifts, band, rng = np.array([0.0, 0.3, 0.8, 1.5, 3.0]), ell_band(200, ALPHA), np.random.default_rng(1)
    truth = layer_cake(levels, survival, shifts) + (1e-4 if law == "ramp" else 1e-12)  # the ramp's is a lower sum
    invalid = sum(bool((cdf_lower(draw(rng, 200), shifts, band) > truth).any()) for _ in range(runs))
    assert_covered(invalid, runs)


@pytest.mark.parametrize("runs", [pytest.param(50, id="light"), pytest.param(600, id="heavy", marks=pytest.mark.slow)])
def test_tangent_radii_hold_for_the_probit_ramp(runs: int) -> None:
    true, rng, grid = 0.89180, np.random.default_rng(2), np.arange(0.1, 2.0, 0.1)

    def draw(n: int) -> np.ndarray:
        return np.asarray(ndtr(1.2 + 0.5 * rng.standard_normal(n)))

    def reached() -> float:
        """Test an increasing grid in turn: the nulls are nested, so no correction is needed (fixed sequence)."""
        pilot, scores, last = draw(100), draw(300), 0.0
        for a in grid.tolist():
            test = TangentTest(pilot, a=a, target=0.75, alpha=ALPHA)
            test.update(scores)
            if not test.certified.all():
                break
            last = a
        return last

    radii = [reached() for _ in range(runs)]
    assert_covered(sum(radius > true for radius in radii), runs)
    assert np.median(radii) > 0.4


TEXT = np.eye(2)


def half_space_features(rng: np.random.Generator, n: int, b: float) -> np.ndarray:
    """The first class's embedding where the noise is below b, else the second's: the class radius is exactly b."""
    return TEXT[(rng.standard_normal(n) > b).astype(int)]


@pytest.mark.parametrize("runs", RUNS)
def test_class_and_vote_radii_hold_for_the_half_space_encoder(runs: int) -> None:
    b, rng, band = 0.8, np.random.default_rng(3), ell_band(200, ALPHA)
    margins, votes = [], []
    for _ in range(runs):
        rows = half_space_features(rng, 200, b)
        margins.append(class_margin_radius(rows, TEXT, 0, 1.0, band))
        votes.append(vote_radius(int(rows[:, 0].sum()), 200, 1.0, ALPHA))
    assert_covered(sum(radius > b for radius in margins), runs)
    assert_covered(sum(radius > b for radius in votes), runs)
    assert min(np.median(margins), np.median(votes)) > 0.4


@pytest.mark.parametrize("runs", [pytest.param(40, id="light"), pytest.param(600, id="heavy", marks=pytest.mark.slow)])
def test_early_stopped_class_claims_just_beyond_the_truth_are_rare(runs: int) -> None:
    b, rng = 0.8, np.random.default_rng(4)
    false = 0
    for _ in range(runs):
        test = ClassTest(half_space_features(rng, 100, b), TEXT, 0, a=b + 1e-3, alpha=ALPHA)
        for _ in range(20):
            test.update(half_space_features(rng, 25, b))
        false += test.decision == "certified"
    assert_covered(false, runs)


@pytest.mark.parametrize("runs", RUNS)
def test_the_minimum_over_many_rivals_needs_no_correction(runs: int) -> None:
    """Forty rivals, all exactly on the boundary: the smallest of 40 lower bounds is above the truth rarely."""
    rng, text = np.random.default_rng(5), np.vstack([np.zeros(40), np.eye(40)])
    text[0, :] = 1.0
    band, false = ell_band(100, ALPHA), 0
    for _ in range(runs):
        rows = rng.standard_normal((100, 40))  # symmetric: every margin's mean is exactly zero
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        false += class_margin_radius(rows, text, 0, 1.0, band) > 0.0
    assert_covered(false, runs)
