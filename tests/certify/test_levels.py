"""Several noise levels at one alpha (T27): coverage on half-spaces, which attain T0, and the rule of all levels."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.stats import binom

from robustvlm.certify import vote_predict
from robustvlm.certify.levels import certify_levels, choose_level, unanimous
from robustvlm.errors import UserError

RUNS = [pytest.param(60, id="light"), pytest.param(10_000, id="heavy", marks=pytest.mark.slow)]
EDGE, TEXT = 0.1, np.eye(2)


def halfspace(rng: np.random.Generator, sigma: float, n: int, *, moved: float = 0.0) -> np.ndarray:
    """Features of an encoder that sees class 0 up to EDGE along one direction: it keeps it within EDGE at any noise."""
    beyond = moved + sigma * rng.standard_normal(n) > EDGE
    return np.asarray(TEXT[beyond.astype(int)])


@pytest.mark.parametrize("votes", [True, False], ids=["vote", "mean"])
@pytest.mark.parametrize("spend", ["pilot", "union"])
@pytest.mark.parametrize("runs", RUNS)
def test_no_radius_is_too_large_oftener_than_alpha(votes: bool, spend: str, runs: int) -> None:
    """Whatever level is chosen, the true radius is EDGE: known truth, a large alpha."""
    rng, alpha, false = np.random.default_rng(31), 0.2, 0
    for _ in range(runs):
        found = certify_levels(
            partial(halfspace, rng), TEXT, [0.05, 0.1, 0.2], n=150, n_pilot=10, alpha=alpha, votes=votes, spend=spend
        )
        false += found.radius > EDGE or (found.radius > 0.0 and found.label != 0)
    assert binom.sf(false - 1, runs, alpha) > 1e-3


def test_choosing_after_a_look_without_paying_is_noticed() -> None:
    """The largest of three radii at alpha each, as a fault would have it."""
    rng, alpha, false = np.random.default_rng(32), 0.2, 0
    for _ in range(300):
        radii = [
            certify_levels(partial(halfspace, rng), TEXT, [sigma], n=60, n_pilot=10, alpha=alpha).radius
            for sigma in (0.05, 0.1, 0.2)
        ]
        false += max(radii) > EDGE
    assert binom.sf(false - 1, 300, alpha) < 1e-4


def test_the_choice_of_the_pilot_costs_less_than_the_union() -> None:
    rng = np.random.default_rng(33)
    asked = {"text": TEXT, "sigmas": [0.03, 0.06, 0.12], "n": 1000, "n_pilot": 30, "alpha": 0.001}
    by_pilot, by_union = (
        np.mean([certify_levels(partial(halfspace, rng), **asked, spend=spend).radius for _ in range(10)])
        for spend in ("pilot", "union")
    )
    assert by_union < by_pilot < EDGE


@pytest.mark.parametrize("runs", RUNS)
def test_inside_the_radius_all_levels_together_answer_no_other_class(runs: int) -> None:
    """Near the edge the smallest noise decides nothing else, so no other class is answered oftener than alpha / 2."""
    rng, alpha, n0, wrong = np.random.default_rng(34), 0.2, 20, 0
    for _ in range(runs):
        said = []
        for sigma in (0.05, 0.2):
            votes = np.bincount(halfspace(rng, sigma, n0, moved=0.99 * EDGE).argmax(axis=1), minlength=2)
            answer = vote_predict(votes, alpha)
            said.append([-1 if answer is None else answer])
        wrong += int(unanimous(said)[0]) == 1
    assert binom.sf(wrong - 1, runs, alpha / 2) > 1e-3


def test_copies_are_drawn_once_and_counted() -> None:
    rng, drawn = np.random.default_rng(35), []

    def draw(sigma: float, n: int) -> np.ndarray:
        drawn.append((sigma, n))
        return halfspace(rng, sigma, n)

    by_pilot = certify_levels(draw, TEXT, [0.05, 0.1], n=101, n_pilot=10, alpha=0.01)
    assert (sum(n for _, n in drawn), by_pilot.copies) == (101, 101)
    drawn.clear()
    by_union = certify_levels(draw, TEXT, [0.05, 0.1], n=101, n_pilot=10, alpha=0.01, spend="union")
    assert sum(n for _, n in drawn) == by_union.copies == 100


def test_failed_copies_are_votes_for_none_and_bad_settings_are_refused() -> None:
    failed = np.full((50, 2), np.nan)
    assert choose_level({0.1: failed, 0.05: np.tile(TEXT[:1], (50, 1))}, TEXT, votes=True) == 0.05
    nothing = certify_levels(lambda _, n: np.full((n, 2), np.nan), TEXT, [0.1], n=50, n_pilot=10, alpha=0.1)
    assert (nothing.label, nothing.radius) == (-1, 0.0)
    for n, sigmas in ((20, [0.1, 0.2]), (100, []), (100, [0.0])):
        with pytest.raises(UserError):
            certify_levels(partial(halfspace, np.random.default_rng(0)), TEXT, sigmas, n=n, n_pilot=10, alpha=0.1)
