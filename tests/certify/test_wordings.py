"""All wordings of the classes at once (T23): the least bound over pairs of texts, and votes that no wording changes."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from robustvlm.certify.claims.class_ import ClassRadius
from robustvlm.certify.claims.vote import VoteRadius, votes_for
from robustvlm.certify.claims.wordings import AnyWordingQuantity, AnyWordingRadius, SureVoteQuantity, SureVoteRadius
from robustvlm.certify.wordings import Wordings
from robustvlm.errors import UserError

ALPHA = 0.05


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def wordings(seed, counts=(3, 3, 3), dim=6, spread=0.4, aligned=False):
    rng = np.random.default_rng(seed)
    centres = np.eye(dim)[: len(counts)]
    return Wordings(
        tuple(unit(c + spread * rng.standard_normal((n, dim))) for c, n in zip(centres, counts, strict=True)), aligned
    )


def features(seed, n, dim=6, spread=0.5):
    rng = np.random.default_rng(seed)
    return unit(np.eye(dim)[0] + spread * rng.standard_normal((n, dim)))


def choices(words):
    """Return every table of class texts [K, D] that may be used."""
    return words.tables if words.aligned else [np.stack(one) for one in product(*words.vectors)]


def fed(certifier, rows):
    start = 0
    while (wanted := certifier.request()) is not None:
        certifier.take(rows[start : start + wanted.sure])
        start += wanted.sure
    return certifier.finding()


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=10, deadline=None)
def test_votes_and_radii_are_those_that_every_single_choice_keeps(seed, aligned):
    words, rows = wordings(seed, counts=(2, 2, 2), aligned=aligned), features(seed, 300)
    sure = words.sure(rows, 0)
    each = [votes_for(rows, table, 0) for table in choices(words)]
    assert (sure == np.logical_and.reduce(each)).all()
    common = {"sigma": 0.5, "alpha": ALPHA, "n": 300, "n_pilot": 100, "text": np.stack([t[0] for t in words.vectors])}
    found = fed(AnyWordingRadius(wordings=words, **common), rows)
    single = [fed(ClassRadius(**{**common, "text": table}, baselines=False), rows) for table in choices(words)]
    if found.prediction == 0 and all(one.prediction == 0 for one in single):
        assert found.radius == pytest.approx(min(one.radius for one in single), abs=1e-6)
    by_vote = fed(SureVoteRadius(wordings=words, **common), rows)
    votes = [fed(VoteRadius(**{**common, "text": table}), rows) for table in choices(words)]
    if by_vote.prediction == 0 and all(one.prediction == 0 for one in votes):
        assert by_vote.radius <= min(one.radius for one in votes) + 1e-12


def test_other_wordings_are_other_claims_and_meet_other_noise():
    common = {"sigma": 0.5, "alpha": ALPHA, "n": 300, "n_pilot": 100, "text": np.eye(6)[:3]}
    keys = {AnyWordingRadius(wordings=wordings(seed, aligned=way), **common).key for seed in (0, 1) for way in (0, 1)}
    assert len(keys | {ClassRadius(**common).key}) == 5


def test_a_class_with_a_text_of_another_is_never_certified():
    shared = Wordings((np.eye(3)[:2], np.eye(3)[1:]), aligned=False)
    common = {"sigma": 0.5, "alpha": ALPHA, "n": 300, "n_pilot": 100, "text": np.eye(3)[:2]}
    rows = np.tile(np.eye(3)[:1], (300, 1))
    assert fed(AnyWordingRadius(wordings=shared, **common), rows).radius == 0.0
    assert fed(SureVoteRadius(wordings=shared, **common), np.tile(unit([[0.6, 0.8, 0]]), (300, 1))).radius == 0.0


N, PILOT = 120, 40


def certified_by_signs(signs, kind):
    """Return the radius in sigmas from signs [N, M]: whether copies put wording i of class 0 before that of the rival.

    The text pairs are e_i and -e_i, so that the margin of pair i is the sign of feature i, scaled.
    """
    count = signs.shape[1]
    words = Wordings((np.eye(count), -np.eye(count)), aligned=True)
    text = np.stack([unit(np.ones(count)), unit(-np.ones(count))])
    certifier = kind(wordings=words, text=text, sigma=1.0, alpha=ALPHA, n=N + PILOT, n_pilot=PILOT)
    return fed(certifier, unit(np.vstack([np.ones((PILOT, count)), signs]))).radius


def by_count(kind, count):
    """Return the radius for every number of copies on the right side of one pair, with all others always there."""
    found = []
    for wins in range(N + 1):
        signs = np.ones((N, count))
        signs[wins:, 0] = -1.0
        found.append(certified_by_signs(signs, kind))
    return np.array(found)


def attacked(edges):
    """Return a distance at which an attack leaves less than half of the copies before all edges at once."""
    edges = np.asarray(edges)
    steps = np.linspace(0.0, 4.0, 4001)[:, None]
    ways = [unit(norm.pdf(edges) / norm.cdf(edges)), *np.eye(len(edges))]
    kept = [norm.cdf(edges - steps * way).prod(axis=1) for way in ways]
    return min(float(steps[np.argmax(one < 0.5), 0]) for one in kept if (one < 0.5).any())


@pytest.mark.parametrize("kind", [AnyWordingRadius, SureVoteRadius])
@pytest.mark.parametrize(
    "edges",
    [
        [0.8] * 3,
        *(pytest.param(one, marks=pytest.mark.slow) for one in ([0.6] * 12, [0.3, 1.0], [0.05] * 4, [1.0])),
    ],
)
def test_few_certificates_over_many_wordings_are_false_without_a_union(kind, edges):
    """20,000 runs: each wording is a half-space along an axis of its own, and attains T0; all are bounded at alpha."""
    rng, runs, edges = np.random.default_rng(0), 20_000, np.array(edges)
    table = by_count(kind, len(edges))
    below = rng.standard_normal((N, runs, len(edges))) < edges
    if kind is AnyWordingRadius:
        wins, true = below.sum(axis=0).min(axis=1), edges.min()
    else:
        wins, true = below.all(axis=2).sum(axis=0), attacked(edges)
    false = int((table[wins] > true).sum())
    assert binom.sf(false - 1, runs, ALPHA) > 1e-3
    assert (table[wins] > 0).mean() > 0.05 or true < 0.1


@pytest.mark.parametrize("kind", [AnyWordingRadius, SureVoteRadius])
def test_the_radius_of_many_wordings_is_that_of_the_counts_of_the_simulation(kind):
    rng = np.random.default_rng(1)
    table = by_count(kind, 4)
    for shift in (1.0,):
        below = rng.standard_normal((N, 4)) < shift
        wins = below.sum(axis=0).min() if kind is AnyWordingRadius else below.all(axis=1).sum()
        assert certified_by_signs(np.where(below, 1.0, -1.0), kind) == pytest.approx(table[wins], abs=1e-6)


def test_the_quantities_of_an_audit_are_those_of_the_worst_wording():
    words, rows = wordings(3), features(3, 400)
    rows[0] = np.nan
    margins = [rows[1:].mean(axis=0) @ unit(a - b) for a in words.vectors[0] for k in (1, 2) for b in words.vectors[k]]
    facts = {"text": np.stack([t[0] for t in words.vectors]), "label": 0, "radius": 0.1, "wordings": words}
    # A failed copy counts as no feature in the mean.
    assert AnyWordingQuantity(**facts).value(rows[1:]) == pytest.approx(min(margins))
    assert SureVoteQuantity(**facts, logit_scale=10.0).value(rows) == (words.sure(rows, 0).sum() + 1) / 400


@pytest.mark.parametrize(
    ("vectors", "aligned", "said"),
    [
        ((np.eye(2),), True, "at least two classes"),
        ((np.eye(2), np.eye(2)[:0]), False, "at least one text"),
        ((np.eye(2), np.eye(2)[:1]), True, "as many for every class"),
    ],
)
def test_what_are_no_wordings_is_refused(vectors, aligned, said):
    with pytest.raises(UserError, match=said):
        Wordings(vectors, aligned)
