"""The fixed questions by which a model is known again, and the comparison of two sets of answers.

A digest of weights says that nothing was changed where we look; a model can keep what decides its answers elsewhere
(a list, a closure, a file that it reads). What it answers to fixed inputs tells. The answers are kept as sketches: each
row as a few sums of its entries with fixed signs, so that a changed row changes them by about its own change, whatever
the number of entries.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustvlm.core.size import Size, sides
from robustvlm.errors import UserError

FORMAT = 1
SKETCHES = 16
IMAGES = 4

_SPREADS = 8.0
"""How many standard errors two means over a random model's draws may lie apart."""

Array = NDArray[np.float64]


def probe_pixels(size: Size) -> NDArray[np.float32]:
    """Return `IMAGES` images [N, 3, H, W] with values k/255, the same on every machine: made of integers alone.

    Two of them vary over the whole image (ramps that fold back, and coarse squares), two over a few pixels (stripes and
    noise), each through the whole range of values. On the 8-bit grid a model that rounds its input decides nothing.

    Example:
        >>> pixels = probe_pixels(16)
        >>> pixels.shape, float(pixels.min()), float(pixels.max())
        ((4, 3, 16, 16), 0.0, 1.0)
    """
    height, width = sides(size)
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    channel = np.arange(3)[:, None, None]
    cell = max(1, min(height, width) // 8)
    ramps = _folded((x * (3 + channel) + y * (2 + 2 * channel)) * 510 // max(1, height + width) + 85 * channel)
    squares = _mixed(x // cell, y // cell, channel + 11) % 256
    stripes = _folded((x * (1 + channel) + 2 * y) * 37 + 40 * channel)
    noise = _mixed(x, y, channel + 29) % 256
    grey = np.stack([np.broadcast_to(image, (3, height, width)) for image in (ramps, squares, stripes, noise)])
    grey = grey.copy()
    grey[:, :, 0, 0], grey[:, :, -1, -1] = 0, 255
    return (grey / 255.0).astype(np.float32)


def probe_noise(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return values of mean 0 and variance 1, the same on every machine: sums of twelve uniform ones, on a grid.

    Example:
        >>> noise = probe_noise((3, 8, 8))
        >>> bool(abs(noise.mean()) < 0.2), bool(abs(noise.std() - 1) < 0.2)
        (True, True)
    """
    count = int(np.prod(shape))
    parts = np.stack([_mixed(np.arange(count), np.full(count, number), 53) % 4096 for number in range(12)])
    return ((parts.sum(axis=0) - 12 * 2047.5) / 4096.0).astype(np.float32).reshape(shape)


def sketch(rows: Array) -> list[list[float | None]]:
    """Return, for each row [D], its sums under `SKETCHES` fixed patterns of signs; None where it is not finite.

    Example:
        >>> len(sketch(np.ones((2, 5)))), len(sketch(np.ones((2, 5)))[0])
        (2, 16)
    """
    return [[_rounded(value) for value in row] for row in np.asarray(rows, dtype=np.float64) @ _signs(rows.shape[1]).T]


def part(rows: Array, *, tolerance: float, spread: Array | None = None) -> dict[str, Any]:
    """Return what a manifest keeps of answers [N, D].

    Args:
        tolerance: how far a sketch may move between two machines.
        spread: of a random model the standard error of each sketch, [N, SKETCHES].
    """
    found: dict[str, Any] = {"values": sketch(rows), "tolerance": float(f"{tolerance:.3g}")}
    return found if spread is None else found | {"spread": [[_rounded(value) for value in row] for row in spread]}


def change_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return in words how two probes differ by more than machines do; None where they do not.

    Probes of different formats, from other versions of this program, cannot be compared and count as alike.

    Raises:
        UserError: the older one is damaged.

    Example:
        >>> one, other = (part(np.full((1, 3), x), tolerance=1e-3) for x in (1.0, 1.2))
        >>> change_of({"format": 1, "parts": {"logits": one}}, {"format": 1, "parts": {"logits": other}})
        'its logits of fixed inputs differ by 0.6 where rounding makes 0.001'
    """
    if old.get("format") != new.get("format"):
        return None
    try:
        for name, before in old["parts"].items():
            after = new["parts"].get(name)
            said = f"its {name} cannot be had any more" if after is None else _difference(name, before, after)
            if said is not None:
                return said
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError("the probe of the model in manifest.json is damaged: start over with --fresh") from None
    return None


def _difference(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    before, after = _numbers(old["values"]), _numbers(new["values"])
    tolerance = max(float(old["tolerance"]), float(new["tolerance"]))
    if before.shape != after.shape:
        return f"its {name} are of another shape ({len(before)} rows before, {len(after)} now)"
    if not np.array_equal(np.isfinite(before), np.isfinite(after)):
        return f"its {name} of fixed inputs are NaN or infinite in other places"
    allowed = tolerance + np.zeros(before.shape)
    if "spread" in old or "spread" in new:
        spreads = [_numbers(probe["spread"]) if "spread" in probe else np.zeros(before.shape) for probe in (old, new)]
        allowed = allowed + _SPREADS * np.sqrt(spreads[0] ** 2 + spreads[1] ** 2)
    apart = np.nan_to_num(np.abs(before - after))
    if not (apart > np.nan_to_num(allowed)).any():
        return None
    worst = np.unravel_index(np.argmax(apart - np.nan_to_num(allowed)), apart.shape)
    return f"its {name} of fixed inputs differ by {apart[worst]:.2g} where rounding makes {allowed[worst]:.2g}"


def _numbers(values: Sequence[Sequence[float | None]]) -> Array:
    return np.array(
        [[math.nan if value is None else float(value) for value in row] for row in values], dtype=np.float64
    )


def _rounded(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _signs(width: int) -> Array:
    number, entry = np.meshgrid(np.arange(SKETCHES), np.arange(width), indexing="ij")
    return np.where(_mixed(entry, number, 71) % 2 == 0, 1.0, -1.0)


def _folded(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0, 1, ... 255, 254, ... 1, 0, 1, ... for 0, 1, 2, ..."""
    around = values % 510
    return np.where(around < 256, around, 510 - around)


def _mixed(x: Any, y: Any, salt: Any) -> NDArray[np.int64]:
    """Return pseudo-random whole numbers in [0, 2^32) of two numbers and a salt, by multiplications and shifts."""
    mask = np.uint64(0xFFFFFFFF)
    value = (np.asarray(x).astype(np.uint64) * np.uint64(0x9E3779B1)) & mask
    value = (value ^ ((np.asarray(y).astype(np.uint64) * np.uint64(0x85EBCA77)) & mask)) & mask
    value = (value + np.asarray(salt).astype(np.uint64) * np.uint64(0xC2B2AE3D)) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        value = ((value ^ (value >> np.uint64(shift))) * np.uint64(factor)) & mask
    return value.astype(np.int64)
