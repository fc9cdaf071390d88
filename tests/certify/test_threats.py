"""Threats: moves that add up, noise of the stated law, bounds that the worst classifier attains, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import binom, kstest

from robustvlm.certify import vote_radius
from robustvlm.certify.noise import noise_chunk
from robustvlm.certify.threats import FAMILIES, THREATS, Move, Noise, find_threat, read_noise
from robustvlm.certify.threats.base import fresh_draws
from robustvlm.errors import UserError
from tests.certify.threat_worlds import ELLIPSOIDS, WORLDS

ALPHA = 0.05
MOVES = [name for name, threat in THREATS.items() if isinstance(threat, Move)]


def moves_of(name: str) -> Move:
    threat = find_threat(name)
    assert isinstance(threat, Move)
    return threat


def test_every_threat_has_a_worst_case() -> None:
    # A share of votes alone says nothing of an angle (tests/certify/test_rotation.py).
    assert sorted([*WORLDS, "rotation"]) == sorted([*THREATS, *ELLIPSOIDS])
    assert {name.partition("@")[0] for name in ELLIPSOIDS} == set(FAMILIES)


@pytest.mark.parametrize("name", MOVES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), size=st.floats(0.1, 1.5))
def test_moves_add_up(name: str, seed: int, size: float) -> None:
    """What T0 rests on: the attacker's move (whole shifts) and then the noise's is one move by the sum."""
    threat, draws = moves_of(name), torch.Generator().manual_seed(seed)
    pixels = torch.rand(2, 3, 7, 6, generator=draws, dtype=torch.float64)
    first, second = (size * torch.randn(2, 2, threat.moves, generator=draws, dtype=torch.float64)).unbind(0)
    if name == "translation":
        first = (8 * first).round()
        second = 5 * second
    one = threat.move(threat.move(pixels, first), second)
    assert torch.allclose(one, threat.move(pixels, first + second), rtol=1e-9, atol=1e-12)
    assert torch.allclose(threat.move(pixels, torch.zeros_like(first)), pixels, rtol=0, atol=1e-15)


def test_shifts_by_parts_of_a_pixel_do_not_add_up() -> None:
    """Which is why only whole ones are certified."""
    shift, half = moves_of("translation"), torch.tensor([[0.0, 0.5]])
    row = torch.arange(4.0).view(1, 1, 1, 4)
    assert not torch.equal(shift.move(shift.move(row, half), half), shift.move(row, 2 * half))


@pytest.mark.parametrize("name", WORLDS)
def test_the_bound_is_what_the_worst_classifier_keeps(name: str) -> None:
    """At the true radius half of the copies are left, and the bound of the true share says just that."""
    world, n = WORLDS[name](), 200_000
    torch.manual_seed(0)
    share = float(world.kept(world.noise.fresh(world.clean.expand(n, -1, -1, -1))).double().mean())
    threat, sigma = world.noise.threat, world.noise.sigma
    assert threat.reach(share, 0.5, sigma) == pytest.approx(world.truth, rel=0.02)
    assert threat.least(share, world.truth, sigma) == pytest.approx(0.5, abs=0.01)
    assert threat.needed(0.5, world.truth, sigma) == pytest.approx(share, abs=0.01)
    # And an attack that goes a little further wins.
    beyond = world.attack(world.truth * 1.01)
    left = float(world.kept(world.noise.fresh(beyond.expand(n, -1, -1, -1))).double().mean())
    assert left < 0.5


@pytest.mark.parametrize("name", WORLDS)
@given(p=st.floats(0.01, 0.999), share=st.floats(0.5, 0.99), eps=st.floats(0.0, 2.0))
def test_reach_least_and_needed_are_one_bound(name: str, p: float, share: float, eps: float) -> None:
    threat, sigma = find_threat(name), 0.5
    reach = threat.reach(p, share, sigma)
    if reach > 0:
        assert threat.least(p, reach * (1 - 1e-9), sigma) >= share - 1e-9
        assert threat.least(p, reach * 1.001 + 1e-6, sigma) <= share
        assert threat.needed(share, reach * (1 - 1e-9), sigma) <= p + 1e-9
    assert threat.least(p, eps, sigma) <= p + 1e-12


def radii(counts: np.ndarray, world_name: str, n: int) -> np.ndarray:
    noise = WORLDS[world_name]().noise
    known = {int(c): vote_radius(int(c), n, noise.sigma, ALPHA, threat=noise.threat.name) for c in np.unique(counts)}
    return np.array([known[int(count)] for count in counts])


@pytest.mark.parametrize("name", WORLDS)
def test_radii_exceed_the_truth_in_no_more_runs_than_alpha(name: str) -> None:
    """10,000 runs against the worst classifier; radii 15 % and 30 % too large are found out by the same count."""
    world, runs, n = WORLDS[name](), 10_000, 200
    torch.manual_seed(1)
    counts = np.concatenate(
        [
            world.kept(world.noise.fresh(world.clean.expand(500 * n, -1, -1, -1))).view(500, n).sum(dim=1).numpy()
            for _ in range(runs // 500)
        ]
    )
    found = radii(counts, name, n)
    assert (found > world.truth).sum() <= binom.ppf(0.9999, runs, ALPHA)
    assert np.median(found) > 0.75 * world.truth
    for planted in (1.15, 1.3):
        assert (planted * found > world.truth).sum() > binom.ppf(0.9999, runs, 2 * ALPHA)


def test_uniform_noise_has_the_stated_spread() -> None:
    noise = read_noise("l1=0.25")
    values = noise.fresh(torch.zeros(1000, 3, 4, 4), torch.Generator().manual_seed(0)).flatten().double().numpy()
    width = math.sqrt(3) * 0.25
    assert values.std() == pytest.approx(0.25, rel=0.02)
    assert kstest(values, "uniform", args=(-width, 2 * width)).pvalue > 1e-4


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), d=st.integers(1, 6), scale=st.floats(0.01, 1.0))
def test_cubes_overlap_in_what_the_l1_bound_says_at_least(seed: int, d: int, scale: float) -> None:
    """The exact overlap of the cubes of noise, of which no classifier can take away more."""
    width, delta = 1.0, scale * np.random.default_rng(seed).standard_normal(d)
    overlap = np.prod(np.clip(1 - np.abs(delta) / (2 * width), 0, None))
    sigma = width / math.sqrt(3)
    assert find_threat("l1").least(1.0, float(np.abs(delta).sum()), sigma) <= overlap + 1e-12


@pytest.mark.parametrize("kind", ["normal", "bits"])
def test_chunks_of_noise_follow_from_their_address(kind: str) -> None:
    one = noise_chunk(7, 3, (3, 2), kind=kind)  # type: ignore[arg-type]
    assert torch.equal(one, noise_chunk(7, 3, (3, 2), kind=kind))  # type: ignore[arg-type]
    assert not torch.equal(one, noise_chunk(7, 4, (3, 2), kind=kind))  # type: ignore[arg-type]
    assert one.shape == (32, 3, 2)
    assert one.dtype == (torch.int64 if kind == "bits" else torch.float32)


@pytest.mark.parametrize("source", ["chunk", "torch"])
def test_words_are_uniform_over_all_64_bits(source: str) -> None:
    if source == "chunk":
        words = torch.cat([noise_chunk(1, i, (200,), kind="bits") for i in range(20)]).flatten()
    else:
        words = fresh_draws(
            find_threat("8bit"), torch.zeros(1, 3, 200, 200), torch.Generator().manual_seed(0)
        ).flatten()
    assert kstest((words.double() * 2.0**-64 + 0.5).numpy(), "uniform").pvalue > 1e-4
    low = ((words & 0xFF).double() + torch.rand(len(words), generator=torch.Generator().manual_seed(0))) / 256
    assert kstest(low.numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("name", [*THREATS, *ELLIPSOIDS])
def test_gradients_pass_the_noise(name: str) -> None:
    """Attacks on a deployed model climb through it."""
    noise = Noise(find_threat(name), 0.2)
    pixels = torch.randint(0, 256, (2, 3, 4, 5)).float() / 255
    pixels.requires_grad_()
    noise.fresh(pixels).square().sum().backward()
    assert pixels.grad is not None
    assert bool(pixels.grad.isfinite().all())
    assert float(pixels.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", MOVES)
def test_an_audit_tries_moves_of_every_direction_within_the_radius(name: str) -> None:
    threat, radius = moves_of(name), 2.2
    tried = threat.inside(radius, 60)
    assert tried.shape[1] == threat.moves
    lengths = np.linalg.norm(tried, axis=1)
    assert lengths.max() <= radius + 1e-12
    assert lengths.max() >= 0.9 * radius - 0.2
    assert np.linalg.norm(tried.mean(axis=0)) < 0.1 * radius  # on all sides


def test_the_radius_of_a_half_space_is_that_of_the_theorem() -> None:
    p = float(ndtr(1.1))
    assert find_threat("brightness").reach(p, 0.5, 0.2) == pytest.approx(0.2 * 1.1)
    assert find_threat("gamma").reach(p, 0.75, 0.2) == pytest.approx(0.2 * (1.1 - float(ndtri(0.75))))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("brightnes=0.2", "did you mean 'brightness'"),
        ("brightness=big", "sigma must be a number, got 'big'"),
        ("8bit=1.5", "at most 1 "),
        ("translation=0", "above 0"),
        ("nan", "sigma must be above 0"),
    ],
)
def test_noise_that_is_none_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_noise(text)


@pytest.mark.parametrize(
    "text",
    ["0.25", "8bit=0.1", "ellipsoid@1,1,2.5=0.2", "spectrum@2,1=0.1", "l1=0.5", "translation=4.0", "light=0.2"],
)
def test_noise_is_written_as_it_is_read(text: str) -> None:
    assert read_noise(str(read_noise(text))) == read_noise(text)


def test_colour_is_about_three_channels() -> None:
    """One channel would be broadcast to three, an image of another shape than was given."""
    with pytest.raises(UserError, match="3 channels"):
        read_noise("colour=0.2").fresh(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize("name", sorted([*THREATS, *ELLIPSOIDS]))
def test_no_share_stays_above_one(name: str) -> None:
    """Of a rule that never answers, whose share needed is 1, nothing is kept; it used to end in an error."""
    assert vote_radius(990, 1000, 0.2, 0.001, share=1.0, threat=name) == 0.0


def test_far_shifts_are_listed_without_all_the_others() -> None:
    """A radius of 20,000 pixels holds a billion whole shifts."""
    radius = 20_000.3
    found = moves_of("translation").inside(radius, 500)
    length = np.linalg.norm(found, axis=1)
    assert len(np.unique(found, axis=0)) == 500
    assert radius - 0.01 < length.min() <= length.max() <= radius
    assert (found == found.round()).all()
    quarters = {(bool(down > 0), bool(right > 0)) for down, right in found}
    assert len(quarters) == 4
