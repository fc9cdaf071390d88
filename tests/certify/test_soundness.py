"""Known ways to get a certificate wrong, each planted and shown to be refused or harmless at this level."""

import numpy as np
import pytest

from robustvlm.certify import fcsb_cos, normal
from robustvlm.certify.bands import ell_band
from robustvlm.certify.certifier import as_scores, direction_scores, mean_feature, unit_rows
from robustvlm.certify.feature import PredictableDirection, fcsb_radius, norm_lower_bound, vector_radius
from robustvlm.certify.limits import (
    best_class_radius,
    best_mean,
    best_vote_radius,
    samples_needed,
)
from robustvlm.certify.normal import beta_quantile, largest_true, shift_down, shift_up
from robustvlm.certify.shapes import Sideways, cdf_lower, direction_radius, eigenvalue_upper, sideways
from robustvlm.certify.tangent import TangentTest, tangent_at
from robustvlm.errors import UserError


def rows(seed: int, n: int, dim: int = 8) -> np.ndarray:
    x = np.eye(dim)[0] * 2.0 + 0.4 * np.random.default_rng(seed).standard_normal((n, dim))
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def best_feature_radius(n: int, alpha: float) -> float:
    """Return the radius for cosine 0.5 and sigma 1 from scores that are all one."""
    return vector_radius(max(0.0, 2.0 * best_mean(n, alpha) - 1.0), 0.5, 1.0)


def test_a_score_of_one_gives_no_infinite_radius() -> None:
    assert np.isfinite(fcsb_radius(1.0, 0.0, 1.0))
    assert float(shift_down(1.0, 50.0)) == 0.0
    assert float(shift_up(0.0, 50.0)) == 1.0
    assert float(cdf_lower(np.ones(500), 0.0, ell_band(500, 0.001))) < 1.0
    for best in (best_feature_radius(500, 0.001), float(fcsb_radius(best_mean(500, 0.001), 0.5, 1.0))):
        assert 0.0 < best < 4.0


def test_scores_below_the_threshold_abstain_instead_of_going_negative() -> None:
    assert fcsb_radius(np.linspace(0.0, 0.75, 20), 0.5, 1.0).tolist() == [0.0] * 20
    assert (fcsb_cos(np.linspace(0.0, 0.5, 20), 0.0) == -1.0).all()


def test_failed_passes_lower_every_bound() -> None:
    good = rows(0, 400)
    bad = good.copy()
    bad[::20] = np.nan
    bad[1, 3] = np.inf
    u = np.eye(8)[0]
    assert direction_scores(bad, u)[0] == 0.0
    band = ell_band(400, 0.005)
    pairs = [
        [norm_lower_bound(PredictableDirection(8).scores(x), 0.001) for x in (bad, good)],
        [direction_radius(direction_scores(x, u), 0.5, 1.0, band, sideways(x, u, 0.005)) for x in (bad, good)],
        [-sideways(x, u, 0.01).eta for x in (bad, good)],
        [-sideways(x, u, 0.01).lam for x in (bad, good)],
    ]
    for worse, better in pairs:
        assert worse < better
    mean, lost = mean_feature(bad)
    assert lost == pytest.approx(21 / 400)
    assert np.linalg.norm(mean - good.mean(axis=0)) <= lost


def test_a_predictable_direction_ignores_failures_and_batches() -> None:
    x = rows(1, 50)
    x[[0, 7]] = np.nan
    whole = PredictableDirection(8).scores(x)
    parts = PredictableDirection(8)
    batched = np.concatenate([parts.scores(x[i : i + 6]) for i in range(0, 50, 6)])
    assert np.array_equal(whole, batched)
    assert len(whole) == 48  # the failed first row and the first row that sets the direction give no score
    assert whole[5] == 0.0
    started = PredictableDirection(8, start=np.eye(8)[0]).scores(x)
    assert len(started) == 50
    assert started[0] == 0.0


def test_unnormalised_features_and_bad_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="norm 2"):
        unit_rows(2.0 * rows(2, 5))
    with pytest.raises(UserError, match="shape"):
        unit_rows(np.ones(4))
    with pytest.raises(UserError, match="direction"):
        direction_scores(rows(2, 5), np.zeros(8))
    with pytest.raises(UserError, match="at least one score"):
        as_scores([])
    with pytest.raises(UserError, match=r"lie in \[0, 1\]"):
        as_scores([0.5, float("inf")])
    half = rows(3, 20).astype(np.float16)
    assert np.linalg.norm(unit_rows(half), axis=1) == pytest.approx(np.ones(20))


def test_half_precision_accumulation_is_not_possible() -> None:
    scores = np.full(10_000, 0.9, dtype=np.float16)
    assert float(np.cumsum(scores, dtype=np.float16)[-1]) / 10_000 < 0.25  # what a careless running sum gives
    exact = norm_lower_bound(scores.astype(np.float64), 0.001)
    assert norm_lower_bound(scores, 0.001) == pytest.approx(exact)


def test_tangent_references_must_be_sound_inputs() -> None:
    with pytest.raises(UserError, match="clip"):
        tangent_at([0.5], 1.0, clips=[0.01, 0.0])
    impossible = TangentTest([0.9] * 50, a=6.0, target=0.9, alpha=0.01)
    impossible.update([1.0] * 500)
    assert impossible.hopeless.all()
    assert not impossible.certified.any()
    trivial = TangentTest([0.9] * 50, a=0.1, target=-1.0, alpha=0.01)
    trivial.update([])
    trivial.update([0.9] * 20)
    assert (trivial.n, trivial.certified.all()) == (20, True)


def test_bisection_returns_a_verified_point() -> None:
    seen: list[float] = []

    def ok(x: np.ndarray) -> bool:
        seen.append(float(x))
        return bool(x <= 0.3)

    end = float(largest_true(ok, 0.0, 1.0, steps=20))
    assert end in seen
    assert end <= 0.3
    assert float(largest_true(lambda _: False, 0.25, 1.0)) == 0.25


def test_limits_tell_what_settings_can_reach() -> None:
    for best in (
        lambda n: best_feature_radius(n, 0.001),
        lambda n: float(fcsb_radius(best_mean(n, 0.001), 0.5, 1.0)),
        lambda n: best_vote_radius(n, 0.001, 1.0),
    ):
        n = samples_needed(best, 1.5)
        assert n is not None
        assert best(n) >= 1.5 > best(n - 1)
    assert samples_needed(lambda n: best_vote_radius(n, 0.001, 1.0), 9.0) is None
    ones = np.tile(np.eye(4)[0], (300, 1))
    reached = vector_radius(norm_lower_bound(PredictableDirection(4, start=np.eye(4)[0]).scores(ones), 0.01), 0.5, 1.0)
    assert reached == pytest.approx(best_feature_radius(300, 0.01), abs=1e-4)
    assert best_class_radius(1000, 0.001, 1.0) < best_vote_radius(1000, 0.001, 1.0)


def test_sideways_term_takes_the_better_of_two_theorems() -> None:
    side = Sideways(0.1, 0.02, 0.001)
    assert float(side.at(0.0)) == pytest.approx(0.1)
    assert float(side.at(0.2)) == pytest.approx(0.1 + np.sqrt(0.02 * np.expm1(0.04)))
    assert float(side.at(5.0)) <= 1.0


def test_gram_trick_gives_the_same_bounds_in_both_shapes() -> None:
    x = rows(4, 40, dim=60)
    u, tall = np.eye(60)[0], np.vstack([x, x])  # 80 rows take the D x D matrix, 40 rows the n x n one
    side = tall - np.outer(tall @ u, u)
    for sample in (x, tall):
        top = float(np.linalg.eigvalsh(side.T @ side / 80)[-1])
        assert sideways(sample, u, 0.01).lam == pytest.approx(eigenvalue_upper(top, len(sample), 0.005), rel=1e-9)


def test_an_inaccurate_library_quantile_is_corrected_downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = np.array([1.0, 30.0, 100.0])
    exact = beta_quantile(0.001, ranks, 101.0 - ranks)
    monkeypatch.setattr(normal, "betaincinv", lambda *_: np.array([0.5, exact[1], 0.999]))
    corrected = beta_quantile(0.001, ranks, 101.0 - ranks)
    assert corrected == pytest.approx(exact, rel=1e-6)
