"""Coverage by simulation in high dimension: norms, directions and sideways parts without a dimension factor."""

import numpy as np
import pytest
from scipy.stats import binom

from robustvlm.certify.classes import mean_ball
from robustvlm.certify.feature import PredictableDirection, norm_lower_bound
from robustvlm.certify.means import betting_lower
from robustvlm.certify.shapes import eigenvalue_upper, sideways

RUNS = [pytest.param(120, id="light"), pytest.param(1500, id="heavy", marks=pytest.mark.slow)]
ALPHA = 0.1


def assert_covered(invalid: int, runs: int, alpha: float = ALPHA) -> None:
    """Fail if so many violations would be a one in ten thousand event at the stated alpha."""
    assert invalid <= binom.ppf(0.9999, runs, alpha)


def far_from_a_direction(rng: np.random.Generator, n: int, r: float, dim: int) -> np.ndarray:
    rows = rng.standard_normal((n, dim))
    rows[:, 0] = 0.0
    rows *= np.sqrt(1.0 - r * r) / np.linalg.norm(rows, axis=1, keepdims=True)
    rows[:, 0] = r
    return rows


@pytest.mark.parametrize("runs", [pytest.param(25, id="light"), pytest.param(400, id="heavy", marks=pytest.mark.slow)])
def test_looking_back_is_sound_where_the_same_samples_direction_is_not(runs: int) -> None:
    r, rng = 0.05, np.random.default_rng(6)
    naive = honest = 0
    for _ in range(runs):
        rows = far_from_a_direction(rng, 300, r, 512)
        mean = rows.mean(axis=0)
        naive += float(betting_lower(0.5 * (1.0 + rows @ (mean / np.linalg.norm(mean))), 0.05)) > (1.0 + r) / 2.0
        honest += norm_lower_bound(PredictableDirection(512).scores(rows), 0.05) > r
    assert naive > 0.9 * runs
    assert_covered(honest, runs, 0.05)


@pytest.mark.parametrize("runs", RUNS)
def test_norm_and_sideways_bounds_hold_without_a_dimension_factor(runs: int) -> None:
    rng, dim, eta, n = np.random.default_rng(7), 64, 0.3, 150
    invalid = np.zeros(3)
    for _ in range(runs):
        side = rng.standard_normal((n, dim - 2))
        side *= 0.4 / np.linalg.norm(side, axis=1, keepdims=True)
        across = np.where(
            rng.random(n) < 0.5, eta + 0.2, eta - 0.2
        )  # mean eta, second moment eta^2 + .04 along one axis
        forward = np.sqrt(1.0 - 0.16 - across**2)
        rows = np.column_stack([forward, across, side])
        bounds = sideways(rows, np.eye(dim)[0], ALPHA)
        mean = np.array([np.sqrt(0.84 - 0.25), np.sqrt(0.84 - 0.01)]).mean()
        truth = np.zeros(dim)
        truth[:2] = mean, eta
        top = float(np.linalg.eigvalsh(rows[:, 1:].T @ rows[:, 1:] / n)[-1])
        invalid += [
            bounds.eta < eta or bounds.lam < eta**2 + 0.04,
            np.linalg.norm(rows.mean(axis=0) - truth) > mean_ball(n, ALPHA),
            eigenvalue_upper(top, n, ALPHA) < eta**2 + 0.04,
        ]
    for count in invalid:
        assert_covered(int(count), runs)
