"""Open-set radii and the deployed open-set rule hold every class and every antibody, and err as rarely as stated."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from robustvlm.certify import OpensetRadius, predict_openset
from robustvlm.certify.openset import openset_score

SETTINGS = {"sigma": 0.25, "alpha": 0.01, "n": 1000, "n_pilot": 200}


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def certified(vectors: np.ndarray, tau: float, rows: np.ndarray, radius: float | None = None) -> tuple[str, float]:
    certifier, used = OpensetRadius(vectors=vectors, tau=tau, radius=radius, **SETTINGS), 0
    while (wanted := certifier.request()) is not None:
        certifier.take(rows[used : used + wanted.sure])
        used += wanted.sure
    found = certifier.finding()
    return str(found.claim), found.radius


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]))
def test_where_the_claims_hold_the_score_is_on_the_side_of_the_pilot(seed: int, classes: int, antibodies: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(classes, antibodies, 4))
    pilot = unit(rng.normal(size=4)) * rng.uniform(0.3, 1.0)
    tau = openset_score(pilot, vectors) + rng.normal(scale=0.1)
    claims, score = OpensetRadius(vectors=vectors, tau=tau, **SETTINGS)._chosen(pilot)
    assert score == pytest.approx(max(min(float(v @ pilot) for v in own) for own in vectors))
    assert claims.accepts == (score >= tau)
    near = pilot + 0.2 * rng.normal(size=(300, 4))
    for z in near[(near @ claims.vectors.T >= claims.least).all(axis=1)]:
        assert (openset_score(z, vectors) >= tau) == claims.accepts


# The last direction decides first, though at the image itself the first one leads: its features vary most.
ROWS = unit(np.array([0.4, 0.4, 0.8]) + np.array([0.02, 0.5, 0.02]) * np.random.default_rng(0).normal(size=(1000, 3)))
LEADS, VARIES = np.array([1.0, 0.0, 0.1]), np.array([0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("side", "tau", "vectors"),
    [
        # Rejected: the runner-up crosses tau first. Accepted: the antibody that decides is not the one that is lost.
        ("openset-reject", 0.7, np.array([[LEADS], [VARIES]])),
        ("openset-accept", 0.1, np.array([[LEADS - [0.0, 0.0, 0.2], VARIES]])),
    ],
)
def test_the_radius_is_the_smallest_over_classes_or_antibodies(side: str, tau: float, vectors: np.ndarray) -> None:
    ways = vectors.reshape(2, 1, 1, 3)
    alone = [certified(way, tau, ROWS) for way in ways]
    assert [claim for claim, _ in alone] == [side, side]
    assert alone[0][1] > 1.5 * alone[1][1] > 0.0
    pilot = ROWS[: SETTINGS["n_pilot"]].mean(axis=0)
    values = [float(way[0, 0] @ pilot) for way in ways]
    assert (values[0] > values[1]) == (side == "openset-reject"), "the pilot names the way that is lost last"
    claim, radius = certified(vectors, tau, ROWS)
    assert (claim, radius) == (side, pytest.approx(alone[1][1], abs=1e-6))
    between = 0.5 * (alone[0][1] + alone[1][1])
    assert certified(ways[0], tau, ROWS, between)[1] == between
    assert certified(vectors, tau, ROWS, between)[1] == 0.0


# The deployed rule


LINE = np.eye(1)


@pytest.mark.parametrize(
    ("wrong", "vectors"),
    [("accept", np.array([LINE, -LINE])), ("reject", np.array([[LINE[0], -LINE[0]]]))],
)
@pytest.mark.parametrize(("n0", "share"), [(4, 4), (6, 6), (6, 3), (10, 5), (10, 4), (8, 4), (9, 5), (9, 6)])
def test_at_the_threshold_the_rule_errs_as_rarely_as_stated(
    wrong: str, vectors: np.ndarray, n0: int, share: int
) -> None:
    """Signs by the toss of a coin: the score is 0, and whichever way the first half goes is chosen. All sequences."""
    alpha0, half, errs = 1.001 * 2.0**-share, n0 // 2, 0
    for first, second in product(range(half + 1), range(n0 - half + 1)):
        signs = np.concatenate([np.arange(half) < first, np.arange(n0 - half) < second])
        said = predict_openset(np.where(signs, 1.0, -1.0)[:, None], vectors, 0.0, alpha0)
        errs += (said == wrong) * comb(half, first) * comb(n0 - half, second)
    assert errs / 2**n0 <= alpha0
    assert (errs > 0) == (share <= n0 - half)  # where the second half can decide, as often as it may


def around(rng: np.random.Generator, n0: int) -> np.ndarray:
    """Return unit features of mean (0.6, 0, 0, 0): 0.8 to either side along one of the other axes."""
    rows = np.zeros((n0, 4))
    rows[:, 0] = 0.6
    rows[np.arange(n0), rng.integers(1, 4, n0)] = 0.8 * rng.choice([-1.0, 1.0], n0)
    return rows


VECTORS = np.array([
    [[0.5, 1.0, 0.0, 0.0], [1.5, 0.0, 1.0, 0.0], [1.4, 0.0, 0.0, 1.0]],
    [[-1.0, 0.0, 1.0, 0.0], [-1.5, 0.0, 0.0, 1.0], [0.9, 0.0, 0.0, 0.3]],
    [[-1.2, 0.0, 0.0, 1.0], [0.8, 0.3, 0.0, 0.0], [-0.9, 1.0, 0.0, 0.0]],
])  # fmt: skip
"""One antibody of the leading class is at 0.3, its others far above; the other classes are far below."""


def test_one_antibody_and_one_class_at_the_threshold_are_enough_to_abstain() -> None:
    rng, runs, alpha0 = np.random.default_rng(1), 400, 0.05
    said = [predict_openset(around(rng, 300), VECTORS, 0.3, alpha0) for _ in range(runs)]
    for wrong in ("accept", "reject"):
        assert binom.sf(said.count(wrong) - 1, runs, alpha0) > 1e-3
    rows = around(rng, 600)
    assert [predict_openset(rows, VECTORS, tau, alpha0) for tau in (0.0, 0.6)] == ["accept", "reject"]
