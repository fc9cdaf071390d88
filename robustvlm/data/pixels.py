"""From an image to the pixels a model takes."""

from __future__ import annotations

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from robustvlm.errors import UserError, nearest

_LONGEST = 32
"""Longer to shorter side above which an image is cropped before it is resized, to bound memory."""


def to_pixels(image: Image.Image, size: int, *, interpolation: str = "bicubic") -> torch.Tensor:
    """Return float32 pixels [3, size, size] in [0, 1]: shortest side resized to `size`, then the centre cropped.

    The same as the usual CLIP preprocessing without the normalisation, which is part of the model.

    Raises:
        UserError: a size below 1 or an unknown interpolation.

    Example:
        >>> to_pixels(Image.new("RGB", (30, 20), (255, 0, 0)), 8)[:, 0, 0]
        tensor([1., 0., 0.])
    """
    if size < 1:
        raise UserError(f"the image size must be at least 1 pixel, got {size}")
    modes = {mode.value: mode for mode in InterpolationMode}
    if interpolation not in modes:
        raise UserError(f"unknown interpolation '{interpolation}': {nearest(interpolation, modes)}")
    image = image if image.mode == "RGB" else image.convert("RGB")
    short, long = sorted(image.size)
    if long > _LONGEST * short:
        image = tv.center_crop(image, [min(image.height, _LONGEST * short), min(image.width, _LONGEST * short)])
    if min(image.size) != size:
        image = tv.resize(image, [size], interpolation=modes[interpolation])
    cropped = tv.center_crop(image, [size, size])
    return tv.pil_to_tensor(cropped).to(torch.float32) / 255
