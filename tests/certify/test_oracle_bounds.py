"""Printed values for the confidence bounds, the distribution certificate and T7, T10 (oracles O6, O7, O9, O10)."""

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from robustvlm.certify.bands import calibrate, crossing_prob, ell_band
from robustvlm.certify.classes import mean_ball
from robustvlm.certify.deployed import deployed_cos
from robustvlm.certify.feature import fcsb_radius
from robustvlm.certify.limits import best_class_radius
from robustvlm.certify.means import (
    BettingState,
    betting_lower,
    clopper_pearson_lower,
    hoeffding_lower,
    kl_lower_mean,
    kl_upper_mean,
    mean_lower,
)
from robustvlm.certify.normal import shift_down
from robustvlm.certify.shapes import hcr_drift, layer_cake


@pytest.mark.parametrize(
    ("kappa", "b", "mean", "shifted", "fcsb", "cdf"),
    [
        (1.0, 1.5, 0.855578, 0.760250, 0.38617, 0.54613),
        (0.5, 1.2, 0.858435, 0.802256, 0.39882, 0.89180),
        (0.25, 1.0, 0.834012, 0.802024, 0.29565, 1.21901),
    ],
)
def test_o6_probit_ramp(kappa: float, b: float, mean: float, shifted: float, fcsb: float, cdf: float) -> None:
    q = np.sqrt(1.0 + kappa**2)
    levels = np.linspace(0.0, 1.0, 1_000_001)[1:]
    survival = ndtr((b - ndtri(levels)) / kappa)  # P(Phi(b + kappa t) > level)
    assert ndtr(b / q) == pytest.approx(mean, abs=5e-7)
    assert float(layer_cake(levels, survival, 0.5)) == pytest.approx(shifted, abs=2e-6)
    assert float(layer_cake(levels, survival, 0.5)) <= ndtr((b - kappa * 0.5) / q) + 1e-9  # a lower sum
    assert float(fcsb_radius(ndtr(b / q), 0.5, 1.0)) == pytest.approx(fcsb, abs=5e-6)
    assert float(layer_cake(levels, survival, cdf)) == pytest.approx(0.75, abs=5e-6)
    assert cdf / fcsb == pytest.approx(q / kappa, abs=1e-4)


def test_o7_two_levels() -> None:
    assert float(layer_cake([0.2, 0.95], [1.0, 0.9], 0.0)) == pytest.approx(0.875)
    assert float(layer_cake([0.2, 0.95], [1.0, 0.9], 0.5)) == pytest.approx(0.787071, abs=5e-7)
    assert float(shift_down(0.875, 0.5)) == pytest.approx(0.742267, abs=5e-7)


def test_o9_lower_bounds() -> None:
    alpha, n = 0.001, 10_000
    assert float(hoeffding_lower(np.full(n, 0.9), alpha)) == pytest.approx(0.881415, abs=5e-7)
    exact = [float(clopper_pearson_lower(k, n, alpha)) for k in (9_900, 10_000, 9_000)]
    assert exact == pytest.approx([0.986531, 0.999309, 0.890410], abs=5e-7)
    assert float(kl_lower_mean(0.9, n, alpha)) == pytest.approx(0.888482, abs=5e-7)
    assert float(kl_upper_mean(0.02, n, alpha)) == pytest.approx(0.025653, abs=5e-7)
    mixed = np.array([0.9, 0.7, 1.0, 0.8] * 250)
    assert float(betting_lower(mixed, alpha)) == pytest.approx(0.835193, abs=5e-7)
    assert float(mean_lower(mixed, alpha, bound="bernstein")) == pytest.approx(0.818455, abs=5e-7)
    assert float(betting_lower(np.full(100, 0.9), alpha)) == pytest.approx(0.821438, abs=5e-7)
    assert float(betting_lower(np.full(1000, 0.9), alpha)) == pytest.approx(0.891808, abs=5e-7)


def test_o10_covariance_drift() -> None:
    assert float(hcr_drift(0.02, 1.0)) == pytest.approx(0.18538, abs=5e-6)


def test_o10_wealth_at_the_true_mean_rarely_crosses() -> None:
    rng = np.random.default_rng(0)
    for law in (rng.beta(0.5, 0.5, (300, 4000)), (rng.random((300, 4000)) < 0.85).astype(float)):
        mean = 0.5 if law.max() < 1.0 else 0.85
        state = BettingState(np.full(4000, mean))
        for start in range(0, 300, 10):
            state.update(law[start : start + 10])
        for alpha in (0.1, 0.05, 0.01, 0.001):
            assert state.rejected(alpha).mean() <= alpha


def test_printed_calibration_levels() -> None:
    # The design's levels are conservative to a relative 2e-4; the crossing probability decides.
    assert calibrate(1000, 0.001) == pytest.approx(1.4314e-5, rel=3e-4)
    assert crossing_prob(10_000, 8.787e-6) == pytest.approx(0.001, rel=4e-4)
    top = ell_band(10_000, 0.001).lower[0]
    assert top == pytest.approx(0.99884, abs=5e-6)
    assert best_class_radius(10_000, 0.001, 1.0) == pytest.approx(ndtri(top), abs=1e-9)
    assert ndtri(top) == pytest.approx(3.05, abs=6e-3)


def test_printed_deployed_cosines_and_ball() -> None:
    found = [float(deployed_cos(0.5, n0, 0.001)) for n0 in (16, 32, 64, 128, 256, 1000, 10_000)]
    assert found == pytest.approx([-1.0, -1.0, 0.070, 0.200, 0.291, 0.396, 0.468], abs=6e-4)
    assert mean_ball(10_000, 0.001) == pytest.approx(0.047, abs=5e-4)
