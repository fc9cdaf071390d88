"""Deployed radii and cosines of single claims: against formulas of their own, and against draws of a known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import rel_entr
from scipy.stats import beta, binom, norm

from robustvlm.certify import VoteRadius, deployed_feature_cos
from robustvlm.certify.claims.recall import RecallRadius
from robustvlm.certify.deployed import _by_angle, answered_share_needed, class_margin_needed, vote_share_needed

SIGMA, ALPHA, N = 0.25, 0.01, 400
SIDES = np.sqrt(0.5) * np.array([[1.0, -1.0], [-1.0, 1.0]])
"""Features whose margin to the rival is 1 and -1."""


def taken(certifier: VoteRadius | RecallRadius, count: int, pilot: int = 20) -> tuple[float, float]:
    """Return the radii, ideal and deployed, with `count` of N estimation samples on the label's side."""
    certifier.take(np.repeat(SIDES[:1], pilot, axis=0))
    certifier.take(np.repeat(SIDES, [count, N - count], axis=0))
    found = certifier.finding()
    return found.radius, found.columns["deployed_radius"]


@pytest.mark.parametrize("count", [395, 370, 320])
@pytest.mark.parametrize(("n0", "abstains_at"), [(100, None), (1001, None), (100, 0.001), (500, 0.05)])
def test_deployed_votes_need_a_larger_share(count: int, n0: int, abstains_at: float | None) -> None:
    certifier = VoteRadius(
        text=np.eye(2), sigma=SIGMA, alpha=ALPHA, n=N + 20, n_pilot=20, deployed=n0, abstains_at=abstains_at
    )
    share = vote_share_needed(n0, ALPHA)
    assert binom.cdf(n0 // 2, n0, share) == pytest.approx(ALPHA, rel=1e-6)  # at most half of the fresh votes
    if abstains_at is not None:
        share = answered_share_needed(n0, abstains_at, ALPHA)
    lower = beta.ppf(ALPHA, count, N - count + 1)  # Clopper and Pearson
    ideal, deployed = taken(certifier, count)
    assert ideal == pytest.approx(SIGMA * norm.ppf(lower), abs=1e-9)
    assert deployed == pytest.approx(max(0.0, SIGMA * (norm.ppf(lower) - norm.ppf(share))), abs=1e-9)
    assert deployed < ideal


@pytest.mark.parametrize("count", [395, 370, 320])
@pytest.mark.parametrize(("behind", "n0"), [(1, 200), (1, 1000), (3, 1000)])
def test_deployed_recall_needs_a_larger_margin(count: int, behind: int, n0: int) -> None:
    """Margins of 1 and -1 to each of the entries behind: at the shift a they lose what a half-space loses."""
    # The second entry is at the first one's side, the others, all alike, are opposite to it: k = 2 leaves them behind.
    text = np.concatenate([[[1.0, 0.0], [1.0, 0.0]], np.repeat([[0.0, 1.0]], behind, axis=0)])
    certifier = RecallRadius(text=text, k=2, own=0, sigma=SIGMA, alpha=ALPHA, n=N + 20, n_pilot=20, deployed=n0)
    ideal, deployed = taken(certifier, count)
    margin = class_margin_needed(behind, n0, ALPHA)
    assert binom.cdf(n0 // 2, n0, 0.5 * (1.0 + margin)) <= ALPHA / behind
    share = norm.cdf(ideal / SIGMA)  # of samples on the label's side, bounded from below
    assert 0.5 < share < count / N
    assert deployed == pytest.approx(max(0.0, ideal - SIGMA * norm.ppf(0.5 * (1.0 + margin))), abs=1e-6)
    assert deployed < ideal


# Features: the mean of n0 fresh samples at x', which the ball around m(x') holds


@pytest.mark.parametrize(("cosine", "norm_", "n0"), [(0.9, 0.8, 1000), (0.5, 0.95, 4000), (0.99, 0.4, 300)])
def test_an_angle_is_widened_by_all_that_the_ball_turns_it(cosine: float, norm_: float, n0: int) -> None:
    ball = np.sqrt((1.0 - norm_**2) / n0) + np.sqrt(2.0 * np.log(1.0 / ALPHA) / n0)
    found = np.arccos(_by_angle(np.array(cosine), np.array(norm_), n0, ALPHA))
    # The tangent from the origin to the ball around m(x'): a right triangle with the ball's radius across the angle.
    assert found == pytest.approx(np.arccos(cosine) + np.arcsin(ball / norm_), abs=1e-9)


def turned(share: float, angle: float, a: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how many features point along u and how many are turned by an angle, at the shift a; and both, [2, 2]."""
    away = norm.sf(norm.isf(share) - a)
    return np.array([1.0 - away, away]), np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])


@pytest.mark.parametrize("n0", [4, 20, 500, 20_000])
@pytest.mark.parametrize(
    ("share", "angle", "a"), [(0.1, 2.4, 0.3), (0.005, 2.8, 0.6), (0.1, 2.8, 0.6), (0.1, np.pi, 1.5), (0.1, 2.2, 1.0)]
)
def test_the_deployed_cosine_is_missed_no_oftener_than_stated(share: float, angle: float, a: float, n0: int) -> None:
    """Known smoothed features at the image and at a shift: the probability of a smaller cosine, exactly."""
    alpha0 = 0.1
    here, rows = turned(share, angle, 0.0)
    there, _ = turned(share, angle, a)
    centre, counts = here @ rows, np.arange(n0 + 1)
    length = float(np.linalg.norm(centre))
    kept = float(deployed_feature_cos(length, a, n0, alpha0))
    means = np.stack([n0 - counts, counts], axis=1) @ rows / n0
    lost = means @ centre < kept * length * np.linalg.norm(means, axis=1) - 1e-12
    assert binom.pmf(counts, n0, there[1])[lost].sum() <= alpha0


@pytest.mark.parametrize(("length", "a", "n0"), [(0.9, 0.5, 20), (0.99, 1.0, 20), (0.7, 0.2, 40)])
def test_few_samples_keep_what_chernoff_leaves_of_half_the_level(length: float, a: float, n0: int) -> None:
    kept = float(deployed_feature_cos(length, a, n0, ALPHA))
    q, z = norm.cdf(norm.ppf(0.5 * (1.0 + length)) - a), 0.5 * (1.0 + kept)
    assert 0.5 < z < q
    assert n0 * (rel_entr(z, q) + rel_entr(1.0 - z, 1.0 - q)) == pytest.approx(np.log(2.0 / ALPHA), rel=1e-6)
