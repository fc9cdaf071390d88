"""Prototypes: alpha in closed form against a search, the bound on the angle, several of a class."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.defenses.immunity.prototypes import (
    align,
    angle,
    automatic_xi,
    fit_prototypes,
    spherical_kmeans,
    text_prototypes,
)
from robustvlm.errors import UserError


def directions(count: int, dim: int, seed: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=draws, dtype=torch.float64), dim=-1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, math.pi))
def test_alpha_is_the_smallest_that_keeps_the_angle(seed: int, xi: float) -> None:
    v, t = directions(2, 6, seed)
    mu, alpha = align(v, t, xi)
    assert float(angle(mu, t)) <= xi + 1e-9
    if float(alpha) > 1e-6:  # any smaller one breaks the bound
        less = F.normalize((1 - (alpha - 1e-6)) * v + (alpha - 1e-6) * t, dim=-1)
        assert float(angle(less, t)) > xi
    else:
        assert float(angle(v, t)) <= xi + 1e-5


def test_prototype_is_the_best_point_of_the_ball_around_the_text() -> None:
    v, t = directions(2, 3, 3)
    mu, _ = align(v, t, 0.4)
    rivals = directions(20_000, 3, 4)
    inside = rivals[angle(rivals, t) <= 0.4]
    assert len(inside) > 100
    assert float((inside @ v).max()) <= float(mu @ v) + 1e-9


def test_ends_of_the_range() -> None:
    v, t = directions(2, 5, 1)
    assert torch.allclose(align(v, t, 0.0)[0], t)
    assert torch.allclose(align(v, t, math.pi)[0], v)
    assert torch.allclose(align(-t, t, 0.3)[0], t)  # opposite vectors span no great circle
    with pytest.raises(UserError, match="between 0 and 180"):
        align(v, t, -0.1)


def test_automatic_xi_is_an_eighth_of_the_way_for_the_median_class() -> None:
    text = directions(5, 8, 2).float()
    features = directions(5, 8, 7).float()
    found = fit_prototypes(features, torch.arange(5), text)
    assert found.xi == pytest.approx(automatic_xi(features, torch.arange(5), text))
    theta = float(angle(features.double(), text.double()).median())
    assert found.xi == pytest.approx(theta / 8, rel=1e-5)
    away = math.sin(theta - theta / 8)
    assert float(found.alpha.flatten().median()) == pytest.approx(away / (away + math.sin(theta / 8)), abs=0.05)


def test_class_without_images_keeps_its_text_and_unknown_images_do_not_count() -> None:
    text = torch.eye(3)
    found = fit_prototypes(torch.eye(3), torch.tensor([0, 0, -1]), text)
    assert torch.equal(found.vectors[1:, 0], text[1:])
    assert found.alpha[1:].tolist() == [[1.0], [1.0]]
    assert found.counts.tolist() == [2, 0, 0]
    with pytest.raises(UserError, match="no image of a known class"):
        fit_prototypes(torch.eye(3), torch.full((3,), -1), text)
    with pytest.raises(UserError, match="at least 1 prototype"):
        fit_prototypes(torch.eye(3), torch.arange(3), text, per_class=0)


def test_identical_images_have_a_finite_concentration() -> None:
    found = fit_prototypes(torch.eye(2).repeat(5, 1), torch.tensor([0, 1] * 5), torch.eye(2))
    assert found.kappa.isfinite().all()


def test_kmeans_finds_two_apart_groups_whatever_the_order() -> None:
    draws = torch.Generator().manual_seed(0)
    groups = [F.normalize(centre + 0.05 * torch.randn(30, 4, generator=draws), dim=-1) for centre in torch.eye(4)[:2]]
    rows = torch.cat(groups)[torch.randperm(60, generator=draws)]
    centres = spherical_kmeans(rows, 2, seed=0)
    assert sorted(centres.argmax(dim=1).tolist()) == [0, 1]
    assert float(centres.amax(dim=1).min()) > 0.99
    assert torch.equal(centres, spherical_kmeans(rows, 2, seed=0))


def test_more_prototypes_than_images_repeat() -> None:
    assert torch.equal(spherical_kmeans(torch.eye(3)[:1], 3, seed=0), torch.eye(3)[:1].expand(3, -1))


def test_text_prototypes_are_the_texts() -> None:
    text = torch.eye(3)
    assert torch.equal(text_prototypes(text).vectors[:, 0], text)
    assert text_prototypes(text).alpha.tolist() == [[1.0]] * 3
