"""How alike images are under noise: cosines without the noise in the means, margins that hold for every attack."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.commands.certify.spread import compare, direction, margin, vectors_of


def noisy_means(ideal: np.ndarray, copies: int, seed: int) -> dict[int, np.ndarray]:
    """Means of unit features whose expectation is `ideal` [N, D]: along it, and a random direction at right angles."""
    draws = np.random.default_rng(seed)
    found = {}
    for index, mean in enumerate(ideal):
        length = np.linalg.norm(mean)
        side = draws.normal(size=(copies, len(mean)))
        side -= np.outer(side @ mean, mean) / length**2
        side *= np.sqrt(1 - length**2) / np.linalg.norm(side, axis=1, keepdims=True)
        found[index] = (mean + side).mean(axis=0)
    return found


def test_the_noise_in_the_means_does_not_make_images_look_apart() -> None:
    """Twenty images of one and the same smoothed feature, of length 0.3, from 40 copies each."""
    ideal = np.tile(np.eye(64)[0] * 0.3, (20, 1))
    found, plain = [], []
    for seed in range(20):
        means = noisy_means(ideal, 40, seed)
        spread, _ = compare(vectors_of({index: direction(mean, 40) for index, mean in means.items()}))
        assert spread is not None
        found.append(spread.between)
        rows = np.stack([mean / np.linalg.norm(mean) for mean in means.values()])
        plain.append((np.square(rows.sum(axis=0)).sum() - 20) / (20 * 19))
    assert np.mean(plain) < 0.82, "the means' own cosines would have said so"
    assert np.mean(found) == pytest.approx(1, abs=0.03)


def test_cosines_between_images_by_hand() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    spread, nearest = compare(dict(enumerate(rows)))
    cosines = rows @ rows.T
    others = cosines[~np.eye(7, dtype=bool)].reshape(7, 6)
    assert spread is not None
    assert spread.between == pytest.approx(others.mean(), abs=1e-6)
    assert list(nearest.values()) == pytest.approx(others.max(axis=1), abs=1e-6)
    assert spread.nearest == pytest.approx(others.max(axis=1).mean(), abs=1e-6)
    assert compare({0: rows[0]}) == (None, {})


@given(st.integers(2, 6), st.floats(0, 3.0), st.integers(0, 10_000))
def test_no_feature_within_the_certified_angle_has_less_margin(dimensions: int, angle: float, seed: int) -> None:
    draws = np.random.default_rng(seed)
    own, other, side = draws.normal(size=(3, dimensions))
    own, other = own / np.linalg.norm(own), other / np.linalg.norm(other)
    side -= (side @ own) * own
    if np.linalg.norm(side) < 1e-6:
        return
    side /= np.linalg.norm(side)
    turned = (
        np.arccos(np.cos(angle)) * draws.uniform()
    )  # what a cosine says of the angle, which near 0 is not all of it
    attacked = np.cos(turned) * own + np.sin(turned) * side
    least = margin(np.array([np.cos(angle)]), np.array([own @ other]))[0]
    assert attacked @ own - attacked @ other >= least - 1e-9


def test_the_margin_is_met_by_an_attack_towards_the_other() -> None:
    towards = np.cos(0.7 - 0.2)
    assert margin(np.array([np.cos(0.2)]), np.array([np.cos(0.7)]))[0] == pytest.approx(np.cos(0.2) - towards)


def test_a_damaged_text_is_left_out() -> None:
    good = direction(np.array([0.6, 0.8]), 10)
    assert list(vectors_of({0: "?", 1: good, 2: good[:3]})) == [1]
