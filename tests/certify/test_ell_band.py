"""The order-statistics band: calibration against a second algorithm, the cache, the fallback."""

import json
from collections.abc import Iterator
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta

from robustvlm.certify import bands
from robustvlm.certify import bands as band_module
from robustvlm.certify.bands import calibrate, crossing_prob, dkw_band, ell_band, index_band, order_quantiles
from robustvlm.errors import UserError


def exact_crossing(bounds: list[float]) -> float:
    """P(some U_(j) < b_j) in exact rational arithmetic: multinomial counts between the bounds, no Poisson process."""
    n, edges = len(bounds), [Fraction(0), *map(Fraction, bounds), Fraction(1)]
    ways = {0: Fraction(1)}  # number of points below the current bound -> probability so far
    for j in range(1, n + 2):
        width = edges[j] - edges[j - 1]
        allowed = j - 1 if j <= n else n
        nxt: dict[int, Fraction] = {}
        for count, p in ways.items():
            for extra in range(allowed - count + 1):
                nxt[count + extra] = nxt.get(count + extra, Fraction(0)) + p * comb(n - count, extra) * width**extra
        ways = nxt
    return float(1 - ways.get(n, Fraction(0)))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("eta", [0.2, 0.01, 1e-4])
def test_crossing_probability_equals_exact_rational_arithmetic(n: int, eta: float) -> None:
    exact = exact_crossing([float(b) for b in order_quantiles(n, eta)])
    assert crossing_prob(n, eta) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.05), (5, 0.3), (64, 0.01), (333, 0.001)])
def test_calibration_never_exceeds_alpha_and_uses_nearly_all_of_it(n: int, alpha: float) -> None:
    spent = crossing_prob(n, calibrate(n, alpha))
    assert alpha * (1 - 2e-5) <= spent <= alpha * (1 + 1e-12)


def test_simulated_crossings_match() -> None:
    n, alpha, runs = 200, 0.05, 20_000
    bounds = ell_band(n, alpha).lower[::-1]
    points = np.sort(np.random.default_rng(1).random((runs, n)), axis=1)
    crossed = (points < bounds).any(axis=1).mean()
    assert crossed == pytest.approx(alpha, abs=4 * np.sqrt(alpha / runs))


def test_shipped_levels_are_inside_their_certain_limits_and_a_sample_is_recomputed() -> None:
    for key, eta in bands.shipped_levels().items():
        n, alpha = int(key.split(":")[0]), float(key.split(":")[1])
        assert alpha / n <= eta < alpha
    for key in ("100:0.05", "500:0.001", "1000:0.0001", "2000:0.0005"):
        n, alpha = int(key.split(":")[0]), float(key.split(":")[1])
        assert crossing_prob(n, bands.shipped_levels()[key]) <= alpha


@pytest.mark.slow
def test_every_shipped_level_is_recomputed() -> None:
    for key, eta in bands.shipped_levels().items():
        n, alpha = int(key.split(":")[0]), float(key.split(":")[1])
        assert alpha * (1 - 2e-5) <= crossing_prob(n, eta) <= alpha


@pytest.mark.parametrize("make", [ell_band, dkw_band, index_band])
@pytest.mark.parametrize("n", [1, 2, 50, 1000])
def test_bands_decrease_and_stay_below_the_empirical_survival(make: object, n: int) -> None:
    lower = make(n, 0.01).lower  # type: ignore[operator]
    assert lower.shape == (n,)
    assert (np.diff(lower) <= 0.0).all()
    assert (lower <= np.arange(n, 0, -1) / n).all()
    assert (lower >= 0.0).all()


def test_index_band_spends_at_most_alpha_by_the_union_bound() -> None:
    n, alpha = 5000, 0.01
    lower = index_band(n, alpha).lower
    ranks = np.arange(1, n + 1)
    levels = beta.cdf(lower, n - ranks + 1, ranks)
    steps = np.append(lower[:-1] > lower[1:], True)  # the chosen ranks are where the step function falls
    assert levels[steps].sum() <= alpha * (1 + 1e-9)


def test_large_samples_fall_back_without_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "calibrate", lambda *_: pytest.fail("n is too large to calibrate"))
    bands.local_level.cache_clear()
    assert ell_band(300_000, 0.001).name == "index"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "deep" / "ell-levels.json"
    monkeypatch.setattr(bands, "cache_file", lambda: path)
    bands.local_level.cache_clear()
    yield path
    bands.local_level.cache_clear()


@pytest.mark.usefixtures("cache")
def test_computed_levels_are_cached_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bands.local_level(37, 0.02)
    assert first == calibrate(37, 0.02)
    bands.local_level.cache_clear()
    monkeypatch.setattr(bands, "calibrate", lambda *_: pytest.fail("should come from the cache"))
    assert bands.local_level(37, 0.02) == first


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[1, 2]",
        json.dumps({"37:0.02": 0.9}),
        json.dumps({"37:0.02": [0.019, "0" * 24]}),
        json.dumps({"37:0.02": [0.5, bands._seal("37:0.02", 0.5)]}),
        json.dumps({"37:0.02": [float("nan"), "x"]}),
    ],
)
def test_a_damaged_cache_is_computed_anew(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert bands.local_level(37, 0.02) == calibrate(37, 0.02)


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert bands.local_level(37, 0.02) == calibrate(37, 0.02)


def test_band_errors_say_what_was_expected() -> None:
    with pytest.raises(UserError, match="at least one sample"):
        band_module.ell_band(0, 0.01)
    with pytest.raises(UserError, match=r"alpha <= 0\.5"):
        dkw_band(10, 0.7)
