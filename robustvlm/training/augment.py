"""Random crops, mirroring and colour changes of training images, each drawn by the image's own stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.errors import UserError, nearest

_GREY = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """What is changed at random in a training image.

    Args:
        crop: smallest side of the square that is cut out, as a share of the image; 1: none.
        flip: mirror half of the images.
        colour: largest change of brightness, contrast and saturation, as a share; 0: none.
    """

    crop: float = 1.0
    flip: bool = False
    colour: float = 0.0


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "crop": Augmentation(crop=0.75, flip=True),
    "strong": Augmentation(crop=0.5, flip=True, colour=0.4),
}
"""The augmentations by name; "crop" suits photographs, "none" or a crop without mirroring suits text and digits."""


def parse_augmentation(name: str) -> Augmentation:
    """Return the augmentation of that name, or raise UserError.

    Example:
        >>> parse_augmentation("flip")
        Augmentation(crop=1.0, flip=True, colour=0.0)
    """
    if name not in AUGMENTATIONS:
        raise UserError(f"unknown augmentation '{name}': {nearest(name, AUGMENTATIONS)}")
    return AUGMENTATIONS[name]


def augment(pixels: Tensor, keys: Sequence[tuple[int | str, ...]], how: Augmentation) -> Tensor:
    """Return changed images [B, 3, S, S] in [0, 1]; the draws of image i come from the stream that `keys[i]` names.

    Cutting out samples bilinearly; the picture is never enlarged beyond its border.

    Example:
        >>> pixels = torch.rand(2, 3, 8, 8)
        >>> both = augment(pixels, [("a",), ("b",)], AUGMENTATIONS["strong"])
        >>> torch.equal(augment(pixels[1:], [("b",)], AUGMENTATIONS["strong"]), both[1:])
        True
    """
    if how == Augmentation() or not keys:
        return pixels
    # Seven numbers whatever is switched on, so that e.g. the crop is the same with and without colour.
    draws = torch.stack([torch.rand(7, generator=generator("augment", *key)) for key in keys])
    if how.crop < 1:
        pixels = _cropped(pixels, draws[:, :3], how.crop)
    if how.flip:
        pixels = torch.where(draws[:, 3, None, None, None] < 0.5, pixels.flip(-1), pixels)
    return _recoloured(pixels, draws[:, 4:], how.colour) if how.colour else pixels


def _cropped(pixels: Tensor, draws: Tensor, least: float) -> Tensor:
    """Cut out squares whose area is uniform between least² and 1, anywhere, and bring them to full size."""
    side = (least**2 + (1 - least**2) * draws[:, 0]).sqrt()
    offset = (2 * draws[:, 1:] - 1) * (1 - side)[:, None]
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = offset
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _recoloured(pixels: Tensor, draws: Tensor, most: float) -> Tensor:
    """Change saturation, contrast and brightness, each by a factor between 1 - most and 1 + most."""
    factors = 1 + most * (2 * draws - 1)
    saturation, contrast, brightness = (factor[:, None, None, None] for factor in factors.T)
    grey = (pixels * _GREY[:, None, None]).sum(dim=1, keepdim=True)
    pixels = grey + (pixels - grey) * saturation
    middle = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return ((middle + (pixels - middle) * contrast) * brightness).clamp(0, 1)
