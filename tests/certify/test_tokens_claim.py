"""The claim about every image token: coverage with a known truth, the feature claim token by token, and its audit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binom

from robustvlm.certify import deployed_feature_cos
from robustvlm.certify.claims import TOKENS, Materials
from robustvlm.certify.claims.feature import FeatureRadius, FeatureTest
from robustvlm.certify.claims.tokens import (
    TokenDirections,
    TokensQuantity,
    TokensRadius,
    TokensTest,
    norms_lower,
    unit_tokens,
)
from robustvlm.certify.means import log_gains, mix
from robustvlm.certify.normal import Array
from robustvlm.commands.certify.spread import compare, direction, vectors_of
from robustvlm.commands.certify.store import CertifyFact, make_certify_rows
from robustvlm.commands.certify.summary import TokenShare, _curve
from robustvlm.commands.certify.view import _by_token
from robustvlm.errors import UserError
from tests.certify.test_coverage_norms import assert_covered

RUNS, COPIES, ALPHA = 10_000, 48, 0.5


def features(rows: Array) -> Array:
    """Unit tokens [n, T, D] side by side, over the root of T."""
    return np.asarray(rows.reshape(len(rows), -1) / np.sqrt(rows.shape[1]))


def turned(rng: np.random.Generator, n: int, spread: list[float]) -> Array:
    """Tokens [n, T, 2] at normally spread angles: the norm of a token's mean is exp(-spread^2 / 2)."""
    angles = np.array(spread) * rng.standard_normal((n, len(spread)))
    return np.stack([np.cos(angles), np.sin(angles)], axis=2)


def too_high(chance: Array, runs: int, levels: tuple[float, ...], rng: np.random.Generator) -> Array:
    """Return where the bounds of norms are above the true ones, bool [levels, runs, T].

    Each copy of token t points one way with probability `chance[t]`, else back: its mean has the norm 2 chance - 1. A
    bound lies above that if and only if the wealth against it has reached 1 / level.
    """
    signs = np.where(rng.random((COPIES, runs, len(chance))) < chance, 1.0, -1.0)
    scores = TokenDirections(runs * len(chance), 1).scores(signs.reshape(COPIES, -1, 1))
    wealth = mix(log_gains(scores, np.tile(chance, runs)))
    found = np.stack([wealth >= np.log(1 / level) for level in levels])
    few = slice(0, 40 * len(chance))
    for level, above in zip(levels, found, strict=True):
        bounds, truth = norms_lower(scores[:, few], level), np.tile(2 * chance - 1, 40)
        assert np.array_equal(bounds > truth - 1e-6, above[few])
    return found.reshape(len(levels), runs, len(chance))


def test_one_radius_needs_no_correction_and_a_list_of_bounds_does() -> None:
    """Ten thousand images of 24 tokens, whose least norm is .7: of all of them, or of one beside surer ones."""
    rng, tokens, parts = np.random.default_rng(0), 24, 10
    same, one = np.full(tokens, 0.85), np.array([0.85, *[0.999] * (tokens - 1)])
    for chance in (same, one):
        alone, listed = np.concatenate(
            [too_high(chance, RUNS // parts, (ALPHA, ALPHA / tokens), rng) for _ in range(parts)], axis=1
        )
        # The least bound is above .7 if that of every token whose norm is .7 is.
        assert_covered(int(alone[:, chance == 0.85].all(axis=1).sum()), RUNS, ALPHA)
        assert_covered(int(listed.any(axis=1).sum()), RUNS, ALPHA)
        # Without its share of the error a list of such bounds would be false too often: the simulation can tell.
        false = int(alone.any(axis=1).sum())
        assert (false > binom.ppf(0.9999, RUNS, ALPHA)) == (chance is same)
        assert false > 0.01 * RUNS


@pytest.mark.parametrize("spread", [[0.3, 0.5, 0.4], [0.2, 0.2, 0.2]])
def test_it_is_the_feature_claim_of_the_worst_token(spread: list[float]) -> None:
    rows = turned(np.random.default_rng(1), 640, spread)
    ours = TokensRadius(tokens=3, cos0=0.5, sigma=0.25, alpha=0.01, n=640, n_pilot=0)
    feed(ours, features(rows))
    found = ours.finding()
    single = []
    for token in range(3):
        one = FeatureRadius(cos0=0.5, sigma=0.25, alpha=0.01, n=640, n_pilot=0, baselines=False)
        feed(one, rows[:, token])
        single.append(one.finding())
    assert found.radius == pytest.approx(min(one.radius for one in single), abs=1e-6)
    assert found.r == pytest.approx(min(one.r or 0.0 for one in single), abs=1e-6)
    assert found.parts is not None
    assert (found.parts < [one.r for one in single]).all(), "each has but a share of the error"
    # The encoder (cos kz, sin kz) turns by exactly k eps; the norm of its mean is exp(-k^2 sigma^2 / 2).
    assert found.radius < np.arccos(0.5) * 0.25 / max(spread)
    assert (found.parts < np.exp(-0.5 * np.square(spread))).all()


def test_features_too_large_to_be_kept_give_the_same_certificate() -> None:
    rows = turned(np.random.default_rng(7), 600, [0.5])[:, 0]
    found = []
    for baselines in (True, False):
        certifier = FeatureRadius(cos0=0.5, sigma=0.25, alpha=0.01, n=600, n_pilot=100, baselines=baselines)
        done = 0
        while (wanted := certifier.request()) is not None:
            certifier.take(rows[:1] if wanted.stage == "clean" else rows[done : done + wanted.sure])
            done += 0 if wanted.stage == "clean" else wanted.sure
        found.append(certifier.finding())
        assert bool(certifier._rows) == baselines, "nothing is kept without them"
    assert (found[0].r, found[0].radius) == (found[1].r, found[1].radius)
    assert found[0].columns
    assert not found[1].columns


def feed(certifier: TokensRadius | TokensTest | FeatureRadius | FeatureTest, rows: Array) -> None:
    done = 0
    while (wanted := certifier.request()) is not None:
        certifier.take(rows[done : done + wanted.sure])
        done += wanted.sure


def test_a_radius_is_certified_once_it_is_for_every_token() -> None:
    rng, sizes = np.random.default_rng(2), {"sigma": 0.25, "alpha": 0.01}
    for spread, radius, wanted in (([0.3, 0.6], 0.2, "certified"), ([0.2, 1.5], 0.2, "futile"), ([0.3] * 2, 9.0, "")):
        rows = turned(rng, 2000, spread)
        ours = TokensTest(tokens=2, radius=radius, cos0=0.5, n=2000, n_pilot=0, **sizes)
        feed(ours, features(rows))
        found, single = ours.finding(), []
        for token in range(2):
            one = FeatureTest(radius=radius, cos0=0.5, n=2000, **sizes)
            feed(one, rows[:, token])
            single.append(one.finding())
        assert found.stop == (wanted or "futile")
        assert (found.radius > 0) == all(one.radius > 0 for one in single)
        if found.radius:
            assert found.n == max(one.n for one in single)


def test_failed_copies_are_the_worst_value_and_foreign_features_are_refused() -> None:
    rows = features(turned(np.random.default_rng(3), 320, [0.3, 0.3]))
    whole, spoiled = (TokensRadius(tokens=2, cos0=0.5, sigma=0.25, alpha=0.01, n=320, n_pilot=0) for _ in range(2))
    feed(whole, rows)
    broken = rows.copy()
    broken[::8, 1] = np.nan
    feed(spoiled, broken)
    assert spoiled.finding().failed == 40
    assert (spoiled.finding().r or 0) < (whole.finding().r or 0) - 0.1
    with pytest.raises(UserError, match="tokens of equal length"):
        unit_tokens([[0.6, 0.0, 0.8, 0.0]], 2)
    with pytest.raises(UserError, match="is about the image tokens of a model that answers in words"):
        TOKENS.plan(Asked(), Materials())


class Asked:
    sigma, samples, n_pilot, alpha, min_cos, radius, tau, weight, deployed, prompts = (
        0.25, 400, 0, 0.01, 0.5, None, None, 0.0, 256, None
    )  # fmt: skip


def test_few_copies_keep_less_and_more_tokens_less_still() -> None:
    found = []
    for tokens in (2, 64):
        certifier = TokensRadius(tokens=tokens, cos0=0.5, sigma=0.25, alpha=0.01, n=640, n_pilot=0)
        feed(certifier, features(turned(np.random.default_rng(4), 640, [0.0] * tokens)))
        finding = certifier.finding()
        kept = TOKENS.deployed_columns(finding, Asked(), sigma=0.25)["deployed_radius"]
        assert 0 < kept < finding.radius
        found.append(kept)
    assert found[1] < found[0]


def test_an_audit_tells_a_false_bound_from_a_true_one() -> None:
    rng, n = np.random.default_rng(5), 2000
    clean = turned(rng, n, [0.3, 0.3, 0.3])
    moved = turned(rng, n, [0.3, 0.3, 0.3])
    turn = np.array([[0.5, -(0.75**0.5)], [0.75**0.5, 0.5]])
    moved[:, 2] = moved[:, 2] @ turn.T  # by 60 degrees
    about = {"sigma": 0.25, "cos0": 0.4, "radius": 0.2, "r": None, "clean": features(clean)}
    quantity = TokensQuantity(directions=np.tile([1.0, 0.0], (3, 1)), **about)
    assert quantity.value(features(moved)) == pytest.approx(0.5, abs=0.02)
    assert quantity.value(features(turned(rng, n, [0.3] * 3))) > 0.99
    upper = quantity.upper(features(moved), 0.001)
    assert 0.5 < upper < 0.65, "a bound of .65 is shown to be false, one of .5 is not"
    assert quantity.bound(0.1) == 0.4
    assert quantity.bound(0.3) == -1


def test_images_are_as_alike_as_the_tokens_in_which_they_differ_most() -> None:
    rng = np.random.default_rng(6)
    means = {index: turned(rng, 50, [1.0, 2.0, 0.1]).mean(axis=0) for index in range(5)}
    texts = {index: direction(features(mean[None])[0], 50, 3) for index, mean in means.items()}
    spread, nearest = compare(vectors_of(texts), 3)
    assert spread is not None
    vectors = {index: vector.reshape(3, 2) for index, vector in vectors_of(texts).items()}
    pairs = {
        index: [min((mine * theirs).sum(axis=1)) for other, theirs in vectors.items() if other != index]
        for index, mine in vectors.items()
    }
    for index, cosines in pairs.items():
        assert nearest[index] == pytest.approx(np.clip(max(cosines), -1, 1), abs=1e-3)
    assert spread.between == pytest.approx(np.mean([np.clip(some, -1, 1) for some in pairs.values()]), abs=1e-3)


def test_tables_have_the_column_of_tokens_only_where_there_are_some() -> None:
    about = (0, "a", 1, -1, None, "tokens", 0.2, "fixed", 900, 0, 0, 0.5, 1.0, 1000, 0.5, "{}")
    table = make_certify_rows([CertifyFact(*about, token_r=[0.5, 0.75])])
    assert table.column("token_r").to_pylist() == [[0.5, 0.75]]
    assert "token_r" not in make_certify_rows([CertifyFact(*about)]).column_names


def test_no_share_of_tokens_is_rounded_up_to_all_of_them() -> None:
    share = TokenShare(radius=0.1, worst=0.4996, typical=0.7, kept=0.9996)
    summary = SimpleNamespace(tokens=24, at_tokens=[share], min_cos=0.5, risk=SimpleNamespace(alpha=0.001))
    ((_, worst, _, kept),) = _by_token(SimpleNamespace(summary=summary))[0].rows
    assert (worst, kept) == ("0.499", "99.9%")


def test_the_curve_of_few_copies_is_of_all_tokens_at_once_as_the_radius_is() -> None:
    """Any of the tokens may be the one that few copies turn away: each has its share of the error here as well."""
    config = SimpleNamespace(sigma=0.25, deployed=256, at=[], min_cos=0.5, bounding=SimpleNamespace(alpha=0.01))
    row = {"r": 0.9, "radius": 0.3, "nearest": None, "token_r": [0.9] * 64, "paper_s": None, "fcsb_s": None}
    for point in _curve([row], config)[:4]:
        assert point.deployed == deployed_feature_cos(0.9, point.eps / 0.25, 256, 0.01 / 64)
    alone = _curve([{**row, "token_r": None}], config)[0].deployed
    assert alone == deployed_feature_cos(0.9, 0.0, 256, 0.01)


def test_the_curve_keeps_the_cosine_up_to_the_radius_whatever_the_norm_alone_would_keep() -> None:
    """The claim joint certifies further than the bound of the norm that its curve rests on."""
    config = SimpleNamespace(sigma=0.25, deployed=None, at=[0.3], min_cos=0.5)
    row = {"r": 0.2, "radius": 0.3, "nearest": None, "paper_s": None, "fcsb_s": None}
    kept = {point.eps: point.ours for point in _curve([row], config)}
    assert all(cosine >= 0.5 for eps, cosine in kept.items() if eps <= 0.3)
    assert all(cosine < 0.5 for eps, cosine in kept.items() if eps > 0.3)
