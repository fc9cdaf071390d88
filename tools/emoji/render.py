"""Rasterise one SVG to a square RGBA sprite, cropped to its content."""

from __future__ import annotations

import io

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

SIZE = 64
_OVERSAMPLING = 2
_VISIBLE = 0.05  # alpha above which a pixel counts as content


def render(svg: str, *, mirrored: bool = False, size: int = SIZE) -> NDArray[np.uint8] | None:
    """Return the drawing as uint8 [size, size, 4] with straight alpha; None when nothing is visible."""
    raster = size * _OVERSAMPLING
    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=raster, height=raster))
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image).astype(np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]  # premultiplied, so that resizing does not bleed hidden colours
    square = _crop_to_content(pixels)
    return None if square is None else _straight_alpha(_resize(square, size))


def _crop_to_content(pixels: NDArray[np.float32]) -> NDArray[np.float32] | None:
    rows, columns = np.where(pixels[..., 3] > _VISIBLE)
    if len(rows) == 0:
        return None
    content = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = content.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((side, side, 4), np.float32)
    square[top : top + height, left : left + width] = content
    return square


def _resize(pixels: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    channels = [
        np.asarray(Image.fromarray(pixels[..., channel]).resize((size, size), Image.Resampling.LANCZOS))
        for channel in range(4)
    ]
    return np.clip(np.stack(channels, -1), 0, 1)


def _straight_alpha(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    alpha = pixels[..., 3:]
    colour = np.where(alpha > 1e-3, pixels[..., :3] / np.maximum(alpha, 1e-3), 0)
    straight = np.concatenate([np.clip(colour, 0, 1), alpha], -1)
    return np.asarray(np.rint(straight * 255), dtype=np.uint8)
