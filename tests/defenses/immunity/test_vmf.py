"""The vMF log-normaliser against mpmath, its integral, and the estimate of kappa against sampled data."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.stats import vonmises_fisher

from robustvlm.defenses.immunity.prototypes import concentration, log_normaliser, mean_resultant
from robustvlm.errors import UserError


def exact(kappa: float, dim: int) -> float:
    with mpmath.workdps(50):
        order = mpmath.mpf(dim) / 2 - 1
        bessel = mpmath.log(mpmath.besseli(order, mpmath.mpf(kappa)))
        return float(order * mpmath.log(kappa) - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi) - bessel)


@pytest.mark.parametrize("dim", [2, 3, 16, 41, 42, 43, 192, 512, 1024, 4096])
@pytest.mark.parametrize("kappa", [1e-6, 1e-2, 1.0, 37.0, 1e3, 1e6])
def test_log_normaliser_agrees_with_mpmath(dim: int, kappa: float) -> None:
    assert float(log_normaliser(kappa, dim)) == pytest.approx(exact(kappa, dim), rel=1e-12, abs=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 600), st.floats(-6, 6))
def test_log_normaliser_agrees_anywhere(dim: int, power: float) -> None:
    assert float(log_normaliser(10**power, dim)) == pytest.approx(exact(10**power, dim), rel=1e-11, abs=1e-9)


def test_density_integrates_to_one_on_the_circle_and_the_sphere() -> None:
    angles = np.linspace(0, np.pi, 20_001)
    for dim, area in ((2, np.full_like(angles, 2.0)), (3, 2 * np.pi * np.sin(angles))):
        density = np.exp(log_normaliser(5.0, dim) + 5.0 * np.cos(angles))
        assert trapezoid(density * area, angles) == pytest.approx(1.0, abs=1e-6)


def test_normaliser_has_the_slope_of_the_mean_resultant() -> None:
    # d log C / d kappa = -A_D(kappa), the mean resultant length: 1 / tanh(kappa) - 1 / kappa in three dimensions.
    step = 1e-4
    slope = (log_normaliser(5.0 + step, 3) - log_normaliser(5.0 - step, 3)) / (2 * step)
    assert float(slope) == pytest.approx(-(1 / np.tanh(5.0) - 1 / 5.0), abs=1e-7)


def test_continuous_across_the_change_of_method() -> None:
    below, above = (float(log_normaliser(3.0, dim)) for dim in (41, 43))
    middle = float(log_normaliser(3.0, 42))
    assert abs(middle - 0.5 * (below + above)) < 0.1


@pytest.mark.parametrize(("dim", "kappa"), [(8, 20.0), (64, 200.0)])
def test_estimate_finds_the_concentration_of_sampled_data(dim: int, kappa: float) -> None:
    mean = np.eye(dim)[0]
    rows = vonmises_fisher(mean, kappa).rvs(4000, random_state=np.random.default_rng(0))
    assert float(concentration(np.linalg.norm(rows.mean(axis=0)), dim)) == pytest.approx(kappa, rel=0.05)


def test_few_images_do_not_look_more_concentrated() -> None:
    rng = np.random.default_rng(1)
    law = vonmises_fisher(np.eye(16)[0], 30.0)
    lengths = [np.linalg.norm(law.rvs(4, random_state=rng).mean(axis=0)) for _ in range(400)]
    true = np.linalg.norm(law.rvs(20_000, random_state=rng).mean(axis=0))
    corrected = np.sqrt(np.mean([mean_resultant(length, 4) ** 2 for length in lengths]))
    assert corrected == pytest.approx(true, abs=0.02)
    assert np.mean(lengths) > true + 0.03


def test_bad_inputs() -> None:
    with pytest.raises(UserError, match="2 dimensions"):
        log_normaliser(1.0, 1)
    with pytest.raises(UserError, match="negative"):
        log_normaliser(-1.0, 3)
    with pytest.raises(UserError, match=r"\[0, 1\)"):
        concentration(1.0, 3)
    with pytest.raises(UserError, match="at least 2"):
        mean_resultant(0.5, 1)
