"""Noise that is chosen for each image (T22): the choice, its certificate, and what the deployed rule answers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, norm

from robustvlm.certify.claims.class_ import ClassRadius
from robustvlm.certify.claims.local_noise import NoiseQuantity, answering_alpha, copies_for_noise
from robustvlm.certify.claims.vote import VoteRadius
from robustvlm.certify.classes import vote_predict
from robustvlm.certify.local_noise import LocalNoise, LocalRadius, choose_thresholds, read_local_noise, top_margins
from robustvlm.errors import UserError

ALPHA, TEXT = 0.05, np.eye(2)
SMALL, LARGE = 0.1, 0.4
LAW = LocalNoise((SMALL, LARGE), (0.5,), 0.2)
EDGES = [(0.1, 0.3), (0.3, 0.1), (0.15, 0.15), (0.02, 0.02)]
# What copies show: class 0 or 1, by a large margin (a vote for the larger noise) or by a small one.
SHOWN = np.array([[1.0, 0.0], [np.cos(0.7), np.sin(0.7)], [0.0, 1.0], [np.sin(0.7), np.cos(0.7)]])


def seen(z, level_edge, class_edge):
    """Return the features of copies at z: votes for the larger noise below one edge, class 0 below the other."""
    return SHOWN[2 * (z >= class_edge) + (z >= level_edge)]


def certified(rng, edges, kind=VoteRadius, n=200):
    """Return what one run certifies of the image at z = 0; edges are half-spaces, the worst there is for T0."""
    noise = copies_for_noise(n)
    certifier = LocalRadius(
        noise=LAW,
        text=TEXT,
        certifier=lambda i: kind(text=TEXT, sigma=LAW.sigmas[i], alpha=ALPHA / 2, n=n - noise, n_pilot=15),
        alpha=ALPHA,
        n=n - noise,
        n_noise=noise,
    )
    while (wanted := certifier.request()) is not None:
        certifier.take(seen(certifier.sigma * rng.standard_normal(wanted.sure), *edges))
    return certifier, certifier.finding()


def false_certificates(edges, runs, seed, kind=VoteRadius):
    rng, false, radii = np.random.default_rng(seed), 0, []
    for _ in range(runs):
        certifier, found = certified(rng, edges, kind)
        true = min(edges) if certifier.level == 1 and found.prediction == 0 else 0.0
        false += found.radius > true
        radii.append(found.radius)
    return false, float(np.mean(radii))


@pytest.mark.parametrize("edges", EDGES)
def test_few_certificates_of_the_worst_classifier_and_choice_are_false(edges):
    false, _ = false_certificates(edges, 300, seed=0)
    assert binom.sf(false - 1, 300, ALPHA) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "edges"),
    [*((VoteRadius, edges) for edges in EDGES), (ClassRadius, EDGES[2])],
)
def test_few_of_ten_thousand_certificates_are_false(edges, kind):
    false, mean = false_certificates(edges, 10_000, seed=1, kind=kind)
    assert binom.sf(false - 1, 10_000, ALPHA) > 1e-3
    assert mean > 0.0 or min(edges) < 0.05


def test_the_two_radii_are_those_of_cohen_at_half_of_alpha_and_the_lesser_counts():
    certifier, found = certified(np.random.default_rng(3), (0.3, 0.5))
    rest = 50 - certifier.choosing
    lower = beta.ppf(ALPHA / 2, certifier.votes, rest - certifier.votes + 1)
    assert found.columns["noise_radius"] == pytest.approx(LAW.at * norm.ppf(lower))
    wins = round(found.columns["votes"] * found.n)
    lower = beta.ppf(ALPHA / 2, wins, found.n - wins + 1)
    assert found.columns["level_radius"] == pytest.approx(LARGE * norm.ppf(lower), rel=1e-6)
    assert found.radius == min(found.columns["noise_radius"], found.columns["level_radius"]) > 0
    assert certifier.sigma == found.columns["noise_level"] == LARGE
    assert (found.n, found.n_pilot) == (135, 65)


class Columns(VoteRadius):
    """Has another certificate of the same claim beside it, as some do."""

    def finding(self):
        found = super().finding()
        return replace(found, columns=found.columns | {"mean_radius": found.radius})


def test_no_column_promises_more_than_the_choice_of_the_noise_keeps():
    rng = np.random.default_rng(5)
    found = [certified(rng, (0.02, 0.5), Columns)[1] for _ in range(40)]  # the level is nearly a coin flip
    promised = [one for one in found if one.columns["level_radius"] > one.columns["noise_radius"]]
    assert len(promised) > 20
    assert all(one.columns["mean_radius"] == one.radius == one.columns["noise_radius"] for one in promised)


def test_noise_after_the_choice_has_the_level_that_was_chosen():
    for edges, sigma in (((0.3, 0.5), LARGE), ((-0.3, 0.5), SMALL)):
        certifier, found = certified(np.random.default_rng(4), edges)
        assert certifier.sigma == sigma
        assert found.prediction == 0


def answers(rng, x, edges_of, n0, votes=True):
    """Return what one deployment answers at x, copy by copy: level by vote, then class by vote; None: nothing."""
    first = edges_of(x + LAW.at * rng.standard_normal(n0 // 2))
    counts = np.bincount(LAW.levels(first, TEXT), minlength=2)
    level = vote_predict(counts, ALPHA)
    if level is None:
        return None
    rest = edges_of(x + LAW.sigmas[level] * rng.standard_normal(n0 - n0 // 2))
    return vote_predict(np.bincount(rest.argmax(axis=1), minlength=2), answering_alpha(ALPHA, votes=votes))


@pytest.mark.slow
@pytest.mark.parametrize("slab", [0.05, 0.15])
def test_the_deployed_rule_answers_another_class_as_rarely_as_stated(slab):
    """A slab of class 1 at the edge of the choice: seen at the small noise alone, which is one wrong choice away."""
    rng, runs, wrong, answered = np.random.default_rng(5), 10_000, 0, 0
    edge = 0.15

    def shown(z):
        return SHOWN[2 * (np.abs(z - edge) < slab) + (z >= edge)]

    for _ in range(runs):
        noise = copies_for_noise(200)
        certifier = LocalRadius(
            noise=LAW, text=TEXT, alpha=ALPHA, n=150, n_noise=noise,
            certifier=lambda i: VoteRadius(text=TEXT, sigma=LAW.sigmas[i], alpha=ALPHA / 2, n=150, n_pilot=15),
        )  # fmt: skip
        while (wanted := certifier.request()) is not None:
            certifier.take(shown(certifier.sigma * rng.standard_normal(wanted.sure)))
        found = certifier.finding()
        if found.radius > 0:
            said = answers(rng, found.radius, shown, 60)
            wrong += said not in (None, found.prediction)
            answered += said is not None
    assert binom.sf(wrong - 1, runs, 2 * ALPHA) > 1e-3
    assert answered > 0


@given(st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_levels_are_counted_from_thresholds(thresholds, seed):
    law = LocalNoise(tuple(0.1 * (i + 1) for i in range(len(thresholds) + 1)), tuple(sorted(thresholds)), 0.1)
    rows = np.random.default_rng(seed).standard_normal((20, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    text = np.eye(4)[:3]
    near = np.sort(rows @ text.T, axis=1)
    wanted = [sum(near[i, -1] - near[i, -2] >= edge for edge in law.thresholds) for i in range(20)]
    assert law.levels(rows, text).tolist() == wanted
    assert read_local_noise(str(law)) == law


def test_failed_copies_vote_for_no_level_and_do_not_break_an_audit():
    rows = np.vstack([SHOWN[:1], np.full((1, 2), np.nan)])
    assert LAW.levels(rows, TEXT).tolist() == [1, -1]
    quantity = NoiseQuantity(noise=LAW, text=TEXT, level=1, radius=0.1)
    assert quantity.value(rows) == 1.0
    assert quantity.value(SHOWN) == 0.5
    assert np.isnan(top_margins(rows, TEXT)[1])


def test_thresholds_part_images_where_it_pays():
    rng = np.random.default_rng(6)
    sure, unsure = rng.normal(0.6, 0.02, (20, 200)), rng.normal(0.2, 0.02, (20, 200))
    gains = np.array([[0.1, 0.4]] * 20 + [[0.1, 0.0]] * 20)
    (edge,) = choose_thresholds(np.vstack([sure, unsure]), gains, 0.5)
    assert 0.2 < edge < 0.6
    assert choose_thresholds(sure, gains[:20], 0.5)[0] <= sure.min() + 0.02


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("0.1,0.2:0.5", "must be written"),
        ("0.1:0.5:0.1", "2 to 16 levels"),
        ("0.1,0.1:0.5:0.1", "each named once"),
        ("0.1,0.2:0.5,0.6:0.1", "need 1 thresholds"),
        ("0.1,0.2,0.3:0.6,0.5:0.1", "must not fall"),
        ("0.1,0.2:nan:0.1", "must be finite"),
    ],
)
def test_what_is_no_choice_of_noise_is_refused_in_a_line(written, said):
    with pytest.raises(UserError, match=said):
        read_local_noise(written)
