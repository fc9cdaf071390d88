"""The fixed questions: the same everywhere, through the whole range, and a changed answer is seen."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.core.probe import SKETCHES, change_of, part, probe_noise, probe_pixels, sketch
from robustvlm.errors import UserError


def test_the_images_are_the_same_to_the_bit_on_every_machine() -> None:
    digest = hashlib.blake2b(np.rint(probe_pixels(32) * 255).astype(np.uint8).tobytes(), digest_size=8).hexdigest()
    assert digest == "36ec9d26e03d67f8"


@pytest.mark.parametrize("size", [1, 2, 7, 16, 224])
def test_they_stand_on_the_8_bit_grid_and_span_it(size: int) -> None:
    pixels = probe_pixels(size)
    assert pixels.shape == (4, 3, size, size)
    assert pixels.dtype == np.float32
    levels = pixels.astype(np.float64) * 255
    assert np.abs(levels - np.rint(levels)).max() < 1e-4
    assert pixels.min() >= 0.0
    assert pixels.max() <= 1.0
    if size >= 16:
        assert all(len(np.unique(image)) > 40 for image in pixels)
        assert np.abs(np.corrcoef(pixels.reshape(4, -1)) - np.eye(4)).max() < 0.3


def test_the_noise_has_unit_variance() -> None:
    noise = probe_noise((4, 3, 64, 64))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1.0) < 0.02


@given(st.integers(1, 600), st.integers(0, 10_000))
def test_a_sketch_moves_by_about_as_much_as_the_row(width: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    change = draws.normal(size=(1, width))
    change /= np.linalg.norm(change)
    moved = np.array(sketch(change))
    assert moved.shape == (1, SKETCHES)
    assert 0.1 < np.abs(moved).max() < 8.0


def probes(**changes: float) -> tuple[dict, dict]:
    rows = np.random.default_rng(0).normal(size=(4, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    other = rows.copy()
    other[2, 5] += changes.get("one", 0.0)
    other += changes.get("all", 0.0) * np.random.default_rng(1).normal(size=rows.shape) / 8
    made = [{"format": 1, "parts": {"features": part(values, tolerance=1e-4)}} for values in (rows, other)]
    return made[0], made[1]


def test_rounding_is_no_change_and_a_change_is_one() -> None:
    assert change_of(*probes()) is None
    assert change_of(*probes(all=1e-5)) is None
    assert "its features of fixed inputs differ by" in str(change_of(*probes(all=1e-3)))
    assert change_of(*probes(one=1e-3)) is not None


def test_random_answers_are_compared_within_their_spread() -> None:
    one, other = probes(all=0.05)
    for probe in (one, other):
        probe["parts"]["features"]["spread"] = np.full((4, SKETCHES), 0.05).tolist()
    assert change_of(one, other) is None
    one, other = probes(all=5.0)
    for probe in (one, other):
        probe["parts"]["features"]["spread"] = np.full((4, SKETCHES), 0.05).tolist()
    assert change_of(one, other) is not None


def test_other_shapes_missing_parts_and_nan_are_changes() -> None:
    one, other = probes()
    assert "cannot be had any more" in str(change_of(one, {"format": 1, "parts": {}}))
    other["parts"]["features"]["values"].pop()
    assert "another shape" in str(change_of(one, other))
    one, other = probes()
    other["parts"]["features"]["values"][0][0] = None
    assert "NaN or infinite in other places" in str(change_of(one, other))
    one["parts"]["features"]["values"][0][0] = None
    assert change_of(one, other) is None
    assert change_of({"format": 0, "parts": 5}, other) is None, "a probe of another version says nothing"


@pytest.mark.parametrize(
    "parts", [5, [], {"features": 5}, {"features": {}}, {"features": {"values": 5, "tolerance": 1}},
              {"features": {"values": [["x"]], "tolerance": 1}}, {"features": {"values": [[1.0]], "tolerance": "x"}}]
)  # fmt: skip
def test_a_damaged_probe_is_named(parts: object) -> None:
    other = {"format": 1, "parts": {"features": part(np.ones((1, 1)), tolerance=1e-4)}}
    with pytest.raises(UserError, match="is damaged"):
        change_of({"format": 1, "parts": parts}, other)
