"""Rotations (T30): bilinear interpolation, the bound between angles, cells that cover, coverage, and exact answers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import binom
from torch.nn import functional as F

from robustvlm import Smoothed
from robustvlm.certify.claims import rotation as claims
from robustvlm.certify.claims.rotation import RotationRadius
from robustvlm.certify.engine import Encode, Job, Sampled, SamplingEngine
from robustvlm.certify.rotation import Cell, cells, lipschitz, rounding
from robustvlm.certify.threats import find_threat, read_noise
from robustvlm.certify.threats.plane import rotate
from robustvlm.defenses import smooth
from robustvlm.errors import UserError
from robustvlm.models import load_model

TEXT, SLOW = np.eye(2), pytest.mark.slow
KINDS = ["smooth", "noise", "edges", "line"]


def image_of(kind: str, seed: int, height: int = 9, width: int = 7) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    image = torch.rand(2, height, width, generator=draws, dtype=torch.float64)
    if kind == "smooth":
        image = F.avg_pool2d(F.pad(image[None], [1] * 4, mode="replicate"), 3, stride=1)[0]
    if kind == "edges":
        image = image.round()
    if kind == "line":
        image = torch.zeros_like(image)
        image[:, :, width // 2] = 1.0
    return image


@pytest.mark.parametrize("angle", [-170.0, -33.0, 0.0, 1.5, 90.0])
def test_rotations_are_those_of_another_implementation(angle: float) -> None:
    """torch's own sampling of a grid, black outside."""
    image, t = image_of("noise", 1), math.radians(angle)
    _, height, width = image.shape
    down, right = torch.meshgrid(
        torch.arange(height).double() - (height - 1) / 2, torch.arange(width).double() - (width - 1) / 2, indexing="ij"
    )
    rows, columns = math.cos(t) * down + math.sin(t) * right, math.cos(t) * right - math.sin(t) * down
    grid = torch.stack([2 * columns / (width - 1), 2 * rows / (height - 1)], dim=-1)[None]
    other = F.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
    assert torch.allclose(rotate(image, t), other, atol=1e-10)


def test_quarter_turns_are_exact_and_counterclockwise() -> None:
    image = image_of("noise", 2, 6, 6)
    assert torch.allclose(rotate(image, math.pi / 2), image.rot90(1, (1, 2)), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), start=st.floats(-3.0, 3.0), length=st.floats(1e-4, 0.08))
def test_no_two_angles_are_further_apart_than_the_bound(kind: str, seed: int, start: float, length: float) -> None:
    image = image_of(kind, seed)
    bound = lipschitz(image, start, start + length)
    some = start + length * np.sort(np.random.default_rng(seed).uniform(size=12))
    turned = [rotate(image, float(angle)) for angle in some]
    for one, other, a, b in zip(turned, turned[1:], some, some[1:], strict=False):
        assert float((one - other).norm()) <= bound * (b - a) * (1 + 1e-9) + 1e-12


def test_the_bound_is_tight_for_a_ramp_and_short_for_long_intervals() -> None:
    """Where the image is a plane no square differs from its neighbours: only black borders do."""
    height = width = 8
    right = torch.arange(width, dtype=torch.float64).expand(1, height, width) / width
    inner = torch.zeros_like(right)
    inner[:, 2:6, 2:6] = 1.0
    bound, w = lipschitz(right, 0.0, 1e-6), 1e-6
    moved = ((rotate(right, w) - rotate(right, 0.0)) / w)[inner > 0]
    down = torch.arange(height, dtype=torch.float64)[:, None].expand(height, width) - 3.5
    assert torch.allclose(moved, (-down / width)[inner[0] > 0], rtol=1e-4)  # the column read is c u - s v
    assert float(moved.norm()) <= bound
    with pytest.raises(UserError, match="too long"):
        lipschitz(right, 0.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**20), reach=st.floats(0.2, 1.0))
def test_cells_cover_all_angles_within_their_distance(kind: str, seed: int, reach: float) -> None:
    image, limit = image_of(kind, seed), 12.0
    found = list(cells(image, reach, limit))
    order = [cell.near for cell in found]
    assert order == sorted(order)
    assert found[0].centre == 0.0
    spans = sorted(tuple(sorted((cell.inner, cell.outer))) for cell in found)
    assert spans[0][0] == pytest.approx(-limit)
    assert spans[-1][1] == pytest.approx(limit)
    assert all(before[1] == pytest.approx(after[0]) for before, after in pairwise(spans))
    rng = np.random.default_rng(seed)
    for cell in found:
        assert cell.distance <= reach
        centre = rotate(image, math.radians(cell.centre))
        for angle in rng.uniform(*sorted((cell.inner, cell.outer)), size=5):
            assert float((rotate(image, math.radians(float(angle))) - centre).norm()) <= cell.distance


def half_space(image: torch.Tensor, at: float) -> torch.Tensor:
    """Return a normal along which the image turned by `at` degrees is far ahead of the image itself."""
    normal = rotate(image, math.radians(at)) - image
    return normal / normal.norm()


def asked(image: torch.Tensor, share: dict[float, float], *, seed: int) -> RotationRadius:
    """Return a certifier that was fed votes which are right with these shares at the angles of its cells."""
    certifier = RotationRadius(text=TEXT, sigma=0.25, alpha=0.2, n=40 + 64 * 5, n_pilot=40)
    rng = np.random.default_rng(seed)
    certifier.take(TEXT[(rng.uniform(size=40) > share[0.0]).astype(int)])
    row = 0
    while (wanted := certifier.request()) is not None:
        certifier.shown(image, "estimation", row, wanted.sure)
        cell = certifier._cell(row // certifier.copies)
        p = 0.0 if cell is None else share.get(round(cell.centre, 9), share[0.0])
        certifier.take(TEXT[(rng.uniform(size=wanted.sure) > p).astype(int)])
        row += wanted.sure
    return certifier


@pytest.mark.parametrize("runs", [pytest.param(300, id="light"), pytest.param(10_000, id="heavy", marks=SLOW)])
def test_an_angle_range_is_too_large_no_oftener_than_alpha(runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third cell holds a wrong angle at its farthest place, where a half-space attains the bound.

    The share of votes at its centre is the largest with which that angle is still wrong, Phi(E / sigma).
    """
    image, alpha, apart = torch.zeros(1, 4, 4), 0.2, 0.11
    spans = [(0.0, -1.0, 1.0), (2.0, 1.0, 3.0), (-2.0, -1.0, -3.0), (4.0, 3.0, 5.0), (-4.0, -3.0, -5.0)]
    monkeypatch.setattr(claims, "cells", lambda *_: iter([Cell(*span, apart) for span in spans]))
    monkeypatch.setattr(claims, "COPIES", (64,))
    wrong, false, larger = float(ndtr(apart / 0.25)), 0, 0
    for run in range(runs):
        false += asked(image, {0.0: 0.999, -2.0: wrong}, seed=run).finding().radius > 1.0
        larger += asked(image, {0.0: 0.999, -2.0: wrong + 0.1}, seed=run).finding().radius > 1.0
    assert binom.sf(false - 1, runs, alpha) > 1e-3
    assert larger > 1.5 * false  # a share that is truly larger is passed oftener: the count can tell


def run_of(image: torch.Tensor, certifier: RotationRadius, encode: Encode, seed: int = 0) -> Sampled:
    engine = SamplingEngine(encode, seed=seed, lanes=64, threat="rotation")
    (found,) = engine.run([Job("a", 0, image.float(), 0)], lambda _: certifier)
    return found


def test_the_range_of_a_half_space_stays_below_the_true_one() -> None:
    """An exact oracle: class 0 while <x_t, v> is below an edge, so the smoothed class at any angle is known."""
    image = image_of("smooth", 5, 8, 8)
    normal = half_space(image, 25.0)
    edge = float((rotate(image, math.radians(12.0)) * normal).sum())
    angles = np.linspace(0, 40, 4001)
    values = {t: float((rotate(image, math.radians(t)) * normal).sum()) for t in angles[::10]}
    truth = min(t for t, value in values.items() if value >= edge)
    sides = min((t for t in values if float((rotate(image, -math.radians(t)) * normal).sum()) >= edge), default=90.0)
    truth = min(truth, sides)

    def encode(noisy: torch.Tensor) -> torch.Tensor:
        beyond = (noisy.double() * normal).flatten(1).sum(dim=1) >= edge
        return torch.eye(2)[beyond.long()]

    for seed in range(3):
        certifier = RotationRadius(text=TEXT, sigma=0.05, alpha=0.001, n=6000, n_pilot=200)
        found = run_of(image, certifier, encode, seed).finding
        assert 0.4 * truth < found.radius <= truth
        assert found.stop == "futile"
    asked_for = RotationRadius(text=TEXT, sigma=0.05, alpha=0.001, n=6000, n_pilot=200, radius=0.4 * truth)
    found = run_of(image, asked_for, encode).finding
    assert (found.radius, found.stop) == (0.4 * truth, "certified")
    assert found.n < 6000
    too_far = RotationRadius(text=TEXT, sigma=0.05, alpha=0.001, n=6000, n_pilot=200, radius=1.1 * truth)
    assert run_of(image, too_far, encode).finding.radius == 0.0


def test_failed_copies_and_undecided_pilots_certify_nothing() -> None:
    image = image_of("noise", 3, 6, 6)
    for rows in (lambda noisy: torch.full((len(noisy), 2), float("nan")), lambda noisy: torch.ones(len(noisy), 2)):
        certifier = RotationRadius(text=TEXT, sigma=0.1, alpha=0.001, n=400, n_pilot=100)
        assert run_of(image, certifier, rows).finding.radius == 0.0
    blind = RotationRadius(text=TEXT, sigma=1e-6, alpha=0.001, n=400, n_pilot=100)  # less than the rounding of pixels
    found = run_of(image, blind, lambda noisy: torch.eye(2)[torch.zeros(len(noisy), dtype=torch.long)]).finding
    assert (found.radius, found.stop) == (0.0, "futile")
    with pytest.raises(UserError, match="rounding of pixels"):
        next(cells(image, rounding(image), 1.0))


def test_a_blank_image_is_certified_at_every_angle() -> None:
    certifier = RotationRadius(text=TEXT, sigma=0.1, alpha=0.001, n=400, n_pilot=100)
    first = torch.eye(2)[torch.zeros(1, dtype=torch.long)]
    found = run_of(torch.zeros(3, 6, 6), certifier, lambda noisy: first.expand(len(noisy), 2)).finding
    assert (found.radius, found.stop) == (180.0, "certified")


def test_no_model_has_noise_of_rotations() -> None:
    """Without the bound of the interpolation a share of votes certifies no angle."""
    assert find_threat("rotation").reach(1.0, 0.5, 0.25) == 0.0
    for make in (
        lambda: read_noise("rotation=0.1"),
        lambda: smooth(load_model("tiny"), 0.1, threat="rotation"),
        lambda: Smoothed(torch.nn.Identity(), 0.1, threat="rotation"),
    ):
        with pytest.raises(UserError, match=r"write \+smooth:0.1, and certify with threat=rotation"):
            make()
