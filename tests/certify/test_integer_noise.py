"""The sound 8-bit mode: exact laws, every classifier of a pixel, and the attack on floats that it withstands."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import chisquare
from torch import Tensor

from robustvlm.certify import Job, SamplingEngine, VoteRadius
from robustvlm.certify.threats import find_threat, read_noise
from robustvlm.certify.threats.integers import LEVELS, Integers, steps_of
from robustvlm.errors import UserError


def law(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and the exact probabilities with which the table draws them."""
    steps = [int(step) + 2**63 for step in steps_of(sigma)]
    parts = [Fraction(b - a, 2**64) for a, b in zip([0, *steps], [*steps, 2**64], strict=True)]
    assert sum(parts) == 1
    return np.arange(len(parts)) - len(steps) // 2, np.array([float(part) for part in parts])


@pytest.mark.parametrize("sigma", [0.002, 0.03, 0.25])
def test_the_table_is_the_rounded_normal_law(sigma: float) -> None:
    """A second implementation in double precision, good to 1e-15."""
    values, parts = law(sigma)
    s = LEVELS * sigma
    wanted = ndtr((values + 0.5) / s) - ndtr((values - 0.5) / s)
    assert np.abs(parts - wanted).max() < 1e-15
    assert np.allclose(parts, parts[::-1], rtol=0, atol=1e-18)
    # The tails, where differences of probabilities near one have no digits left.
    left = (values > -9 * s) & (values < -4 * s)
    assert np.allclose(parts[left], wanted[left], rtol=1e-3, atol=1e-19)


def test_the_law_is_off_by_less_than_is_paid_for() -> None:
    """Each step is a rounding to 2^-64, and the tails beyond the table are smaller still."""
    sigma = 0.25
    off = Integers().off_law(1, sigma)
    assert off == (len(steps_of(sigma)) + 2) * 2.0**-64
    assert 2 * ndtr(-(len(steps_of(sigma)) / 2 - 0.5) / (LEVELS * sigma)) < 2.0**-64
    assert 10_000 * Integers().off_law(3 * 224 * 224, sigma) < 1e-6  # what is set aside of alpha 0.001


def test_draws_follow_the_law() -> None:
    sigma, generator = 0.01, torch.Generator().manual_seed(0)
    noisy = read_noise(f"8bit={sigma}").fresh(torch.full((1000, 3, 8, 8), 100 / 255), generator)
    drawn = (255 * noisy.double()).round().long().flatten().numpy() - 100
    values, parts = law(sigma)
    kept = parts * len(drawn) > 20
    counts = np.array([(drawn == value).sum() for value in values[kept]])
    assert chisquare(counts, parts[kept] / parts[kept].sum() * counts.sum()).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(sigma=st.floats(0.004, 0.2), shift=st.integers(1, 40), p=st.floats(0.02, 0.98))
def test_no_classifier_of_one_pixel_beats_the_bound(sigma: float, shift: int, p: float) -> None:
    """The exact worst case over all (also random) classifiers, by Neyman and Pearson on the drawn law itself."""
    values, parts = law(sigma)
    wide = dict(zip(values.tolist(), parts.tolist(), strict=True))
    here, there = (np.array([wide.get(k - d, 0.0) for k in range(-900, 1000)]) for d in (0, shift))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(here > 0, there / here, np.inf)
    order = np.argsort(ratio, kind="stable")  # keeps what the shift makes rarest
    mass = np.minimum(here[order], np.clip(p - np.concatenate([[0], here[order].cumsum()[:-1]]), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        left = float(np.where(here[order] > 0, mass * ratio[order], 0.0).sum())
    bound = find_threat("8bit").least(p, shift / LEVELS, sigma)
    assert left >= bound - 1e-12


def test_a_threshold_of_the_pixel_attains_the_bound() -> None:
    sigma, (values, parts) = 0.03, law(0.03)
    for edge in (-10, 0, 4, 15):
        for shift in (1, 5, 20):
            p, left = parts[values <= edge].sum(), parts[values <= edge - shift].sum()
            assert left == pytest.approx(find_threat("8bit").least(p, shift / LEVELS, sigma), abs=1e-13)


def test_copies_are_whole_numbers_and_the_same_in_every_batch() -> None:
    noise, pixels = read_noise("8bit=0.3"), torch.randint(0, 256, (6, 3, 5, 5)).float() / 255
    draws = torch.randint(-(2**63), 2**63 - 1, (6, 3, 5, 5))
    copies = noise.copies(pixels, draws)
    assert torch.equal(copies, (255 * copies.double()).round().float() / 255)
    assert torch.equal(copies[2:3], noise.copies(pixels[2:3], draws[2:3]))
    assert torch.equal(copies.double(), noise.copies(pixels.double(), draws))  # one function of whole numbers


def reads_low_bits(noisy: Tensor) -> Tensor:
    """Class 0 where some small number has bits below 2^-34, which sums with 2^-10 cannot have; else class 1."""
    flat = noisy.flatten(1).double()
    scaled = flat * 2.0**34
    fine = ((flat.abs() < 2.0**-12) & (scaled != scaled.round())).any(dim=1)
    return torch.stack([fine, ~fine], dim=1).float()


def certified(encode: Callable[[Tensor], Tensor], pixels: Tensor, threat: str) -> tuple[int, float]:
    engine = SamplingEngine(encode, seed=0, lanes=64, threat=threat)
    make = VoteRadius(text=np.eye(2), sigma=0.25, alpha=0.001, n=600, n_pilot=100, threat=threat)
    found = next(iter(engine.run([Job("x", 0, pixels)], lambda _: make))).finding
    return int(found.prediction or 0), found.radius


def test_low_bits_break_a_certificate_of_floats_and_none_of_whole_numbers() -> None:
    """Voracek and Hein: x + noise keeps bits of x, so that a 'certified' class falls within the radius."""
    black = torch.zeros(3, 64, 64)
    label, radius = certified(reads_low_bits, black, "l2")
    dark = black + 2.0**-10
    distance = float((dark - black).norm())
    assert label == 0
    assert radius > 2 * distance  # certified, and yet:
    torch.manual_seed(0)
    answers = reads_low_bits(read_noise("0.25").fresh(dark.expand(64, -1, -1, -1))).argmax(dim=1)
    assert bool((answers == 1).all())
    # Images of whole numbers under noise of whole numbers have no such bits, at the certified image or elsewhere.
    label, radius = certified(reads_low_bits, black, "8bit")
    near = torch.full((3, 64, 64), 1 / 255)
    assert radius > float(near.norm())
    answers = reads_low_bits(read_noise("8bit=0.25").fresh(near.expand(64, -1, -1, -1))).argmax(dim=1)
    assert bool((answers == label).all())


def test_images_that_are_not_of_whole_numbers_are_refused() -> None:
    threat = find_threat("8bit")
    threat.check_pixels(torch.arange(256).float() / 255)
    for wrong in (torch.tensor([0.5 / 255]), torch.tensor([-1 / 255]), torch.tensor([256 / 255])):
        with pytest.raises(UserError, match="whole numbers from 0 to 255"):
            threat.check_pixels(wrong)
    with pytest.raises(UserError, match="8bit"):
        certified(lambda x: torch.eye(2)[torch.zeros(len(x), dtype=torch.long)], torch.full((3, 2, 2), 0.3), "8bit")


def test_the_radius_is_that_of_real_noise() -> None:
    """Nothing is lost by whole numbers: the same bound in the same unit."""
    assert find_threat("8bit").reach(0.9, 0.5, 0.25) == pytest.approx(0.25 * float(ndtri(0.9)))
    assert math.isclose(find_threat("8bit").reach(0.9, 0.5, 0.25), find_threat("l2").reach(0.9, 0.5, 0.25))
