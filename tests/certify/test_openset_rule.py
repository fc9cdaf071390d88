"""Decisions with a threshold for each class: the linear claims imply them, and radii agree with the plain case."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.certify import OpensetRadius, OpensetRule, RuleRadius
from robustvlm.certify.bands import ell_band
from robustvlm.certify.openset import contrast_vectors
from robustvlm.certify.shapes import halfspace_shift
from robustvlm.errors import UserError


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def random_rule(
    rng: np.random.Generator, *, antibodies: int, per_class: int, floor: float | None = None
) -> OpensetRule:
    classes = np.repeat(np.arange(4), per_class)
    return OpensetRule(
        unit(rng.normal(size=(len(classes), 5))),
        classes,
        unit(rng.normal(size=(antibodies, 5))),
        float(rng.uniform(0, 1)),
        rng.uniform(-0.5, 0.9, size=4),
        floor,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([None, -0.3, 0.1, 0.5]),
)
def test_where_the_claims_hold_the_decision_is_that_of_the_pilot(
    seed: int, antibodies: int, per_class: int, floor: float | None
) -> None:
    rng = np.random.default_rng(seed)
    rule = random_rule(rng, antibodies=antibodies, per_class=per_class, floor=floor)
    pilot = unit(rng.normal(size=5)) * rng.uniform(0.3, 1.0)
    claims = rule.claims(pilot)
    assert claims.accepts == (rule.margin(pilot) >= 0.0)
    spread = np.concatenate([np.full(100, 0.05), np.full(100, 0.4)])[:, None]
    near = pilot + spread * rng.normal(size=(200, 5))
    kept = [z for z in near if (claims.vectors @ z >= claims.least).all()]
    for z in kept:
        assert (rule.margin(z) > 0.0) == claims.accepts


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, -0.3, 0.1, 0.5]))
def test_the_score_is_the_minimum_of_its_contrasts(seed: int, floor: float | None) -> None:
    rng = np.random.default_rng(seed)
    rule = random_rule(rng, antibodies=3, per_class=2, floor=floor)
    z = unit(rng.normal(size=5)) * rng.uniform(0.3, 1.0)
    against = (rule.antibodies @ z).max()
    wanted = (rule.prototypes @ z).max() - rule.weight * (against if floor is None else max(0.0, against - floor))
    each = [(vectors @ z + shifts).min() for vectors, shifts in map(rule.contrasts, rule.prototypes)]
    assert max(each) == pytest.approx(wanted)
    assert rule.score(z) == pytest.approx(wanted)
    vector, shift = rule.nearest(z)
    assert (rule.prototypes @ z).max() - vector @ z + shift == pytest.approx(wanted)


def test_claims_use_only_the_thresholds_that_matter() -> None:
    # The third class lies opposite and has a threshold that nothing could reach: it must not spoil the acceptance.
    prototypes = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    rule = OpensetRule(prototypes, np.arange(3), np.zeros((0, 2)), 0.0, np.array([0.5, 0.6, 2.0]))
    claims = rule.claims(np.array([0.9, 0.1]))
    assert claims.accepts
    assert claims.least.max() < 0.7


def certified(certifier: OpensetRadius | RuleRadius, rows: np.ndarray) -> tuple[str | None, float]:
    used = 0
    while (wanted := certifier.request()) is not None:
        certifier.take(rows[used : used + wanted.sure])
        used += wanted.sure
    return certifier.finding().claim, certifier.finding().radius


@pytest.mark.parametrize("tau", [0.3, 0.95])
@pytest.mark.parametrize("radius", [None, 0.05])
def test_equal_thresholds_give_about_the_radius_of_one_threshold(tau: float, radius: float | None) -> None:
    rng = np.random.default_rng(0)
    prototypes, antibodies = unit(rng.normal(size=(3, 6))), unit(rng.normal(size=(2, 6)))
    rows = unit(prototypes[0] + 0.2 * rng.normal(size=(1000, 6)))
    rule = OpensetRule(prototypes, np.arange(3), antibodies, 0.5, np.full(3, tau))
    common = {"sigma": 0.25, "alpha": 0.01, "n": 1000, "n_pilot": 200, "radius": radius}
    plain = certified(OpensetRadius(vectors=contrast_vectors(prototypes, antibodies, 0.5), tau=tau, **common), rows)
    ruled = certified(RuleRadius(rule=rule, **common), rows)
    assert ruled[0] == plain[0]
    # The pilot chooses by room at its mean, which is not the radius itself: that may cost a little.
    assert ruled[1] >= 0.9 * plain[1]
    assert plain[1] > 0.0


def test_one_threshold_for_each_vector_is_the_smallest_of_the_single_radii() -> None:
    rng = np.random.default_rng(1)
    rows = unit(np.array([1.0, 1.0, 1.0]) + 0.3 * rng.normal(size=(500, 3)))
    vectors, least, band = np.eye(3), np.array([0.1, 0.3, -0.2]), ell_band(500, 0.01)
    together = halfspace_shift(rows, vectors, lambda _: least, band)
    single = [
        halfspace_shift(rows, vector[None], lambda _, one=one: one, band)
        for vector, one in zip(vectors, least, strict=True)
    ]
    assert together == pytest.approx(min(single), abs=1e-6)


def test_rules_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="of all classes"):
        OpensetRule(np.eye(2), np.array([0, 0]), np.zeros((0, 2)), 0.0, np.zeros(2))
    with pytest.raises(UserError, match="must not be negative"):
        OpensetRule(np.eye(2), np.array([0, 1]), np.zeros((0, 2)), -1.0, np.zeros(2))
