"""Metrics and their intervals: definitions by hand, invariances, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.stats import norm

from robustvlm.detect import Bootstrap, auroc, auroc_interval, difference, threshold_at_tpr
from robustvlm.detect.metrics import METRICS, all_metrics, average_precision, fpr_at_tpr, roc_points, weighted_metrics
from robustvlm.errors import UserError

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


@given(SCORES, SCORES)
@settings(max_examples=150, deadline=None)
def test_definitions_by_counting(known: list[float], unknown: list[float]) -> None:
    """Whole numbers as scores, so that ties are the rule."""
    pairs = [(a > b) + 0.5 * (a == b) for a in known for b in unknown]
    assert auroc(known, unknown) == pytest.approx(sum(pairs) / len(pairs))
    thresholds = sorted(set(known + unknown), reverse=True)
    enough = next(t for t in thresholds if sum(a >= t for a in known) >= 0.95 * len(known) - 1e-9)
    assert fpr_at_tpr(known, unknown) == pytest.approx(sum(b >= enough for b in unknown) / len(unknown))
    assert all_metrics(known, unknown).fpr95[0] == pytest.approx(fpr_at_tpr(known, unknown))
    area, recall = 0.0, 0.0
    for t in thresholds:
        hits, alarms = sum(a >= t for a in known), sum(b >= t for b in unknown)
        area += (hits / len(known) - recall) * hits / (hits + alarms)
        recall = hits / len(known)
    assert average_precision(known, unknown) == pytest.approx(area)
    assert all_metrics(known, unknown).aupr_out[0] == pytest.approx(
        average_precision([-b for b in unknown], [-a for a in known])
    )


@given(SCORES, SCORES)
@settings(max_examples=50, deadline=None)
def test_monotone_maps_and_signs(known: list[float], unknown: list[float]) -> None:
    before = all_metrics(known, unknown)
    after = all_metrics([math.exp(a) for a in known], [math.exp(b) for b in unknown])
    for name in METRICS:
        assert getattr(before, name)[0] == pytest.approx(getattr(after, name)[0])
    assert auroc([-a for a in known], [-b for b in unknown]) == pytest.approx(1 - before.auroc[0])
    false, true = roc_points(known, unknown)
    assert trapezoid(true, false) == pytest.approx(before.auroc[0])


def test_weights_are_repetitions() -> None:
    known, unknown = np.array([3.0, 2.0, 2.0, 0.0]), np.array([2.0, 1.0])
    weights, others = np.array([[2.0, 0.0, 3.0, 1.0]]), np.array([[1.0, 2.0]])
    found = weighted_metrics(known, unknown, weights, others)
    repeated = all_metrics(np.repeat(known, [2, 0, 3, 1]), np.repeat(unknown, [1, 2]))
    for name in METRICS:
        assert getattr(found, name)[0] == pytest.approx(getattr(repeated, name)[0]), name


def test_thresholds_accept_enough() -> None:
    scores = np.arange(20.0)
    assert threshold_at_tpr(scores) == 1.0
    assert threshold_at_tpr(scores, 1.0) == 0.0
    with pytest.raises(UserError, match="true positive rate"):
        threshold_at_tpr(scores, 0.0)


def test_delongs_interval_covers() -> None:
    """Normal scores of a known AUROC: 95% intervals miss it in about 5% of the trials, also with groups of four."""
    draws = np.random.default_rng(0)
    truth = float(norm.cdf(1.0 / math.sqrt(2)))
    shared = float(norm.cdf(1.0 / math.sqrt(2 * (1 + 1.5))))
    plain = grouped = careless = 0
    trials, names = 400, [str(i // 4) for i in range(40)]
    for _ in range(trials):
        known, unknown = draws.normal(1.0, 1.0, 40), draws.normal(0.0, 1.0, 60)
        found = auroc_interval(known, unknown)
        plain += found.low <= truth <= found.high
        # Four copies of each drawing have most of their spread in common.
        known, unknown = (
            shift + np.repeat(draws.normal(0, math.sqrt(1.5), 10), 4) + draws.normal(0, 1, 40) for shift in (1.0, 0.0)
        )
        found = auroc_interval(known, unknown, known_groups=names, unknown_groups=names)
        grouped += found.low <= shared <= found.high
        found = auroc_interval(known, unknown)
        careless += found.low <= shared <= found.high
    assert 0.92 <= plain / trials <= 0.98
    assert 0.90 <= grouped / trials <= 0.98
    assert careless / trials < 0.85  # without groups the interval is much too short


def test_groups_of_one_are_no_groups() -> None:
    known, unknown = [3.0, 2.0, 2.5, 0.0], [1.0, 2.2, 0.5]
    alone = auroc_interval(known, unknown, known_groups=list("abcd"), unknown_groups=list("xyz"))
    assert alone == auroc_interval(known, unknown)


def test_complete_separation_is_not_certainty() -> None:
    found = auroc_interval([2.0] * 10, [1.0] * 30)
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx(0.025 ** (1 / 10))
    assert auroc_interval([1.0], [2.0]).high < 1.0
    # All copies of one drawing: nothing is known of drawings in general.
    one = auroc_interval([2.0] * 10, [1.0] * 30, known_groups=["a"] * 10, unknown_groups=["b"] * 30)
    assert one.low == pytest.approx(0.025)


def test_bootstrap_intervals_cover() -> None:
    draws = np.random.default_rng(1)
    truth = {"auroc": float(norm.cdf(1.0 / math.sqrt(2))), "fpr95": float(norm.sf(norm.ppf(0.05) + 1.0))}
    inside = dict.fromkeys(truth, 0)
    trials = 150
    for trial in range(trials):
        known, unknown = draws.normal(1.0, 1.0, 80), draws.normal(0.0, 1.0, 80)
        names = [str(i) for i in range(80)]
        found = Bootstrap(names, names, n_draws=200, seed=trial).intervals(known, unknown)
        for name in truth:
            inside[name] += found[name].low <= truth[name] <= found[name].high
    assert 0.90 <= inside["auroc"] / trials <= 0.99
    assert 0.88 <= inside["fpr95"] / trials <= 0.99


def test_copies_of_a_drawing_are_drawn_together() -> None:
    draws = np.random.default_rng(3)
    known, unknown = draws.normal(1.0, 1.0, 12), draws.normal(0.0, 1.0, 9)
    names = [f"drawing {i:02}" for i in range(12)]
    alone = Bootstrap(names, names[:9], n_draws=50, seed=5).draws(known, unknown)
    fourfold = Bootstrap(names * 4, names[:9] * 4, n_draws=50, seed=5)
    copied = fourfold.draws(np.tile(known, 4), np.tile(unknown, 4))
    for name in METRICS:
        assert copied[name] == pytest.approx(alone[name])
    apart = Bootstrap([str(i) for i in range(48)], [str(i) for i in range(36)], n_draws=50, seed=5)
    assert apart.draws(np.tile(known, 4), np.tile(unknown, 4))["auroc"].std() < 0.7 * alone["auroc"].std()


def test_grouped_bootstrap_intervals_cover() -> None:
    """Four copies of each drawing, with most of their spread in common."""
    draws = np.random.default_rng(4)
    truth = float(norm.cdf(1.0 / math.sqrt(2 * (1 + 1.5))))
    grouped = careless = 0
    trials, names, single = 150, [str(i // 4) for i in range(80)], [str(i) for i in range(80)]
    for trial in range(trials):
        known, unknown = (
            shift + np.repeat(draws.normal(0, math.sqrt(1.5), 20), 4) + draws.normal(0, 1, 80) for shift in (1.0, 0.0)
        )
        found = Bootstrap(names, names, n_draws=200, seed=trial).intervals(known, unknown)["auroc"]
        grouped += found.low <= truth <= found.high
        found = Bootstrap(single, single, n_draws=200, seed=trial).intervals(known, unknown)["auroc"]
        careless += found.low <= truth <= found.high
    assert 0.88 <= grouped / trials <= 0.99
    assert careless / trials < 0.85


def test_bootstrap_draws_do_not_depend_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    known, unknown = np.linspace(0, 3, 30), np.linspace(-1, 2, 20)
    names = [str(i // 3) for i in range(30)], [str(i) for i in range(20)]
    whole = Bootstrap(*names, n_draws=64, seed=4).draws(known, unknown)
    monkeypatch.setattr("robustvlm.detect.metrics._CHUNK", 250)
    pieces = Bootstrap(*names, n_draws=64, seed=4).draws(known, unknown)
    for name in METRICS:
        assert np.array_equal(whole[name], pieces[name])


def test_paired_differences_are_sharper_than_apart() -> None:
    """Two scores that differ a little but everywhere: paired draws see it, independent ones could not."""
    draws = np.random.default_rng(2)
    known, unknown = draws.normal(0.7, 1, 200), draws.normal(0, 1, 200)
    names = [str(i) for i in range(200)]
    bootstrap = Bootstrap(names, names, n_draws=400, seed=0)
    worse = bootstrap.draws(known, unknown + 0.1)["auroc"]
    better = bootstrap.draws(known, unknown)["auroc"]
    found = difference(auroc(known, unknown) - auroc(known, unknown + 0.1), better - worse)
    assert found.low > 0
    assert found.p_value == pytest.approx(2 / 401)
    assert np.std(better - worse) < 0.3 * math.hypot(np.std(better), np.std(worse))


def test_equal_scores_differ_by_nothing() -> None:
    found = difference(0.0, np.zeros(100))
    assert (found.low, found.high, found.p_value) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("known", [[], [math.nan, 1.0], [[1.0]]])
def test_scores_that_say_nothing(known: list[float]) -> None:
    with pytest.raises(UserError, match="known"):
        auroc(known, [0.0])
