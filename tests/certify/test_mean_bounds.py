"""Bounds for means: order and batch invariance, looking early, failed samples, agreement with definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from robustvlm.certify.classes import least_lower
from robustvlm.certify.means import (
    FRACTIONS,
    LOWER_BOUNDS,
    BettingState,
    SequentialTest,
    bernstein_lower,
    betting_lower,
    clopper_pearson_lower,
    clopper_pearson_upper,
    hoeffding_lower,
    kl_lower,
    mean_lower,
    upper,
)
from robustvlm.errors import UserError

unit = st.lists(st.floats(0.0, 1.0), min_size=2, max_size=60)


@settings(max_examples=50, deadline=None)
@given(unit, st.randoms(use_true_random=False))
def test_bounds_do_not_depend_on_the_order(values: list[float], rng: object) -> None:
    shuffled = list(values)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    for bound in LOWER_BOUNDS:
        assert float(mean_lower(values, 0.05, bound=bound)) == pytest.approx(
            float(mean_lower(shuffled, 0.05, bound=bound)), abs=1e-8
        )


@settings(max_examples=50, deadline=None)
@given(unit, st.floats(0.05, 0.95), st.integers(1, 7))
def test_wealth_does_not_depend_on_the_batches(values: list[float], m0: float, batch: int) -> None:
    whole, parts, halves = BettingState(m0), BettingState(m0), BettingState(m0)
    whole.update(values)
    for i in range(0, len(values), batch):
        parts.update(values[i : i + batch])
    rest = BettingState(m0)
    halves.update(values[: len(values) // 2])
    rest.update(values[len(values) // 2 :])
    halves.merge(rest)
    for state in (parts, halves):
        assert float(state.log_wealth) == pytest.approx(float(whole.log_wealth), abs=1e-9)
        assert state.n == len(values)


@settings(max_examples=50, deadline=None)
@given(unit)
def test_lower_bounds_stay_below_the_mean_and_grow_with_alpha(values: list[float]) -> None:
    mean = float(np.mean(values))
    for bound in LOWER_BOUNDS:
        strict, loose = (float(mean_lower(values, alpha, bound=bound)) for alpha in (0.001, 0.1))
        assert 0.0 <= strict <= loose + 1e-9
        assert loose <= mean + 1e-9


def test_betting_bound_is_the_end_of_the_rejected_nulls() -> None:
    x = np.random.default_rng(3).beta(8, 2, 400)
    lower = float(betting_lower(x, 0.01))

    def wealth(m0: float) -> float:
        return float(np.mean([np.prod(1.0 + f / m0 * (x - m0)) for f in FRACTIONS]))

    assert wealth(lower) >= 100.0
    assert wealth(lower + 1e-6) < 100.0


def test_kl_is_never_below_hoeffding_and_many_columns_equal_single_ones() -> None:
    x = np.random.default_rng(4).beta(3, 1, (300, 5))
    assert (kl_lower(x, 0.01) >= hoeffding_lower(x, 0.01) - 1e-12).all()
    for bound in LOWER_BOUNDS:
        columns = [float(mean_lower(x[:, k], 0.01, bound=bound)) for k in range(5)]
        assert mean_lower(x, 0.01, bound=bound) == pytest.approx(columns, abs=1e-8)
    assert least_lower(x, 0.01) == pytest.approx(float(betting_lower(x, 0.01).min()), abs=1e-7)
    assert least_lower(np.zeros((20, 3)), 0.01) == 0.0


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (77, 100)])
def test_clopper_pearson_inverts_the_binomial_tail(k: int, n: int) -> None:
    low, high = float(clopper_pearson_lower(k, n, 0.05)), float(clopper_pearson_upper(k, n, 0.05))
    if k > 0:
        assert binom.sf(k - 1, n, low) == pytest.approx(0.05)
    if k < n:
        assert binom.cdf(k, n, high) == pytest.approx(0.05)
    assert low <= k / n <= high


def test_failed_samples_count_as_the_worst_value_in_both_directions() -> None:
    good = [0.9] * 99
    for lower in (hoeffding_lower, bernstein_lower, kl_lower, betting_lower):
        assert float(lower([*good, float("nan")], 0.01)) == float(lower([*good, 0.0], 0.01))
        assert float(upper(lower, [*good, float("nan")], 0.01)) == float(upper(lower, [*good, 1.0], 0.01))


def test_peeking_at_a_fixed_bound_breaks_it_and_betting_survives() -> None:
    """Looking after every 10 of 600 samples at nominal 10%: why a claim with such a bound fixes its n."""
    runs, alpha, mean = 300, 0.1, 0.5
    x = (np.random.default_rng(5).random((600, runs)) < mean).astype(float)
    state, peeked = BettingState(np.full(runs, mean)), np.zeros(runs, dtype=bool)
    for n in range(10, 601, 10):
        state.update(x[n - 10 : n])
        peeked |= clopper_pearson_lower(x[:n].sum(axis=0), n, alpha) > mean
    assert peeked.mean() > 2 * alpha
    assert state.rejected(alpha).mean() <= alpha


def test_sequential_test_certifies_gives_up_and_stays_decided() -> None:
    rng = np.random.default_rng(6)
    outcomes = {}
    for name, mean in (("certified", 0.9), ("futile", 0.6)):
        test = SequentialTest(0.75, alpha=0.001)
        while test.decision == "open" and test.n < 5000:
            test.update(rng.beta(20 * mean, 20 * (1 - mean), 32))
        outcomes[name] = test.decision
        n = test.n
        test.update(np.full(5000, 1.0 if name == "futile" else 0.0))
        assert (test.decision, test.n) == (name, n)
    assert SequentialTest(1.0, alpha=0.001).decision == "futile"
    assert SequentialTest(float("inf"), alpha=0.001).update([1.0] * 9) == "futile"
    assert SequentialTest(-0.2, alpha=0.001).update([0.9] * 9) == "certified"


def test_errors_name_what_came() -> None:
    with pytest.raises(UserError, match="did you mean 'hoeffding'"):
        mean_lower([0.5], 0.1, bound="hoefding")
    with pytest.raises(UserError, match="alpha must lie"):
        mean_lower([0.5], 1.0)
    with pytest.raises(UserError, match="scores must lie in"):
        betting_lower([0.5, 1.2], 0.1)
    with pytest.raises(UserError, match="whole numbers"):
        clopper_pearson_lower(0.5, 10, 0.1)
    with pytest.raises(UserError, match="strictly between"):
        BettingState([0.5, 1.0])
    with pytest.raises(UserError, match="same null"):
        BettingState(0.5).merge(BettingState(0.6))
    with pytest.raises(UserError, match="at least 2"):
        bernstein_lower([0.5], 0.1)
