"""What a certified radius at the model's resolution is worth at the source image: the 2-norm of a resize, if linear.

A resize in floating point is linear. One of 8-bit images is not: rounding makes two results differ by up to one grey
level in every pixel, wherever the sources differ at all, so that a source change of length e may reach the model as
`norm * e + sqrt(3 S S) / 255` and more (Pillow rounds between its two passes too). At 64 pixels that term is 0.43, at
224 it is 1.52: more than most certified radii. So where an image of 8 bits was resized, no radius at the source is
stated.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from robustvlm.certify.normal import Array
from robustvlm.core.framing import Framing
from robustvlm.errors import UserError

_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}


def resize_matrix(source: int, target: int, interpolation: str = "bicubic") -> Array:
    """Return the antialiased resize of a line of `source` pixels to `target` ones as a matrix [target, source].

    The filter of Pillow: stretched by the scale when shrinking, cut at the edges, rows normalised to one. Without the
    rounding and clipping of 8-bit images, which are not linear.

    Raises:
        UserError: unknown interpolation, or a size below one.

    Example:
        >>> resize_matrix(4, 2, "bilinear").round(3).tolist()
        [[0.429, 0.429, 0.143, 0.0], [0.0, 0.143, 0.429, 0.429]]
    """
    if interpolation not in _SUPPORT or source < 1 or target < 1:
        raise UserError(f"cannot resize {source} pixels to {target} by '{interpolation}': use bicubic or bilinear")
    scale = source / target
    stretch = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs((np.arange(source) + 0.5)[None, :] - centres[:, None]) / stretch
    weights = _cubic(distance) if interpolation == "bicubic" else np.maximum(0.0, 1.0 - distance)
    weights = np.where(distance < _SUPPORT[interpolation], weights, 0.0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _cubic(x: Array, a: float = -0.5) -> Array:
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@lru_cache(maxsize=4096)
def _line_norm(source: int, target: int, interpolation: str) -> float:
    if source == target:
        return 1.0
    return float(np.linalg.norm(resize_matrix(source, target, interpolation), 2))


def resize_norm(width: int, height: int, size: int | Framing) -> float:
    """Return a bound of the 2-norm of bringing an image to the square that a model sees, in its framing.

    Of a resize in floating point, without rounding to 8 bits: a perturbation of l2 norm e at the source then reaches
    the model with at most e times this, so that a radius R at the model's resolution is R / norm at the source. The
    norm of the two-dimensional resize is the product of those of its lines; cropping only lowers it, padding adds none.

    Example:
        >>> [round(resize_norm(side, side, 224), 3) for side in (32, 224, 500)]
        [7.013, 1.0, 0.452]
    """
    framing = Framing.of(size)
    target, filter_ = framing.image_size, framing.interpolation
    if framing.resize_mode == "squash":
        return _line_norm(width, target, filter_) * _line_norm(height, target, filter_)
    short, long = min(width, height), max(width, height)
    if framing.resize_mode == "longest":
        return _line_norm(short, max(1, round(short * target / long)), filter_) * _line_norm(long, target, filter_)
    if short == target:
        return 1.0
    return _line_norm(short, target, filter_) * _line_norm(long, max(target, int(target * long / short)), filter_)


def source_norm(width: int, height: int, target: int) -> float | None:
    """Return the factor from a change of an 8-bit image to that of the model's pixels: 1 if these are the same or None.

    Example:
        >>> source_norm(224, 224, 224), source_norm(256, 256, 224)
        (1.0, None)
    """
    return 1.0 if width == height == target else None
