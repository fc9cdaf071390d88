"""The cosine from angles and mean at one alpha (T20): its inequality, encoders that attain it, coverage, and faults."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from robustvlm.certify.angles import (
    JointEvidence,
    JointPilot,
    angle_scores,
    angle_target,
    best_joint_shift,
    joint_shift,
    turn_upper,
)
from robustvlm.certify.claims.base import Materials
from robustvlm.certify.claims.joint import JOINT, JointRadius
from robustvlm.certify.deployed import deployed_feature_radius
from robustvlm.certify.shapes import layer_cake
from robustvlm.errors import UserError

RUNS = [pytest.param(200, id="light"), pytest.param(10_000, id="heavy", marks=pytest.mark.slow)]


def at(angle: float, dim: int = 2) -> np.ndarray:
    """The unit vector at an angle to the first axis, in the plane of the first two."""
    row = np.zeros(dim)
    row[:2] = np.cos(angle), np.sin(angle)
    return row


class Steps:
    """An encoder that looks at one coordinate t of the noise: unit vectors with given shares, in the order of t.

    Its smoothed feature under a shift by a along t is known exactly, and no encoder with the same shares turns further
    where the vectors stand in the order of the bound.
    """

    def __init__(self, shares: list[float], rows: list[np.ndarray]) -> None:
        self.edges = norm.ppf(np.cumsum(shares)[:-1])
        self.rows = np.stack(rows)

    def mean(self, a: float) -> np.ndarray:
        inside = np.diff(norm.cdf(self.edges - a), prepend=0.0, append=1.0)
        return np.asarray(inside @ self.rows)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return self.rows[np.searchsorted(self.edges, rng.standard_normal(n))]

    def true_shift(self, cos0: float) -> float:
        """The first shift, either way, at which the cosine to the smoothed feature at the image is below cos0."""
        here = self.mean(0.0) / np.linalg.norm(self.mean(0.0))
        for a in np.arange(0.0, 8.0, 0.002):
            for there in (self.mean(a), self.mean(-a)):
                if there @ here < cos0 * np.linalg.norm(there):
                    return float(a)
        return 8.0


def half_turned(share: float, angle: float) -> Steps:
    """Most features along u, the others where they turn the mean most: at a right angle to its limit."""
    return Steps([1.0 - share, share], [at(0.0), at(angle + np.pi / 2)])


@given(seed=st.integers(0, 2**32 - 1), theta=st.floats(0.01, np.pi / 2), length=st.floats(0.0, 1.0))
@settings(max_examples=200, deadline=None)
def test_no_direction_sideways_gives_a_feature_more_than_its_angle_does(seed: int, theta: float, length: float) -> None:
    rng = np.random.default_rng(seed)
    f, u, w = rng.standard_normal((3, 4))
    u /= np.linalg.norm(u)
    w -= (w @ u) * u
    w /= np.linalg.norm(w)
    f *= length / np.linalg.norm(f)
    n = -np.sin(theta) * u + np.cos(theta) * w
    assert (1.0 - f @ n) / (1.0 + np.sin(theta)) >= angle_scores([f @ u], theta)[0] - 1e-12


@pytest.mark.parametrize(("share", "theta"), [(0.01, np.pi / 3), (0.2, np.pi / 3), (0.05, 0.4), (0.1, np.pi / 2)])
def test_an_encoder_attains_the_bound(share: float, theta: float) -> None:
    encoder = half_turned(share, theta)
    scores = angle_scores(encoder.rows @ at(0.0), theta)
    levels, survival = np.sort(scores), np.array([1.0, 1.0 - share])
    shifts = np.arange(0.0, 6.0, 0.001)
    kept = layer_cake(levels, survival, shifts) > angle_target(theta)
    turned = np.array([np.arctan2(*encoder.mean(a)[::-1]) for a in shifts])
    assert (turned[kept] < theta).all()
    assert shifts[kept].max() == pytest.approx(shifts[turned < theta].max(), abs=0.002)


ENCODERS = {
    "half turned": (half_turned(0.08, np.pi / 3), 0.5),
    "to a small angle": (half_turned(0.03, 0.4), np.cos(0.4)),
    "opposite": (Steps([0.9, 0.1], [at(0.0), at(np.pi)]), 0.5),
    "three levels": (Steps([0.5, 0.4, 0.1], [at(0.0), at(0.5), at(2.4)]), 0.6),
    "both ways": (Steps([0.05, 0.9, 0.05], [at(-2.6), at(0.0), at(2.6)]), 0.5),
    "mean alone": (Steps([0.5, 0.5], [at(-1.1), at(1.1)]), 0.5),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("runs", RUNS)
def test_a_false_shift_is_certified_no_oftener_than_alpha(name: str, runs: int) -> None:
    """At the first shift where the claim is false, which every larger radius must pass: known truth, a large alpha."""
    encoder, cos0 = ENCODERS[name]
    truth, alpha, n, pilot = encoder.true_shift(cos0), 0.2, 120, 20
    rng, false = np.random.default_rng(11), 0
    for _ in range(runs):
        chosen = JointPilot(encoder.draw(rng, pilot), cos0=cos0, n=n, alpha=alpha)
        false += JointEvidence(chosen, encoder.draw(rng, n)).holds(truth)
    assert binom.sf(false - 1, runs, alpha) > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
def test_radii_come_near_the_truth_and_not_beyond(name: str) -> None:
    encoder, cos0 = ENCODERS[name]
    truth, rng = encoder.true_shift(cos0), np.random.default_rng(12)
    found = np.array([_radius(encoder.draw(rng, 2100), cos0, 0.01, 100) for _ in range(3)])
    assert (found <= truth).all()
    assert found.min() > {"mean alone": 0.0, "both ways": 0.5}.get(name, 0.55) * truth


def _radius(rows: np.ndarray, cos0: float, alpha: float, pilot: int) -> float:
    return joint_shift(JointPilot(rows[:pilot], cos0=cos0, n=len(rows) - pilot, alpha=alpha), rows[pilot:])


@pytest.mark.parametrize("factor", [1.15, 1.3])
def test_the_simulation_notices_a_test_at_a_smaller_shift(factor: float) -> None:
    """Bets made for a shift that is 15 % or 30 % too small, as a fault in the radius would have it."""
    encoder, alpha = half_turned(0.1, np.pi / 3), 0.2
    truth, rng, false = encoder.true_shift(0.5), np.random.default_rng(12), 0
    for _ in range(60):
        chosen = JointPilot(encoder.draw(rng, 200), cos0=0.5, n=4000, alpha=alpha)
        false += JointEvidence(chosen, encoder.draw(rng, 4000)).holds(truth / factor)
    assert binom.sf(false - 1, 60, alpha) < 1e-6


def test_a_direction_that_the_samples_do_not_confirm_is_not_used() -> None:
    """Then the mean along a direction that looks back decides alone, and less is certified."""
    rng = np.random.default_rng(13)
    rows = np.eye(32)[0] + 0.05 * rng.standard_normal((2000, 32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    other = np.eye(32)[0] + 0.4 * np.eye(32)[1] + 0.01 * rng.standard_normal((50, 32))
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    right, wrong = (JointPilot(first, cos0=0.5, n=2000, alpha=0.001) for first in (rows[:50], other))
    assert wrong.turn < turn_upper(rows, wrong.direction, 0.001)
    assert 0.0 < joint_shift(wrong, rows) < joint_shift(right, rows) - 0.3


@pytest.mark.parametrize("runs", [pytest.param(30, id="light"), pytest.param(1500, id="heavy", marks=pytest.mark.slow)])
def test_the_turn_is_bounded_in_high_dimension(runs: int) -> None:
    rng, dim, false = np.random.default_rng(14), 128, 0
    truth = 0.15
    for _ in range(runs):
        side = rng.standard_normal((200, dim)) * np.geomspace(3.0, 0.1, dim)
        side -= np.outer(side @ at(truth, dim), at(truth, dim))
        side *= 0.5 / np.linalg.norm(side, axis=1, keepdims=True)
        rows = np.sqrt(0.75) * at(truth, dim) + np.where(rng.random((200, 1)) < 0.5, side, -side)
        false += turn_upper(rows, np.eye(dim)[0], 0.1) < truth
    assert binom.sf(false - 1, runs, 0.1) > 1e-3


def test_features_close_together_are_certified_further_than_by_their_mean() -> None:
    rng = np.random.default_rng(15)
    rows = np.eye(64)[0] + 0.05 * rng.standard_normal((2000, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    certifier = JointRadius(cos0=0.5, sigma=1.0, alpha=0.001, n=2000, n_pilot=100)
    certifier.take(rows[:100])
    certifier.take(rows[100:])
    found = certifier.finding()
    assert found.radius > 1.2 * found.columns["norm_radius"]
    assert found.radius <= best_joint_shift(1900, 0.001, 0.5)
    assert found.r is not None
    assert found.r < np.linalg.norm(rows[100:].mean(axis=0))


@pytest.mark.parametrize("seed", [1, 7, 11])
def test_a_pilot_that_hoped_too_much_costs_no_more_than_the_bound_of_the_norm(seed: int) -> None:
    """It met none of the few features that point backwards, and the first shift to fail is a coarse one."""
    rng = np.random.default_rng(seed)
    rows = np.eye(8)[0] + 0.02 * rng.standard_normal((1000, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[50:] *= np.where(rng.random((950, 1)) < 0.03, -1.0, 1.0)
    certifier = JointRadius(cos0=0.5, sigma=1.0, alpha=0.001, n=1000, n_pilot=50)
    certifier.take(rows[:50])
    certifier.take(rows[50:])
    found = certifier.finding()
    assert found.r is not None
    assert found.radius > _radius(rows, 0.5, 0.001, 50)
    assert found.radius > 0.95 * found.columns["norm_radius"]
    # A certificate refuses finitely many copies that keep more than the ideal model does.
    assert deployed_feature_radius(found.r, 0.5, 1.0, 1_000_000, 0.001) <= found.radius


def test_features_that_cannot_all_be_kept_are_refused_beforehand() -> None:
    asked = SimpleNamespace(sigma=0.25, samples=10_000, n_pilot=500, alpha=0.001, min_cos=0.5, radius=None)
    assert JOINT.plan(asked, Materials(width=20_000)).theorem == "T20"
    with pytest.raises(UserError, match="of 2,359,296 numbers are too many: pass claim=feature"):
        JOINT.plan(asked, Materials(width=576 * 4096))


def test_failed_copies_count_as_the_worst() -> None:
    rows = np.tile([at(0.2), at(-0.2)], (500, 1))
    lost, turned = rows.copy(), rows.copy()
    lost[60:80], turned[60:80] = np.nan, at(np.pi)
    radius = partial(_radius, cos0=0.5, alpha=0.001, pilot=50)
    assert radius(lost) <= radius(turned) + 0.02  # failed ones do not move the direction
    assert radius(turned) < radius(rows)
    assert radius(np.full((100, 2), np.nan)) == 0.0


def test_what_was_planned_is_what_is_judged() -> None:
    pilot = JointPilot([at(0.1)] * 20, cos0=0.5, n=50, alpha=0.01)
    with pytest.raises(UserError, match="made for 50 samples, got 49"):
        joint_shift(pilot, [at(0.1)] * 49)
    with pytest.raises(UserError, match="pilot"):
        JointRadius(cos0=0.5, sigma=1.0, alpha=0.001, n=100, n_pilot=1)
