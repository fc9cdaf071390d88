"""The deployed rule with abstention: what it answers inside a certified radius, over both draws of noise (T10)."""

import numpy as np
import pytest
from scipy.stats import binom, norm

from robustvlm.certify import ClassRadius, VoteRadius, predict, vote_predict
from robustvlm.certify.classes import vote_p_value
from robustvlm.certify.deployed import (
    answered_margin_needed,
    answered_share_needed,
    class_margin_needed,
    least_copies,
    vote_share_needed,
)
from robustvlm.errors import UserError

RUNS, ALPHA = 20_000, 0.05
TEXT = np.eye(2)
DIAGONAL = np.sqrt(0.5) * np.array([[1.0, -1.0], [-1.0, 1.0]])
"""Features whose margin <f, v> to the rival is 1 and -1: of an encoder that is a half-space, the worst there is."""


def radius_by_count(kind, n, pilot):
    """Return the radius in sigmas for every count of estimation samples on the label's side."""
    found = []
    for count in range(n + 1):
        certifier = kind(text=TEXT, sigma=1.0, alpha=ALPHA, n=n + pilot, n_pilot=pilot)
        certifier.take(np.repeat(DIAGONAL[:1], pilot, axis=0))
        certifier.take(np.concatenate([np.repeat(DIAGONAL[:1], count, axis=0), np.repeat(DIAGONAL[1:], n - count, 0)]))
        found.append(certifier.finding().radius)
    return np.array(found)


def mean_answers(n0):
    """Return, by counts of the two halves, what the mean rule answers: class 0, the rival 1, or nothing (2)."""
    half = n0 // 2

    def rows(first, second):
        side = np.concatenate([np.arange(half) >= first, np.arange(n0 - half) >= second]).astype(int)
        return DIAGONAL[side]

    answers = [[predict(rows(a, b), TEXT, ALPHA) for b in range(n0 - half + 1)] for a in range(half + 1)]
    return np.array([[2 if answer is None else answer for answer in row] for row in answers])


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0])
def test_another_answer_inside_the_radius_is_as_rare_as_stated_by_vote(margin):
    """A half-space at distance `margin` sigmas, attacked across it by all that was certified, 20,000 times."""
    rng, n, n0 = np.random.default_rng(0), 60, 40
    radius = radius_by_count(VoteRadius, n, 10)[rng.binomial(n, norm.cdf(margin), RUNS)]
    votes = rng.binomial(n0, norm.cdf(margin - radius))
    said = np.array([2 if (k := vote_predict([c, n0 - c], ALPHA)) is None else k for c in range(n0 + 1)])[votes]
    false, wrong = radius > margin, said == 1
    assert binom.sf(false.sum() - 1, RUNS, ALPHA) > 1e-3  # the certificate by itself
    assert binom.sf((wrong & ~false).sum() - 1, RUNS, ALPHA / 2) > 1e-3  # the rule where it is true: half of alpha
    assert binom.sf((wrong & (radius > 0)).sum() - 1, RUNS, 1.5 * ALPHA) > 1e-3
    assert (said == 0).mean() > 0.02  # it does answer


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0])
def test_another_answer_inside_the_radius_is_as_rare_as_stated_by_mean(margin):
    rng, n, n0 = np.random.default_rng(1), 60, 40
    radius = radius_by_count(ClassRadius, n, 10)[rng.binomial(n, norm.cdf(margin), RUNS)]
    share = norm.cdf(margin - radius)
    said = mean_answers(n0)[rng.binomial(n0 // 2, share), rng.binomial(n0 - n0 // 2, share)]
    false, wrong = radius > margin, said == 1
    assert binom.sf(false.sum() - 1, RUNS, ALPHA) > 1e-3
    assert binom.sf((wrong & ~false).sum() - 1, RUNS, ALPHA) > 1e-3
    assert binom.sf((wrong & (radius > 0)).sum() - 1, RUNS, 2 * ALPHA) > 1e-3
    assert (said == 0).mean() > (0.02 if margin > 0.1 else 0.0)


def test_many_rivals_that_tie_with_the_certified_class_do_not_add_up():
    """At the edge of the ball every margin may be 0 at once; and the simulation finds a rule that cheats."""
    rng, n0, rivals = np.random.default_rng(2), 60, 12
    text = np.eye(rivals + 1)
    wrong = cheating = 0
    runs = 10_000
    lengths = np.full(rivals + 1, 1.0 / (rivals + 1))
    for _ in range(runs):
        rows = text[rng.choice(rivals + 1, size=n0, p=lengths)]  # one class each, all alike: every margin is 0
        label = predict(rows, text, ALPHA)
        wrong += label not in (None, 0)
        counts = rows.sum(axis=0)
        leader, weakest = int(counts.argmax()), int(counts.argmin())
        cheating += leader != 0 and vote_p_value(int(counts[leader]), int(counts[leader] + counts[weakest])) <= ALPHA
    assert binom.sf(wrong - 1, runs, ALPHA) > 1e-3
    assert binom.sf(cheating - 1, runs, ALPHA) < 1e-6


@pytest.mark.parametrize("others", [1, 2, 9])
def test_votes_split_among_rivals_answer_wrongly_at_most_half_as_often(others):
    """With more than half of the votes at x' the label loses significantly with probability alpha / 2 at most."""
    rng, n0, runs = np.random.default_rng(3), 33, 10_000
    votes = rng.multinomial(n0, [0.5, *([0.5 / others] * others)], size=runs)
    said = [vote_predict(row, ALPHA) for row in votes]
    assert binom.sf(sum(label not in (None, 0) for label in said) - 1, runs, ALPHA / 2) > 1e-3


@pytest.mark.parametrize(("n0", "alpha"), [(40, 0.05), (64, 0.001), (1001, 0.001)])
def test_the_share_at_which_votes_answer_is_exact(n0, alpha):
    share = answered_share_needed(n0, alpha, 0.01)
    least = next(c for c in range(n0 + 1) if vote_predict([c, n0 - c], alpha) == 0)
    assert binom.cdf(least - 1, n0, share) == pytest.approx(0.01, rel=1e-6)
    assert share >= vote_share_needed(n0, 0.01)
    # Whichever way the others vote, it answers.
    assert all(vote_predict([least, n0 - least - k, k], alpha) == 0 for k in range(0, n0 - least, 7))


@pytest.mark.parametrize("rivals", [1, 5])
def test_at_the_margin_needed_the_mean_rule_does_answer(rivals):
    """Scores of 0 and 1, the worst law of their mean; the exact binomial probability of failing is below alpha0."""
    n0, alpha, alpha0 = 120, 0.01, 0.05
    margin = answered_margin_needed(rivals, n0, alpha, alpha0)
    assert class_margin_needed(rivals, n0, alpha0) < margin < 1.0
    half, share = n0 // 2, 0.5 * (1.0 + margin)
    rows = lambda count: DIAGONAL[(np.arange(half) >= count).astype(int)]  # noqa: E731
    decides = [predict(np.concatenate([DIAGONAL[[0] * half], rows(c)]), TEXT, alpha) == 0 for c in range(half + 1)]
    undecided = binom.cdf(decides.index(True) - 1, half, share)
    assert decides == sorted(decides)
    assert rivals * (undecided + binom.cdf(half // 2, half, share)) <= alpha0
    rng = np.random.default_rng(4)
    spread = 0.5 * (1.0 + margin) + 0.5 * (1.0 - margin) * rng.uniform(-1.0, 1.0, (2000, n0))  # a milder law
    margins = 2.0 * spread - 1.0
    failed = 0
    for row in margins:
        # Features with that margin to the rival, and the rest off to the side.
        features = np.stack([row * np.sqrt(0.5), -row * np.sqrt(0.5), np.sqrt(1.0 - row**2)], axis=1)
        failed += predict(features, np.eye(3)[:2], alpha) != 0
    assert binom.sf(failed - 1, 2000, alpha0) > 1e-3


@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.001])
def test_no_fewer_copies_than_said_decide(alpha):
    by_mean, by_vote = least_copies(alpha), least_copies(alpha, votes=True)
    sure = np.repeat(DIAGONAL[:1], by_mean, axis=0)
    assert predict(sure, TEXT, alpha) == 0
    assert by_mean == 2 or predict(sure[:-1], TEXT, alpha) is None
    assert vote_predict([by_vote, 0], alpha) == 0
    assert vote_predict([by_vote - 1, 0], alpha) is None


def test_rules_that_never_answer_keep_no_radius():
    assert answered_margin_needed(5, 20, 0.001, 0.001) == answered_share_needed(8, 0.001, 0.001) == 1.0
    with pytest.raises(UserError, match="at least two copies"):
        answered_margin_needed(5, 1, 0.001, 0.001)
