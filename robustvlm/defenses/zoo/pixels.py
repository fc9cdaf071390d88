"""The simple image transforms: fewer bits, JPEG, median and Gaussian filter, random resizing and padding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.honesty import exactly
from robustvlm.defenses.zoo import base as zoo

_SQUEEZING = "Xu, Evans, Qi, NDSS 2018, arXiv 1704.01155"


@zoo.DEFENCES.named("bits")
@dataclass(frozen=True)
class Bits(zoo.PixelDefence):
    """Pixels rounded to `levels` bits: round(x (2^B - 1)) / (2^B - 1).

    Example:
        >>> Bits(1).move(torch.tensor([[[[0.2, 0.7]]]]), None, "identity").tolist()
        [[[[0.0, 1.0]]]]
    """

    about = zoo.About(
        title="bit-depth reduction",
        reference=_SQUEEZING,
        summary="pixels rounded to so many bits (0: off)",
        fidelity=zoo.OWN,
    )
    off = "0"
    modes = (zoo.IDENTITY,)

    levels: Annotated[int, zoo.Strength("bits of a colour value; 0 leaves the image alone", 0, 8, origin="K")] = 3

    def move(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        del below, mode
        if self.levels == 0:
            return pixels
        steps = 2**self.levels - 1
        return exactly((pixels.detach() * steps).round() / steps, pixels)


@zoo.DEFENCES.named("median")
@dataclass(frozen=True)
class Median(zoo.PixelDefence):
    """Each value the median of the K x K values around it, the border reflected.

    Example:
        >>> dot = torch.zeros(1, 3, 5, 5)
        >>> dot[..., 2, 2] = 1
        >>> Median(3).move(dot, None, "through").max()
        tensor(0.)
    """

    about = zoo.About(
        title="median filter",
        reference=_SQUEEZING,
        summary="median of K x K pixels (1: off)",
        fidelity=zoo.OWN,
    )
    off = "1"

    kernel: Annotated[
        int, zoo.Strength("side of the window; 1 leaves the image alone", 1, 31, odd=True, origin="K")
    ] = 3

    def move(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        del below, mode
        if self.kernel == 1:
            return pixels
        framed = reflected(pixels, self.kernel // 2)
        windows = framed.unfold(2, self.kernel, 1).unfold(3, self.kernel, 1)
        return windows.flatten(4).median(dim=4).values


@zoo.DEFENCES.named("blur")
@dataclass(frozen=True)
class Blur(zoo.PixelDefence):
    """A Gaussian filter of K x K pixels, the border reflected.

    Example:
        >>> x = torch.full((1, 3, 8, 8), 0.25)
        >>> bool(torch.allclose(Blur(5, 1.0).move(x, None, "through"), x))
        True
    """

    about = zoo.About(
        title="Gaussian filter",
        reference=_SQUEEZING,
        summary="Gaussian filter of K x K pixels and width S (kernel 1: off)",
        fidelity=zoo.OWN,
    )
    off = "1"

    kernel: Annotated[int, zoo.Strength("side of the filter; 1 leaves the image alone", 1, 63, odd=True)] = 5
    sigma: Annotated[float, zoo.Strength("its standard deviation in pixels", 1e-3, 100)] = 1.1

    def move(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        del below, mode
        if self.kernel == 1:
            return pixels
        place = torch.arange(self.kernel, device=pixels.device, dtype=pixels.dtype) - self.kernel // 2
        weight = (-0.5 * (place / self.sigma).square()).exp()
        weight = (weight / weight.sum()).expand(pixels.shape[1], 1, 1, -1)
        framed = reflected(pixels, self.kernel // 2)
        rows = F.conv2d(framed, weight, groups=pixels.shape[1])
        return F.conv2d(rows, weight.transpose(2, 3), groups=pixels.shape[1])


def reflected(pixels: Tensor, border: int) -> Tensor:
    """Return pixels with a reflected border; a border wider than the image is repeated at its edge."""
    mode = "reflect" if border < min(pixels.shape[-2:]) else "replicate"
    return F.pad(pixels, (border,) * 4, mode=mode)


@zoo.DEFENCES.named("randpad")
@dataclass(frozen=True)
class RandomPadding(zoo.PixelDefence):
    """The image resized to r ~ U{S .. grow S}, put at a random place of a black square of side grow S, resized to S.

    Where the sides differ, the longer one is drawn and the ratio kept; the black image is grow times as high and wide.

    Example:
        >>> RandomPadding().move(torch.rand(2, 3, 16, 16), None, "through").shape
        torch.Size([2, 3, 16, 16])
    """

    about = zoo.About(
        title="random resizing and padding",
        reference="Xie, Wang, Zhang, Ren, Yuille, ICLR 2018, arXiv 1711.01991",
        summary="resized at random, placed at random on black, resized back (grow 1: off)",
        fidelity=zoo.OWN,
        differs=("The square is resized back to the model's size, which an encoder of one size needs.",),
    )
    off = "1"
    random = True
    eot = 20

    grow: Annotated[
        float,
        zoo.Strength(
            "side of the padded square over the image's (331/299 as published); 1 is off", 1.0, 4.0, origin="K"
        ),
    ] = 1.107

    def move(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        del below, mode
        high, wide = (math.floor(self.grow * side + 1e-9) for side in pixels.shape[-2:])
        if (high, wide) == pixels.shape[-2:]:
            return pixels
        return torch.cat(
            [self._one(x[None], high, wide, draws) for x, draws in zip(pixels, zoo.generators(pixels), strict=True)]
        )

    @staticmethod
    def _one(x: Tensor, high: int, wide: int, draws: torch.Generator) -> Tensor:
        def drawn(most: int) -> int:
            return int(torch.randint(most + 1, (), generator=draws))

        own = list(x.shape[-2:])
        longest = max(own)
        side = longest + drawn(max(high, wide) - longest)
        # Rounded to the nearest, in whole numbers.
        height, width = ((2 * side * one + longest) // (2 * longest) for one in own)
        height, width = min(height, high), min(width, wide)
        left, top = drawn(wide - width), drawn(high - height)
        grown = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        placed = F.pad(grown, (left, wide - width - left, top, high - height - top))
        return F.interpolate(placed, own, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
