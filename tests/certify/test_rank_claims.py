"""Claims that a class or a text stays among the first k: against encoders whose true radius is known."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from robustvlm.certify import Job, SamplingEngine
from robustvlm.certify.claims import CLAIMS, Materials
from robustvlm.certify.claims.recall import RecallAtRadius, RecallQuantity, RecallRadius
from robustvlm.certify.claims.topk import TopAtRadius, TopQuantity, TopVotes
from robustvlm.certify.classes import CountedVotes
from robustvlm.certify.means import log_gains, mix
from robustvlm.certify.ranks import rank_bets, rank_shift
from robustvlm.errors import UserError

ALPHA = 0.05
RUNS = [pytest.param(300, id="light"), pytest.param(10_000, id="heavy", marks=pytest.mark.slow)]


def fed(certifier, pilot, estimation):
    certifier.take(pilot)
    certifier.take(estimation)
    return certifier.finding()


@pytest.mark.parametrize(
    ("k", "rivals", "share", "against"),
    [(1, 1, 0.5, 0.3), (2, 2, 0.4, 0.5), pytest.param(3, 6, 0.25, 0.6, marks=pytest.mark.slow)],
)
def test_a_class_leaves_the_first_k_no_sooner_than_certified(k, rivals, share, against):
    """The worst encoder: the class on one side of the shift, its first k rivals finely mixed on the other; 10,000 runs.

    With more rivals than k, all as strong, which of them count is seen in the estimation votes alone.
    """
    rng, runs, n, pilot = np.random.default_rng(k), 10_000, 120, 40
    shares = np.array([share, *([against / rivals] * rivals), 1.0 - share - against])
    text = np.eye(len(shares))
    first = against * k / rivals
    truth = rank_shift(share, first, k)  # k rivals together reach k times the class's share
    assert k * norm.cdf(norm.ppf(share) - truth) == pytest.approx(norm.cdf(norm.ppf(first) + truth), abs=1e-6)
    false = 0
    counts = rng.multinomial(n, shares, size=runs)
    pilots = rng.multinomial(pilot, shares, size=runs)
    largest = 0.0
    for seen, before in zip(counts, pilots, strict=True):
        certifier = TopVotes(text=text, k=k, own=0, sigma=1.0, alpha=ALPHA, n=n + pilot, n_pilot=pilot)
        found = fed(certifier, np.repeat(text, before, axis=0), np.repeat(text, seen, axis=0))
        if found.prediction == 0:
            false += found.radius > truth
            largest = max(largest, found.radius)
    assert binom.sf(false - 1, runs, ALPHA) > 1e-3
    assert largest > 0.5 * truth


@pytest.mark.parametrize(
    "runs", [pytest.param(300, id="light"), pytest.param(10_000, id="heavy", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("k", "rivals", "share", "against"), [(1, 1, 0.5, 0.3), (2, 2, 0.4, 0.5), (3, 6, 0.25, 0.6)])
def test_a_radius_is_confirmed_falsely_no_oftener_than_alpha(k, rivals, share, against, runs):
    """The worst encoder again, asked at its true radius, looked at after every chunk."""
    rng, n, pilot, alpha = np.random.default_rng(20 + k), 160, 40, 0.2
    shares = np.array([share, *([against / rivals] * rivals), 1.0 - share - against])
    text, truth = np.eye(len(shares)), rank_shift(share, against * k / rivals, k)
    false = 0
    for _ in range(runs):
        certifier = TopAtRadius(
            text=text, radius=truth + 1e-9, k=k, own=0, sigma=1.0, alpha=alpha, n=n + pilot, n_pilot=pilot
        )
        found = fed_until(certifier, text[rng.choice(len(shares), size=n + pilot, p=shares)])
        false += found.prediction == 0 and found.radius > 0
    assert binom.sf(false - 1, runs, alpha) > 1e-3


def fed_until(certifier, rows):
    """Hand over rows as they are wanted, until the certifier wants no more."""
    used = 0
    while (wanted := certifier.request()) is not None:
        certifier.take(rows[used : used + wanted.sure])
        used += wanted.sure
    return certifier.finding()


@pytest.mark.parametrize("factor", [1.15, 1.3])
def test_the_simulation_notices_a_question_at_a_smaller_radius(factor):
    """A fault that makes radii 15 % or 30 % too large certifies what is false, almost always with enough copies."""
    text, shares = np.eye(3), np.array([0.7, 0.2, 0.1])
    truth, rng, false = rank_shift(0.7, 0.2, 1), np.random.default_rng(30), 0
    for _ in range(20):
        certifier = TopAtRadius(
            text=text, radius=truth / factor, k=1, own=0, sigma=1.0, alpha=0.05, n=20_200, n_pilot=200
        )
        false += fed_until(certifier, text[rng.choice(3, size=20_200, p=shares)]).radius > 0
    assert binom.sf(false - 1, 20, 0.05) < 1e-6


def test_one_test_stands_for_all_sets_of_rivals():
    """The wealth of the set with the most votes is the least of those of every set."""
    rng, text, k = np.random.default_rng(31), np.eye(6), 3
    rows = text[rng.choice(6, size=264, p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05])]
    rows[70:73] = np.nan
    certifier = TopAtRadius(text=text, radius=0.1, k=k, own=0, sigma=1.0, alpha=1e-9, n=264, n_pilot=200)
    certifier.take(rows[:200])
    t, order, bets = certifier.parts, certifier._rivals, certifier.bets
    certifier.take(rows[200:232])
    certifier.take(rows[232:])
    votes = np.where(np.isnan(rows[200:]).any(axis=1), -1, rows[200:].argmax(axis=1))
    wealth = []
    for part in combinations(order[k - t :], t):
        lost = np.isin(votes, part) | (votes < 0)
        gains = [
            log_gains(np.where(lost, 0.0, np.where(votes == 0, 1.0, middle)), null)
            for middle, null in zip(bets.middle, bets.nulls, strict=True)
        ]
        wealth.append(float(mix(np.ravel(gains))))
    counts = certifier._counts
    rivals = int(certifier._share(counts, t)) + 64 - int(counts.sum())
    assert bets.wealth(int(counts[0]), rivals, 64) == pytest.approx(min(wealth))


@given(
    own=st.floats(0.05, 0.95), split=st.floats(0.01, 0.99), t=st.integers(1, 4), a=st.floats(0.0, 3.0),
    at=st.floats(0.01, 0.99), behind=st.floats(0.01, 0.99),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_mean_score_never_promises_more_than_the_bound(own, split, t, a, at, behind):
    """Whatever shares the pilot saw, a mean score above its null means that t p'_y exceeds the votes of T."""
    bets = rank_bets(own, split * (1.0 - own), t, a)
    rivals = behind * (1.0 - at)
    mean = at + (1.0 - at - rivals) * bets.middle
    bound = norm.cdf(norm.ppf(1.0 - rivals) - a) + t * norm.cdf(norm.ppf(at) - a)
    assert (bound > 1.0 - 1e-9) or (mean <= bets.nulls + 1e-9).all()


def test_easy_questions_take_few_copies_and_hopeless_ones_are_given_up():
    text, rng = np.eye(4), np.random.default_rng(32)
    rows = text[rng.choice(4, size=10_000, p=[0.85, 0.05, 0.05, 0.05])]
    for kind in (TopAtRadius, RecallAtRadius):

        def ask(radius, kind=kind):
            found = kind(text=text, radius=radius, k=2, own=0, sigma=1.0, alpha=0.001, n=10_000, n_pilot=200)
            return fed_until(found, rows)

        easy, hard = ask(0.5), ask(3.0)
        assert (easy.radius, easy.stop) == (0.5, "certified")
        assert easy.n <= 500
        assert hard.radius == 0.0
        assert hard.stop == "futile"
        assert hard.n < 2000


def test_rivals_that_are_chosen_by_the_pilot_add_radius_beyond_the_sum_of_all():
    """One strong rival and many weak ones: the second place is safe although the first is far away."""
    text, votes = np.eye(6), np.array([300, 560, 40, 40, 30, 30])
    certifier = TopVotes(text=text, k=2, own=0, sigma=1.0, alpha=0.001, n=1100, n_pilot=100)
    found = fed(certifier, np.repeat(text, votes // 10, axis=0), np.repeat(text, votes, axis=0))
    assert certifier.parts == 1
    assert found.radius > rank_shift(0.3, 0.6, 2)


def test_one_class_of_two_is_the_two_sided_bound_of_cohen():
    assert rank_shift(0.9, 0.05, 1) == pytest.approx(0.5 * (norm.ppf(0.9) - norm.ppf(0.05)), abs=1e-6)
    certifier = TopVotes(text=np.eye(3), k=1, sigma=0.5, alpha=0.001, n=1100, n_pilot=100)
    rows = np.eye(3)[[0] * 9 + [1]]
    found = fed(certifier, np.tile(rows, (10, 1)), np.tile(rows, (100, 1)))
    plain = CountedVotes(classes=3, sigma=0.5, alpha=0.0005, n=1000, n_pilot=100)
    plain.take(np.tile(rows.argmax(1)[:, None], (10, 1)))
    plain.take(np.tile(rows.argmax(1)[:, None], (100, 1)))
    assert found.radius == pytest.approx(plain.finding().radius, abs=0.01)


def test_failed_copies_count_for_the_rivals():
    text = np.eye(3)
    rows, lost = np.tile(text[[0, 0, 0, 1]], (50, 1)), np.full((20, 3), np.nan)

    def radius(estimation):
        certifier = TopVotes(text=text, k=1, sigma=1.0, alpha=0.01, n=20 + len(estimation), n_pilot=20)
        return fed(certifier, rows[:20], estimation).radius

    assert radius(np.concatenate([rows, lost])) == radius(np.concatenate([rows, np.tile(text[1], (20, 1))]))


@pytest.mark.parametrize(
    "runs", [pytest.param(300, id="light"), pytest.param(10_000, id="heavy", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("distance", [0.8, 1.5])
def test_a_rank_is_confirmed_falsely_no_oftener_than_alpha(distance, runs):
    """The step of the next test, asked at its true radius, looked at after every chunk."""
    rng, n, pilot, alpha = np.random.default_rng(40), 160, 40, 0.2
    text = np.eye(5)
    steps = np.stack([text[0], (text[1] + text[2]) / np.sqrt(2.0)])
    truth, false = distance - norm.ppf(np.sqrt(0.5) / (1.0 + np.sqrt(0.5))), 0
    for _ in range(runs):
        certifier = RecallAtRadius(
            text=text, radius=truth + 1e-9, k=2, own=0, sigma=1.0, alpha=alpha, n=n + pilot, n_pilot=pilot
        )
        found = fed_until(certifier, steps[(rng.random(n + pilot) > norm.cdf(distance)).astype(int)])
        false += found.prediction == 0 and found.radius > 0
    assert binom.sf(false - 1, runs, alpha) > 1e-3


@pytest.mark.parametrize("distance", [0.2, 0.8, 1.5])
def test_an_entry_leaves_the_k_nearest_no_sooner_than_certified(distance):
    """A step between the entry's own vector and the middle of k rivals: their margins fall below zero together."""
    rng, runs, n, pilot = np.random.default_rng(5), 20_000, 80, 20
    text = np.eye(5)
    near, far = text[:1], (text[1:2] + text[2:3]) / np.sqrt(2.0)
    truth = distance - norm.ppf(np.sqrt(0.5) / (1.0 + np.sqrt(0.5)))
    radius = []
    for count in range(n + 1):
        certifier = RecallRadius(text=text, k=2, own=0, sigma=1.0, alpha=ALPHA, n=n + pilot, n_pilot=pilot)
        rows = np.concatenate([np.repeat(near, count, axis=0), np.repeat(far, n - count, axis=0)])
        radius.append(fed(certifier, np.repeat(near, pilot, axis=0), rows).radius)
    drawn = np.array(radius)[rng.binomial(n, norm.cdf(distance), runs)]
    assert binom.sf((drawn > truth).sum() - 1, runs, ALPHA) > 1e-3
    assert drawn.max() > 0.7 * truth


def test_a_gallery_of_equals_is_certified_no_oftener_than_alpha():
    """Every entry is as near as every other: no rank is safe, whichever the pilot picks."""
    rng, runs, n, pilot = np.random.default_rng(6), 1500, 60, 20
    text, certified = np.eye(8), 0
    for _ in range(runs):
        certifier = RecallRadius(text=text, k=3, sigma=1.0, alpha=0.2, n=n + pilot, n_pilot=pilot)
        rows = text[rng.integers(8, size=n + pilot)]
        certified += fed(certifier, rows[:pilot], rows[pilot:]).radius > 0
    assert binom.sf(certified - 1, runs, 0.2) > 1e-3


def test_more_places_never_cost_radius_and_fewer_copies_do():
    rng = np.random.default_rng(7)
    text = rng.normal(size=(9, 12))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    rows = text[0] + 0.4 * rng.normal(size=(700, 12))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def radii(k):
        certifier = RecallRadius(text=text, k=k, own=0, sigma=0.25, alpha=0.001, n=700, n_pilot=200, deployed=500)
        found = fed(certifier, rows[:200], rows[200:])
        return found.radius, found.columns["deployed_radius"]

    found = [radii(k) for k in (1, 2, 4, 8)]
    assert found == sorted(found)
    assert all(deployed <= ideal for ideal, deployed in found)


@pytest.mark.parametrize("rows", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_an_audit_calls_a_true_rank_broken_no_oftener_than_alpha(rows):
    """The k-th rival is exactly level with the label (a value of 0); further rivals behind make the choice noisy."""
    rng, runs, n = np.random.default_rng(8), 400, 60
    text = np.eye(5)
    shares = np.array([0.3, 0.3 + rows / 3, 0.3 - rows / 3, 0.06, 0.04]) if rows else np.full(5, 0.2)
    value = shares[0] - np.sort(shares[1:])[-2]
    assert value >= 0
    top = TopQuantity(text=text, label=0, k=2, radius=1.0, logit_scale=1.0)
    near = RecallQuantity(text=text, label=0, k=2, radius=1.0)
    broken = np.zeros(2)
    for _ in range(runs):
        features = text[rng.choice(5, size=n, p=shares)]
        broken += [top.upper(features, 0.1) < 0, near.upper(features, 0.1) < 0]
    assert (binom.sf(broken - 1, runs, 0.1) > 1e-3).all()
    lost = text[np.repeat([1, 2, 3], 400)]
    assert top.upper(lost[np.random.default_rng(9).permutation(1200)], 0.001) < 0


@pytest.mark.parametrize("kind", [TopVotes, RecallRadius])
def test_a_label_that_is_chosen_after_a_look_meets_other_noise(kind):
    """The pilot's label depends on the image's own class, so that the class decides the claim as settings do."""
    seen = {0: [], 1: []}

    def encode(noisy):
        return torch.nn.functional.normalize(noisy.flatten(1)[:, :3], dim=1)

    def keep(job, stage, rows):
        assert stage in ("pilot", "estimation")
        seen[job.label].append(rows)

    def certifier(job):
        return kind(text=np.eye(3), k=2, own=job.label, sigma=0.5, alpha=0.05, n=96, n_pilot=32)

    for own in seen:
        engine = SamplingEngine(encode, seed=0, lanes=64, settings="the run's", keep=keep)
        list(engine.run([Job("a", 0, torch.full((3, 2, 2), 0.5), own)], certifier))
    first, second = (np.concatenate(seen[own]) for own in (0, 1))
    assert first.shape == second.shape
    assert not (first == second).any()


def test_nothing_is_promised_of_few_copies():
    """What abstains keeps a certified class; that a class stays among k is another statement."""
    asked = SimpleNamespace(deployed=64, abstains_at=None, radius=None, prompts=None)
    assert CLAIMS["topk"].deployed_rule(asked).endswith("with 64 copies, this run states nothing")
    tested = SimpleNamespace(deployed=64, abstains_at=None, radius=0.1, prompts=None)
    assert "the abstaining prediction" in CLAIMS["class"].deployed_rule(tested)


def test_ranks_that_say_nothing_are_refused():
    with pytest.raises(UserError, match=r"among the first 3 of 3 says nothing.*--top 2|top=2"):
        TopVotes(text=np.eye(3), k=3, sigma=1.0, alpha=0.05, n=20, n_pilot=5)
    with pytest.raises(UserError, match="says nothing"):
        CLAIMS["recall"].plan(_Asked(), Materials(text=np.eye(4)))


class _Asked:
    top, sigma, samples, n_pilot, alpha, radius, deployed = 4, 0.25, 400, 40, 0.001, None, None
