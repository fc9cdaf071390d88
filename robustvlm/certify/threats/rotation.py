"""The threat of rotation: every angle up to the radius, by bilinear interpolation, black outside of the image.

A rotation interpolates, so rotations do not add up and noise on the angle certifies nothing (as it does for moves). The
noise is that against l2 instead, and a certificate of the rotated images at a grid of angles covers those between them:
`robustvlm.certify.rotation` has the bound, `robustvlm.certify.claims.rotation` the certifier.
"""

import math

import torch
from torch import Tensor

from robustvlm.certify.normal import Array
from robustvlm.certify.threats.base import Moving
from robustvlm.certify.threats.pixels import L2
from robustvlm.certify.threats.places import in_ball


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
