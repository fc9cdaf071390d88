"""Balls and projections: membership is exact, not up to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.attacks import ThreatModel, parse_eps, parse_norm, project
from robustvlm.attacks.threat import pixel_box, random_start
from robustvlm.errors import UserError

radii = st.floats(1e-4, 0.5)
seeds = st.integers(0, 2**32)


@given(seeds, radii)
def test_every_float_of_the_box_is_in_the_ball_and_the_next_one_is_not(seed, eps):
    x0 = torch.rand(50, generator=torch.Generator().manual_seed(seed))
    low, high = pixel_box(x0, eps)
    assert ((x0.double() - low.double()) <= eps).all()
    assert ((high.double() - x0.double()) <= eps).all()
    beyond = torch.nextafter(high, torch.full_like(high, 2.0))
    assert (((beyond.double() - x0.double()) > eps) | (beyond > 1)).all()


@given(seeds, radii, st.sampled_from(["Linf", "L2"]))
def test_projection_lands_in_ball_and_range_and_leaves_inner_points_alone(seed, eps, norm):
    draws = torch.Generator().manual_seed(seed)
    x0 = torch.rand(4, 3, 5, 5, generator=draws)
    threat = ThreatModel(norm, eps)
    x = project(x0 + torch.randn(x0.shape, generator=draws), x0, threat)
    delta = (x.double() - x0.double()).flatten(1)
    size = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    assert (size <= eps).all()
    assert x.min() >= 0
    assert x.max() <= 1
    near = x0 + (x - x0) * 0.5
    assert torch.allclose(project(near, x0, threat), near, atol=1e-7)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_random_starts_repeat_with_their_seed_and_fill_the_ball(norm):
    x0 = torch.full((1, 3, 8, 8), 0.5)
    threat = ThreatModel(norm, 0.1)
    first, again, other = (random_start(x0, threat, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    size = (first - x0).abs().max() if norm == "Linf" else (first - x0).norm()
    assert 0.09 < size <= 0.1


def test_lists_of_eps_are_sorted():
    assert [text for text, _ in parse_eps("4/255,1/255")] == ["1/255", "4/255"]
    assert parse_eps("8/255")[0][1] == 8 / 255


@pytest.mark.parametrize(
    ("text", "said"),
    [("4/255,1/255,4/255", "'4/255' is '4/255' again"), ("0.25,1/4", "'1/4' is the same as '0.25'")],
)
def test_a_radius_that_stands_twice_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_eps(text)


@pytest.mark.parametrize("text", ["0", "-1/255", "abc", "1/0", "", "1/255,,2/255", "nan", "inf", "0/255"])
def test_bad_eps_is_refused_in_one_line(text):
    with pytest.raises(UserError) as error:
        parse_eps(text)
    assert "\n" not in str(error.value)


def test_eps_in_grey_levels_is_recognised():
    with pytest.raises(UserError, match="8/255"):
        ThreatModel("Linf", 8.0)


def test_norm_spellings():
    assert {parse_norm(text) for text in ("Linf", "linf", "inf", "L_inf")} == {"Linf"}
    with pytest.raises(UserError, match="expected Linf or L2"):
        parse_norm("L1")
