"""Weibull thresholds: closed form, the share of fresh images that they reject, and what little data does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import weibull_min

from robustvlm.defenses.immunity.thresholds import TailFit, fit_tail, fit_thresholds
from robustvlm.errors import UserError

LAWS = {
    "normal": lambda rng, n: 0.6 + 0.1 * rng.normal(size=n),
    "skewed": lambda rng, n: 0.9 - rng.gamma(2.0, 0.08, size=n),
    "bounded": lambda rng, n: rng.beta(6.0, 2.0, size=n),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [60, 400])
def test_fresh_known_images_are_missed_at_about_the_rate_that_was_asked_for(law: str, n: int) -> None:
    rng = np.random.default_rng(0)
    fresh = LAWS[law](rng, 100_000)
    missed = [np.mean(fresh < fit_tail(LAWS[law](rng, n)).threshold(0.05)) for _ in range(40)]
    assert 0.035 < np.mean(missed) < 0.07


def test_threshold_inverts_the_fitted_tail() -> None:
    fit = TailFit(0.5, 1.7, 0.2, 0.5, 100, 0.0, 1.0)
    for miss in (0.01, 0.05, 0.2):
        assert 0.5 * weibull_min(1.7, scale=0.2).sf(0.5 - fit.threshold(miss)) == pytest.approx(miss)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(0.1, 5))
def test_threshold_moves_and_stretches_with_the_scores(seed: int, shift: float, scale: float) -> None:
    scores = np.random.default_rng(seed).normal(size=80)
    moved = fit_tail(shift + scale * scores).threshold(0.05)
    assert moved == pytest.approx(shift + scale * fit_tail(scores).threshold(0.05), abs=1e-3 * max(1.0, scale))


def test_a_smaller_miss_gives_a_lower_threshold() -> None:
    fit = fit_tail(np.random.default_rng(0).normal(size=100))
    values = [fit.threshold(miss) for miss in (0.01, 0.05, 0.1, 0.4)]
    assert values == sorted(values)


def test_classes_with_few_images_share_one_threshold() -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0.5, 0.1, 100), rng.normal(0.9, 0.01, 5)])
    found = fit_thresholds(scores, np.repeat([0, 1], [100, 5]), 3)
    assert [item.pooled for item in found.classes] == [False, True, True]
    assert found.values[1] == found.values[2] == found.pooled.threshold(0.05)
    assert found.classes[0].fit is not None
    assert found.classes[0].fit.images == 100


def test_a_bad_fit_shows_in_its_goodness() -> None:
    rng = np.random.default_rng(0)
    good = fit_tail(rng.normal(size=1000))
    split = fit_tail(np.concatenate([rng.normal(0.0, 0.001, 300), rng.normal(1.0, 0.001, 700)]))
    assert split.distance > 3 * good.distance
    assert split.p_value < 1e-6


def test_equal_scores_and_bad_input() -> None:
    assert fit_tail(np.full(10, 0.5)).threshold(0.05) == 0.5
    with pytest.raises(UserError, match="at least 2"):
        fit_tail([0.5])
    with pytest.raises(UserError, match="finite"):
        fit_tail([0.5, np.nan])
    with pytest.raises(UserError, match="--miss must lie"):
        fit_tail(np.arange(10.0)).threshold(0.6)
    with pytest.raises(UserError, match="--held-out"):
        fit_thresholds([0.5], [0], 1)
