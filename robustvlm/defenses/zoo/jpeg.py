"""JPEG compression as a defence: the codec's arithmetic in floats, with a smooth stand-in for its rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.honesty import exactly
from robustvlm.defenses.zoo import base as zoo

# Quantisation tables of luminance and chrominance: ITU-T T.81 (1992), tables K.1 and K.2.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# From RGB to YCbCr (JFIF 1.02), for values from 0 to 255.
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
# Ties of rounding go one way whatever the last bits of a sum are.
_TIE = 1e-6


@lru_cache(maxsize=1)
def _cosines() -> Tensor:
    """Return the orthonormal DCT-II matrix [8, 8] in float64."""
    k, n = torch.arange(8.0, dtype=torch.float64)[:, None], torch.arange(8.0, dtype=torch.float64)
    rows = 0.5 * torch.cos((2 * n + 1) * k * math.pi / 16)
    rows[0] /= math.sqrt(2)
    return rows


def _table(rows: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Return a quantisation table [8, 8] at a quality from 1 to 100, scaled as libjpeg does."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(rows, dtype=torch.float64) * scale + 50) / 100).floor().clamp(1, 255)


def _rounded(values: Tensor, *, smooth: bool) -> Tensor:
    """Return whole numbers; with `smooth`, r + (v - r)^3 for the whole number r next to v (Shin and Song 2017)."""
    nearest = (values.detach() + _TIE).round()
    return nearest + (values - nearest) ** 3 if smooth else nearest


def _coded(plane: Tensor, table: Tensor, *, smooth: bool) -> Tensor:
    """Return a plane [B, H, W] from 0 to 255 after quantisation of its 8 x 8 blocks; its sides are multiples of 8."""
    batch, height, width = plane.shape
    cosines = _cosines().to(plane.device)
    blocks = (plane - 128).view(batch, height // 8, 8, width // 8, 8).transpose(2, 3)
    spectrum = cosines @ blocks @ cosines.T
    table = table.to(plane.device)
    kept = _rounded(spectrum / table, smooth=smooth) * table
    return (cosines.T @ kept @ cosines).transpose(2, 3).reshape(batch, height, width) + 128


def compressed(pixels: Tensor, quality: int, *, smooth: bool = False) -> Tensor:
    """Return pixels [B, 3, H, W] in [0, 1] after JPEG at a quality, chroma at half resolution (4:2:0), in 8 bits.

    Computed in float64, so that a value next to a rounding threshold is rounded the same way in every batch.

    Args:
        smooth: every rounding r of v replaced by r + (v - r)^3, which has a derivative.
    """
    height, width = pixels.shape[-2:]
    wide = F.pad(pixels.double(), (0, -width % 16, 0, -height % 16), mode="replicate")
    matrix = torch.tensor(_YCBCR, dtype=torch.float64, device=pixels.device)
    shift = torch.tensor((0.0, 128.0, 128.0), dtype=torch.float64, device=pixels.device)[:, None, None]
    levels = _rounded(255 * wide, smooth=smooth)
    colour = torch.einsum("ij,bjhw->bihw", matrix, levels) + shift
    luma = _coded(colour[:, 0], _table(_LUMINANCE, quality), smooth=smooth)[:, None]
    chroma = F.avg_pool2d(colour[:, 1:], 2)
    planes = [_coded(chroma[:, place], _table(_CHROMINANCE, quality), smooth=smooth) for place in range(2)]
    # The triangle filter, with which libjpeg brings chroma back to full size.
    back = F.interpolate(torch.stack(planes, dim=1), scale_factor=2, mode="bilinear", align_corners=False)
    whole = torch.cat([luma, back], dim=1) - shift
    levels = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix), whole).clamp(0, 255)
    return (_rounded(levels, smooth=smooth) / 255)[..., :height, :width].to(pixels.dtype)


@zoo.DEFENCES.named("jpeg")
@dataclass(frozen=True)
class Jpeg(zoo.PixelDefence):
    """JPEG compression of the image.

    Example:
        >>> x = torch.full((1, 3, 16, 16), 0.5)
        >>> bool(((Jpeg(75).move(x, None, "smooth") - x).abs() <= 1 / 255).all())
        True
    """

    about = zoo.About(
        title="JPEG compression",
        reference="Guo, Rana, Cisse, van der Maaten, ICLR 2018, arXiv 1711.00117",
        summary="JPEG at a quality from 1 to 100 (0: off)",
        fidelity=zoo.OWN,
        differs=("The codec's arithmetic is computed in floats; files of libjpeg differ by a few levels.",),
    )
    off = "0"
    modes = (zoo.SMOOTH, zoo.IDENTITY)

    quality: Annotated[int, zoo.Strength("quality; 0 leaves the image alone", 0, 100, origin="K")] = 75

    def move(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        del below
        if self.quality == 0:
            return pixels
        with torch.no_grad():
            value = compressed(pixels.detach(), self.quality)
        if not (torch.is_grad_enabled() and pixels.requires_grad):
            return value
        return exactly(value, pixels if mode == zoo.IDENTITY else compressed(pixels, self.quality, smooth=True))
