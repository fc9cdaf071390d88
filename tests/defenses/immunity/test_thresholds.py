"""Weibull thresholds: closed form, the share of fresh images that they reject, and what little data does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import weibull_min

from robustvlm.defenses.immunity.antibodies import Antibodies, AntibodyText
from robustvlm.defenses.immunity.recipe import Deciding, thresholds_of
from robustvlm.defenses.immunity.state import Adapter, Immunity
from robustvlm.defenses.immunity.thresholds import TailFit, fit_tail, fit_thresholds, name_density, tail_share
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


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [60, 400])
def test_a_real_tail_misses_what_was_asked_for_too(law: str, n: int) -> None:
    rng = np.random.default_rng(0)
    fresh, tail = LAWS[law](rng, 100_000), tail_share(n, 0.05)
    missed = [np.mean(fresh < fit_tail(LAWS[law](rng, n), tail=tail).threshold(0.05)) for _ in range(40)]
    assert 0.035 < np.mean(missed) < 0.07
    found = fit_thresholds(LAWS[law](rng, n), np.zeros(n, dtype=np.int64), 1)
    assert found.pooled.tail == tail <= 0.34


def test_two_bodies_and_one_tail_have_one_threshold() -> None:
    # The lowest fifth is the same: what lies above must not move the threshold, as it does when half is fitted to.
    rng = np.random.default_rng(0)
    low = rng.normal(0.0, 0.01, 100)
    near, far = (np.concatenate([low, rng.normal(body, 0.01, 400)]) for body in (0.1, 0.9))
    whole = np.zeros(500, dtype=np.int64)
    real = [fit_thresholds(scores, whole, 1).values[0] for scores in (near, far)]
    half = [fit_thresholds(scores, whole, 1, tail=0.5).values[0] for scores in (near, far)]
    assert abs(real[0] - real[1]) < 0.01 < abs(half[0] - half[1])


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
    with pytest.raises(UserError, match="unknown --thresholds 'pool'"):
        fit_thresholds(np.arange(10.0), np.zeros(10, dtype=np.int64), 1, rule="pool")


def test_one_threshold_for_all_when_pooled() -> None:
    rng = np.random.default_rng(0)
    found = fit_thresholds(rng.normal(size=200), np.repeat([0, 1], 100), 2, rule="pooled")
    assert set(found.values) == {found.pooled.threshold(0.05)}


def test_classes_without_images_lie_on_the_line_of_the_others() -> None:
    # Twenty classes whose scores are one cloud moved by twice their density; two more have no images.
    cloud, density = np.random.default_rng(0).normal(0.0, 0.1, 50), np.linspace(0.1, 0.5, 22)
    scores, of = np.concatenate([cloud + 2 * density[k] for k in range(20)]), np.repeat(np.arange(20), 50)
    found = fit_thresholds(scores, of, 22, rule="density", density=density)
    assert [item.by_density for item in found.classes] == 20 * [False] + 2 * [True]
    # The line ends where its classes do.
    assert found.values[20] == found.values[21] == pytest.approx(found.values[19], abs=1e-3)
    between = np.where(np.arange(22) == 20, density[7], density)
    assert fit_thresholds(scores, of, 22, rule="density", density=between).values[20] == pytest.approx(
        found.values[7], abs=1e-3
    )
    few = fit_thresholds(scores[:250], of[:250], 6, rule="density", density=density[:6])
    assert few.classes[5].pooled


def test_density_is_the_mean_cosine_to_the_nearest_names() -> None:
    text = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines = (text @ text.T).numpy()
    wanted = [np.sort(np.delete(cosines[k], k))[-10:].mean() for k in range(30)]
    assert name_density(text).tolist() == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_least_fpr_accepts_no_more_strangers_than_any_other_thresholds_of_its_miss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, of = rng.normal(size=16), np.repeat([0, 1], 8)
    strange, near = rng.normal(-0.5, 1.0, size=30), rng.integers(0, 2, size=30)
    found = fit_thresholds(scores, of, 2, miss=0.25, min_images=1, rule="least-fpr", strangers=(strange, near)).values
    lost = int(sum((scores[of == k] <= found[k]).sum() for k in (0, 1)))
    assert lost <= 4
    taken = sum((strange[near == k] > found[k]).sum() for k in (0, 1))
    cuts = [[-np.inf, *np.sort(scores[of == k])] for k in (0, 1)]
    best = min(
        sum((strange[near == k] > cut).sum() for k, cut in enumerate(pair))
        for pair in itertools.product(*cuts)
        if sum((scores[of == k] <= cut).sum() for k, cut in enumerate(pair)) <= lost
    )
    # Thresholds just below the first known score refuse what lies below it at no loss.
    assert taken <= best


def test_stand_ins_for_unknown_images_are_as_long_as_means_of_noisy_copies() -> None:
    # S_DIS is linear: of features half as long, thresholds are half of what they were.
    draws = torch.Generator().manual_seed(0)
    axes, labels = torch.eye(6), torch.arange(90) % 3
    features = F.normalize(axes[labels] + torch.rand(90, 6, generator=draws), dim=1)
    others = F.normalize(torch.rand(40, 6, generator=draws), dim=1)
    antibodies = Antibodies(tuple(AntibodyText(f"text {n}", "a") for n in range(40)), others)
    immunity = Immunity(("a", "b", "c"), axes[:3, None], antibodies, 0.5, torch.zeros(3), Adapter(6, 2))
    deciding = Deciding(weight=0.5, min_images=5, rule="least-fpr", miss=0.2)
    unit, halved = (thresholds_of(c * features, labels, immunity, deciding).values for c in (1.0, 0.5))
    np.testing.assert_allclose(halved, 0.5 * unit, atol=1e-6)
