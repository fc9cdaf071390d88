"""Ellipsoids (T29): the law of the noise, lengths and half-axes, maps, exact values at half-spaces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import binom, kstest

from robustvlm.certify import vote_radius
from robustvlm.certify.threats import Ellipsoid, find_threat, read_noise
from robustvlm.certify.threats.ellipsoids import cosines
from robustvlm.errors import UserError
from tests.certify.threat_worlds import WORLDS

NAMES = ["ellipsoid@1,2,4", "spectrum@4,2,1"]


def ellipsoid(name: str) -> Ellipsoid:
    threat = find_threat(name)
    assert isinstance(threat, Ellipsoid)
    return threat


@pytest.mark.parametrize("name", NAMES)
def test_noise_has_the_law_of_the_theorem(name: str) -> None:
    """Its covariance is sigma^2 B^T D^2 B, by a second computation: whitened copies are N(0, I) in every coordinate."""
    noise, threat = read_noise(f"{name}=0.3"), ellipsoid(name)
    copies = noise.fresh(torch.zeros(20_000, 3, 2, 3), torch.Generator().manual_seed(0)).double()
    if name.startswith("spectrum"):
        basis = torch.kron(cosines(2), cosines(3))
        coordinates = copies.flatten(2) @ basis.T
    else:
        coordinates = copies.flatten(2)
    white = (coordinates.flatten(1) / threat.scales((3, 2, 3)).double().flatten() / 0.3).numpy()
    assert np.abs(np.cov(white.T) - np.eye(18)).max() < 0.05
    assert kstest(white.ravel()[:50_000], "norm").pvalue > 1e-4


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_lengths_are_those_of_the_shifted_law(name: str, seed: int) -> None:
    """|Sigma^(-1/2) d| by the inverse of the covariance, as a matrix, and between the half-axes times |d|."""
    threat, shape = ellipsoid(name), (3, 4, 5)
    change = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.kron(cosines(4), cosines(5)) if name.startswith("spectrum") else torch.eye(20, dtype=torch.float64)
    full = torch.block_diag(basis, basis, basis)
    covariance = full.T @ torch.diag(threat.scales(shape).double().flatten() ** 2) @ full
    flat = change.flatten()
    length = float(threat.length(change))
    assert length == pytest.approx(float(flat @ torch.linalg.solve(covariance, flat)) ** 0.5, rel=1e-9)
    least, most = threat.half_axes(shape)
    assert float(flat.norm()) / most <= length <= float(flat.norm()) / least
    assert torch.allclose(threat.back(threat.forth(change)), change, atol=1e-12)


@pytest.mark.parametrize("name", [*NAMES, "ellipsoid@3,3,3", "spectrum@2"])
def test_the_ellipsoid_has_the_volume_of_the_ball(name: str) -> None:
    scales = ellipsoid(name).scales((3, 8, 6)).double()
    assert float(scales.log().mean()) == pytest.approx(0.0, abs=1e-6)
    least, most = ellipsoid(name).half_axes((3, 8, 6))
    assert least <= float(scales.min()) <= float(scales.max()) <= most


def test_equal_scales_are_l2() -> None:
    rows, draws = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    plain = find_threat("l2").noisy(rows, draws, 0.2)
    assert torch.equal(ellipsoid("ellipsoid@2,2,2").noisy(rows, draws, 0.2), plain)
    changes = torch.randn(4, 3, 4, 4)
    assert torch.allclose(ellipsoid("spectrum@2,2").length(changes), changes.double().flatten(1).norm(dim=1), rtol=1e-6)


def test_noise_of_a_row_does_not_depend_on_its_batch() -> None:
    threat, rows, draws = ellipsoid("spectrum@4,1"), torch.rand(33, 3, 16, 16), torch.randn(33, 3, 16, 16)
    whole = threat.noisy(rows, draws, 0.2)
    pieces = torch.cat([threat.noisy(r, d, 0.2) for r, d in zip(rows.split(5), draws.split(5), strict=True)])
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("name", NAMES)
def test_a_half_space_in_any_direction_keeps_what_the_theorem_says(name: str) -> None:
    """Exact: the share of a half-space under the noise, at the worst point of the ellipsoid and at random ones."""
    threat, shape, sigma, edge = ellipsoid(name), (3, 3, 4), 0.3, 0.4
    draws = torch.Generator().manual_seed(3)
    normal = torch.randn(1, *shape, generator=draws, dtype=torch.float64)
    scales = threat.scales(shape).double()
    spread = float((scales * threat.forth(normal)).flatten().norm())  # of <normal, noise> / sigma
    share = float(ndtr(edge / (sigma * spread)))
    radius = threat.reach(share, 0.5, sigma)
    worst = threat.back(scales**2 * threat.forth(normal)) / spread
    assert float(threat.length(worst)) == pytest.approx(1.0)
    assert float((normal * worst).sum()) * radius == pytest.approx(edge, rel=1e-6)  # the edge is met just there
    for _ in range(200):
        change = torch.randn(1, *shape, generator=draws, dtype=torch.float64)
        change *= radius / float(threat.length(change))
        assert float((normal * change).sum()) <= edge * (1 + 1e-9)
        kept = float(ndtr((edge - float((normal * change).sum())) / (sigma * spread)))
        assert kept >= threat.least(share, radius, sigma) - 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_counting_l2_instead_would_be_noticed(name: str) -> None:
    """A fault that takes the l2 length for the ellipsoid's claims too much along the shortest half-axis."""
    world, runs, n, alpha = WORLDS[name](), 2000, 400, 0.05
    counts = np.random.default_rng(0).binomial(n, ndtr(1.25), size=runs)
    radii = np.array([vote_radius(int(c), n, world.noise.sigma, alpha, threat=name) for c in counts])
    shape = tuple(world.clean.shape[1:])
    flat = float((world.attack(1.0) - world.clean).flatten().norm())  # what length one is worth in l2 here
    assert flat < 1.0, shape
    assert (radii > world.truth).sum() <= binom.ppf(0.9999, runs, alpha)
    assert (radii / flat > world.truth).mean() > 0.5


def test_a_map_is_spread_and_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("map.npy", np.array([[1.0, 4.0]]))
    threat = ellipsoid("ellipsoid@map.npy")
    assert threat.name.startswith("ellipsoid@map.npy#")
    assert threat.scales((3, 2, 4))[0].tolist() == [[0.5, 0.5, 2.0, 2.0]] * 2
    again = ellipsoid(threat.name)
    assert again == threat
    assert torch.equal(again.scales((3, 2, 4)), threat.scales((3, 2, 4)))
    Path("map.txt").write_text("1 4\n4, 16\n")
    assert ellipsoid("ellipsoid@map.txt").scales((1, 2, 2)).flatten().tolist() == [0.25, 1.0, 1.0, 4.0]
    np.save("map.npy", np.array([[1.0, 9.0]]))
    assert ellipsoid("ellipsoid@map.npy") != threat
    with pytest.raises(UserError, match=r"the map 'map.npy' has changed"):
        find_threat(threat.name).scales((3, 3, 4))  # type: ignore[attr-defined]
    Path("map.npy").unlink()
    assert find_threat(threat.name).name == threat.name  # a record can be read without it
    channels = np.ones((3, 1, 1))
    channels[2] = 8.0
    np.save("deep.npy", channels)
    deep, channels_of = (ellipsoid(f"ellipsoid@{written}") for written in ("deep.npy", "1,1,8"))
    assert torch.equal(deep.scales((3, 2, 2)), channels_of.scales((3, 2, 2)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ellipsoid", "has scales: write ellipsoid@R,G,B"),
        ("ellipsoid@", "has scales: write"),
        ("elipsoid@1,1,1", "did you mean 'ellipsoid'"),
        ("ellipsoid@1,0,1", "must be positive numbers"),
        ("ellipsoid@1,nan,1", "must be positive numbers"),
        ("ellipsoid@1,1,1e9", "differ by a factor of 1e"),
        ("ellipsoid@nowhere.npy", "'nowhere.npy' is neither"),
        ("spectrum@low", "cannot read the scales 'low'"),
    ],
)
def test_scales_that_are_none_are_refused_in_one_line(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        find_threat(name)
    assert "\n" not in str(caught.value)


def test_scales_of_other_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="scales of 2 channels, and images have 3"):
        read_noise("ellipsoid@1,2=0.1").fresh(torch.rand(1, 3, 2, 2))
    np.save("large.npy", np.ones((4, 4)))
    with pytest.raises(UserError, match="does not fit images"):
        read_noise("ellipsoid@large.npy=0.1").fresh(torch.rand(1, 3, 2, 2))
    np.save("flat.npy", np.ones(4))
    with pytest.raises(UserError, match="has 1 dimensions"):
        find_threat("ellipsoid@flat.npy")
    Path("words.txt").write_text("no numbers")
    with pytest.raises(UserError, match=r"cannot read the map 'words\.txt'"):
        find_threat("ellipsoid@words.txt")


@pytest.mark.filterwarnings("error")
def test_maps_of_other_things_than_numbers_are_refused_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("complex.npy", np.array([[1 + 1j, 2.0]]))
    with pytest.raises(UserError, match=r"cannot read the map 'complex\.npy' \(complex numbers\)"):
        find_threat("ellipsoid@complex.npy")
    Path("empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"must be positive numbers, got 'empty\.txt'"):
        find_threat("ellipsoid@empty.txt")
    with pytest.raises(UserError, match="differ by a factor of inf"):
        find_threat("spectrum@1e-300,1e300")
