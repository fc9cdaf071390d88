"""Threats that move an image in its plane: shifts by whole pixels, and rotations about its centre.

**Translation**: what leaves on one side enters on the other, shifts add up, and noise on the shift certifies.

**Rotation**: every angle up to the radius, by bilinear interpolation, black outside of the image. It interpolates, so
rotations do not add up and noise on the angle certifies nothing. The noise is that against l2 instead, and a
certificate of the rotated images at a grid of angles covers those between them: `robustvlm.certify.rotation` has the
bound, `robustvlm.certify.claims.rotation` the certifier.
"""

import math

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify.normal import Array
from robustvlm.certify.threats.base import Move, Moving, in_ball
from robustvlm.certify.threats.pixels import L2

_SIDE = 513
"""Rows of whole shifts up to which all of them are listed."""


class Translation(Move):
    """Cyclic shifts by whole pixels; Gaussian noise on the shift, rounded to whole pixels.

    For a whole shift s and any real t, floor(s + t + 1/2) = s + floor(t + 1/2), and cyclic shifts add up. So the copies
    of a shifted image are those of the image with the Gaussian shifted by s, and the rounding is part of what is
    averaged: T0 holds for whole shifts. Shifts that bring in black or reflected borders do not add up, and shifts by
    parts of a pixel interpolate: of both nothing is certified.

    Example:
        >>> row = torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]])
        >>> Translation().move(row, torch.tensor([[0.0, 1.4]])).flatten().tolist()
        [3.0, 0.0, 1.0, 2.0]
    """

    name, moves, usual, most = "translation", 2, 4.0, 10_000.0
    allows = (
        "is the image moved by whole pixels, down and to the right or against it, by a Euclidean length below the "
        "radius, where what leaves on one side enters on the other (cyclic)"
    )
    unit = "translation: Euclidean length of the shift in whole pixels"

    def move(self, rows: Tensor, by: Tensor) -> Tensor:
        whole = (by + 0.5).floor().long()
        for axis in (0, 1):
            side = rows.shape[2 + axis]
            places = (torch.arange(side, device=rows.device) - whole[:, axis : axis + 1]) % side
            wide = places[:, None, :, None] if axis == 0 else places[:, None, None, :]
            rows = rows.gather(2 + axis, wide.expand_as(rows))
        return rows

    def inside(self, radius: float, steps: int) -> Array:
        """Return whole shifts within `radius`: all of them if they are no more than `steps`, else the farthest."""
        line = np.arange(-int(radius), int(radius) + 1)
        if len(line) <= _SIDE:
            down, right = np.meshgrid(line, line, indexing="ij")
        else:  # too many to look at all: in every row and column the farthest
            ends = np.floor(np.sqrt(radius * radius - line.astype(np.float64) ** 2))
            down, right = np.concatenate([line, line, ends, -ends]), np.concatenate([ends, -ends, line, line])
        shifts = np.unique(np.stack([down.ravel(), right.ravel()], axis=1).astype(np.float64), axis=0)
        length = np.linalg.norm(shifts, axis=1)
        known = (length <= radius) & (length > 0.0)
        shifts, length = shifts[known], length[known]
        return shifts[np.argsort(-length, kind="stable")[:steps]]


class Rotation(Moving):
    """x' is x turned about its centre by an angle in degrees, counterclockwise or against it; noise N(0, sigma^2 I).

    Example:
        >>> corner = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
        >>> Rotation().move(corner, torch.tensor([[90.0]])).round().flatten().tolist()
        [0.0, 0.0, 1.0, 0.0]
    """

    name, moves, usual, most, of_pixels = "rotation", 1, 0.25, 10.0, True
    gaussian, bumpy, smoothed_by, noise_unit = False, True, "l2", L2.unit
    allows = (
        "is the image turned about its centre by an angle below the radius, either way, by bilinear interpolation with "
        "black outside of the image (pixels may be off by a rounding of 2e-7)"
    )
    unit, short = "rotation: degrees", "degrees"
    law = L2.law

    def noisy(self, rows: Tensor, draws: Tensor, sigma: float) -> Tensor:
        return rows + sigma * draws

    def move(self, rows: Tensor, by: Tensor) -> Tensor:
        turned = [rotate(row, math.radians(float(angle))) for row, angle in zip(rows, by[:, 0], strict=True)]
        return torch.stack(turned).to(rows)

    def inside(self, radius: float, steps: int) -> Array:
        """Return angles [N, 1] in degrees within `radius`, evenly spread on both sides."""
        return in_ball(1, radius, steps)

    # A share of votes by itself says nothing of an angle: without the bound of the interpolation nothing is certified.

    def reach(self, p: float, share: float, sigma: float) -> float:
        del p, share, sigma
        return 0.0

    def least(self, p: float, eps: float, sigma: float) -> float:
        del p, eps, sigma
        return 0.0

    def needed(self, share: float, eps: float, sigma: float) -> float:
        del share, eps, sigma
        return 2.0


def margin_of(height: int, width: int) -> int:
    """Return how many black pixels an image needs on each side so that what is read at any angle lies within."""
    return math.ceil((math.hypot(height, width) - min(height, width)) / 2) + 3


def places(height: int, width: int, angle: float) -> tuple[Tensor, Tensor]:
    """Return where each pixel of an image turned by `angle` (radians) is read, rows and columns [H, W] in float64."""
    down, right = offsets(height, width)
    c, s = math.cos(angle), math.sin(angle)
    return (height - 1) / 2 + c * down + s * right, (width - 1) / 2 + c * right - s * down


def offsets(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the offsets of all pixels from the centre, rows and columns [H, W]."""
    down = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    right = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    return down[:, None].expand(height, width), right[None, :].expand(height, width)


def rotate(image: Tensor, angle: float) -> Tensor:
    """Return an image [C, H, W] turned by `angle` in radians, in float64 on the CPU; at 0 the image itself.

    Every pixel is read where the inverse rotation takes it, between its four neighbours, of which those outside of the
    image are black.

    Example:
        >>> image = torch.rand(3, 5, 4, dtype=torch.float64)
        >>> torch.equal(rotate(image, 0.0), image)
        True
    """
    _, height, width = image.shape
    border = margin_of(height, width)
    wide = torch.nn.functional.pad(image.detach().double().cpu(), [border] * 4)
    rows, columns = places(height, width, angle)
    top, left = rows.floor(), columns.floor()
    down, right = rows - top, columns - left
    i, j = top.long() + border, left.long() + border
    upper = (1 - right) * wide[:, i, j] + right * wide[:, i, j + 1]
    lower = (1 - right) * wide[:, i + 1, j] + right * wide[:, i + 1, j + 1]
    return (1 - down) * upper + down * lower
