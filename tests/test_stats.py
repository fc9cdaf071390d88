"""Intervals and paired tests against closed forms, second implementations and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import beta, binom
from scipy.stats import t as student_t

from robustvlm.stats import Rate, holm, mcnemar_exact, mean, mean_share, rate, worth_of


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    total = draw(st.integers(1, 400))
    return draw(st.integers(0, total)), total


@settings(max_examples=200, deadline=None)
@given(counts(), st.sampled_from([0.8, 0.95, 0.999]))
def test_interval_is_the_beta_quantiles(count: tuple[int, int], confidence: float) -> None:
    k, n = count
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else beta.ppf(tail, k, n - k + 1)
    high = 1.0 if k == n else beta.isf(tail, k + 1, n - k)
    result = rate(k, n, confidence)
    assert result.low == pytest.approx(low, abs=1e-12)
    assert result.high == pytest.approx(high, abs=1e-12)
    assert result.low <= result.value <= result.high


def test_limits_of_none_and_all_have_closed_forms() -> None:
    n = 30
    assert rate(0, n).low == 0.0
    assert rate(0, n).high == pytest.approx(1 - 0.025 ** (1 / n), abs=1e-12)
    assert rate(n, n).high == 1.0
    assert rate(n, n).low == pytest.approx(0.025 ** (1 / n), abs=1e-12)


def test_nothing_counted_has_no_value_and_the_whole_interval() -> None:
    result = rate(0, 0)
    assert (result.value, result.low, result.high) == (None, 0.0, 1.0)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.93])
def test_coverage_is_at_least_nominal_exactly(p: float) -> None:
    """Sum the binomial probabilities of every count whose interval holds p: no simulation error."""
    n = 60
    covered = sum(binom.pmf(k, n, p) for k in range(n + 1) if rate(k, n).low <= p <= rate(k, n).high)
    assert 0.95 <= covered < 0.9999


def test_coverage_by_simulation() -> None:
    draws = np.random.default_rng(0).binomial(40, 0.3, size=4000)
    table = [rate(k, 40) for k in range(41)]
    covered = np.mean([table[k].low <= 0.3 <= table[k].high for k in draws])
    assert covered > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 4000)


@pytest.mark.parametrize(("k", "n", "confidence"), [(-1, 3, 0.95), (4, 3, 0.95), (1, 3, 0.0), (1, 3, 1.0)])
def test_impossible_input_is_refused(k: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"need|confidence"):
        rate(k, n, confidence)


def test_rate_is_frozen_and_survives_json() -> None:
    result = rate(3, 7)
    assert Rate.model_validate_json(result.model_dump_json()) == result
    with pytest.raises(ValidationError):
        result.total = 8  # type: ignore[misc]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_is_the_two_sided_sign_test(pairs: list[tuple[bool, bool]]) -> None:
    test = mcnemar_exact([a for a, _ in pairs], [b for _, b in pairs])
    discordant = test.only_first + test.only_second
    fewer = min(test.only_first, test.only_second)
    expected = min(1.0, 2 * sum(math.comb(discordant, i) for i in range(fewer + 1)) / 2**discordant)
    assert test.p_value == pytest.approx(expected)
    assert test.total == len(pairs)
    assert test.only_first == sum(a and not b for a, b in pairs)
    assert test.both == sum(a and b for a, b in pairs)


def test_mcnemar_rarely_rejects_when_nothing_differs() -> None:
    rng = np.random.default_rng(1)
    rejections = [
        mcnemar_exact(list(rng.random(40) < 0.6), list(rng.random(40) < 0.6)).p_value <= 0.05 for _ in range(400)
    ]
    assert np.mean(rejections) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30), st.integers(2, 5))
def test_copies_say_no_more_than_the_thing_alone(pairs: list[tuple[bool, bool]], copies: int) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    alone = mcnemar_exact(first, second)
    assert mcnemar_exact(first, second, groups=range(len(pairs))) == alone
    several = mcnemar_exact(first * copies, second * copies, groups=[*range(len(pairs))] * copies)
    assert several.p_value == alone.p_value
    assert several.only_first == copies * alone.only_first
    if pairs:
        assert several.things == alone.only_first + alone.only_second


def test_alike_copies_do_not_reject_what_does_not_differ() -> None:
    """Eight copies of each of 40 things, right or wrong nearly together: counted one by one they reject at will."""
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(40), 8).tolist()

    def answers() -> list[bool]:
        things = np.repeat(rng.random(40) < 0.6, 8)
        return list(np.where(rng.random(320) < 0.1, ~things, things))

    once = each = 0
    for _ in range(200):
        first, second = answers(), answers()
        once += mcnemar_exact(first, second, groups=groups).p_value <= 0.05
        each += mcnemar_exact(first, second).p_value <= 0.05
    assert once <= 15
    assert each >= 60


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=14))
def test_the_paired_test_of_groups_is_that_of_all_signs(cases: list[tuple[int, bool, bool]]) -> None:
    test = mcnemar_exact([a for _, a, _ in cases], [b for *_, b in cases], groups=[group for group, *_ in cases])
    leads = [sum(a - b for group, a, b in cases if group == one) for one in range(5)]
    sums = [
        sum(sign * lead for sign, lead in zip(signs, leads, strict=True))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    assert test.p_value == pytest.approx(sum(abs(one) >= abs(sum(leads)) for one in sums) / len(sums))
    alone = len({group for group, *_ in cases}) == len(cases)
    assert test.things == (None if alone else sum(lead != 0 for lead in leads))


def test_many_small_leads_against_few_large_ones_is_no_finding() -> None:
    """Ten things of four copies for the first, thirty of one for the second: a sign test would find for the second."""
    first = [True] * 40 + [False] * 120
    second = [False] * 40 + [copy == 0 for _ in range(30) for copy in range(4)]
    test = mcnemar_exact(first, second, groups=[case // 4 for case in range(160)])
    assert (test.only_first, test.only_second, test.things) == (40, 30, 40)
    assert test.p_value > 0.4


def test_mcnemar_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="one length"):
        mcnemar_exact([True], [True, False])


def _closed_testing(p_values: list[float]) -> list[float]:
    """Holm by its definition: Bonferroni closed over every family that holds the hypothesis."""
    indices = range(len(p_values))
    families = [f for size in range(1, len(p_values) + 1) for f in itertools.combinations(indices, size)]
    return [max(min(1.0, len(f) * min(p_values[j] for j in f)) for f in families if i in f) for i in indices]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_bonferroni_closed(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(_closed_testing(p_values))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=50), st.sampled_from([0.8, 0.95]))
def test_the_interval_of_a_mean_is_that_of_scipy(values: list[float], confidence: float) -> None:
    found = mean(values, confidence)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(np.mean(values), abs=1e-12)
    assert found.low is not None
    assert found.high is not None
    if error > 1e-12:
        low, high = student_t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=error)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_the_interval_of_bounded_numbers_is_cut_at_the_bounds_and_nowhere_else(values: list[float]) -> None:
    free, bounded = mean(values), mean(values, within=(0.0, 1.0))
    assert free.low is not None
    assert free.high is not None
    assert bounded.value == free.value
    assert (bounded.low, bounded.high) == (max(0.0, free.low), min(1.0, free.high))


def test_a_mean_that_rounding_put_past_its_bound_lies_in_its_interval() -> None:
    found = mean([1.0 + 1e-7, 1.0 + 1e-7], within=(-1.0, 1.0))
    assert found.low == found.value == found.high == 1.0 + 1e-7


def test_cutting_costs_no_coverage() -> None:
    rng, cut = np.random.default_rng(0), 0
    for sample in rng.beta(20, 1, size=(2000, 8)):
        free, bounded = mean(sample.tolist()), mean(sample.tolist(), within=(0.0, 1.0))
        truth = 20 / 21
        assert (free.low <= truth <= free.high) == (bounded.low <= truth <= bounded.high)  # type: ignore[operator]
        cut += bounded.high == 1.0
    assert cut > 0, "no interval was cut: the comparison has shown nothing"


def test_a_mean_needs_two_numbers_for_an_interval() -> None:
    assert (mean([]).value, mean([]).total) == (None, 0)
    assert (mean([0.4]).value, mean([0.4]).low, mean([0.4]).high) == (0.4, None, None)


@pytest.mark.parametrize("sizes", [[8] * 40, [1] * 40 + [20] * 20])
def test_copies_of_a_thing_are_no_evidence_of_their_own(sizes: list[int]) -> None:
    """All copies of a thing come out alike: the interval of single images would miss the truth most of the time."""
    draws, groups = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes)
    covered, naive = 0, 0
    for _ in range(400):
        hits = int((draws.random(len(sizes)) < 0.7)[groups].sum())
        found, single = rate(hits, len(groups), independent=worth_of(groups.tolist())), rate(hits, len(groups))
        assert found.value == single.value == hits / len(groups)
        assert found.low <= single.low <= single.high <= found.high
        covered, naive = covered + (found.low <= 0.7 <= found.high), naive + (single.low <= 0.7 <= single.high)
    assert covered / 400 > 0.94 > 0.7 > naive / 400


def test_so_many_of_different_things_have_the_interval_they_always_had() -> None:
    assert rate(7, 20, independent=worth_of(range(20))) == rate(7, 20)
    assert rate(14, 40, independent=worth_of([*range(20), *range(20)])).low == pytest.approx(rate(7, 20).low)
    assert rate(0, 40, independent=20.0).high == pytest.approx(rate(0, 20).high)
    values = [0.1, 0.5, 0.9]
    assert mean(values, independent=3.0) == mean(values)
    assert mean_share([*values, *values], independent=worth_of([0, 1, 2] * 2)).low < mean_share(values * 2).low
    assert mean(values, independent=1.0).low is None
    assert mean(list(values) * 3, independent=3.0).low == pytest.approx(mean(values).low), "copies add nothing"
