"""From an image to the pixels a model takes."""

from __future__ import annotations

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from robustvlm.core.framing import Framing
from robustvlm.errors import UserError, nearest

_STRIP = 2**25
"""Pixels of a resized image above which only the part that is kept is made, to bound memory."""
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def to_pixels(image: Image.Image, size: int | Framing, *, interpolation: str = "bicubic") -> torch.Tensor:
    """Return float32 pixels [3, size, size] in [0, 1], framed as the model takes them.

    The same as open_clip's preprocessing without the normalisation, which is part of the model: `size` may be a
    model's `framing`, which says how; with a number the shorter side is resized to it, by `interpolation`, and the
    centre cropped.

    Raises:
        UserError: a size below 1 or an unknown interpolation.

    Example:
        >>> to_pixels(Image.new("RGB", (30, 20), (255, 0, 0)), 8)[:, 0, 0]
        tensor([1., 0., 0.])
        >>> to_pixels(Image.new("RGB", (30, 10), (255, 0, 0)), Framing(9, resize_mode="longest"))[0, :, 0]
        tensor([0., 0., 0., 1., 1., 1., 0., 0., 0.])
    """
    framing = size if isinstance(size, Framing) else Framing(size, interpolation)
    modes = {mode.value: mode for mode in InterpolationMode}
    if framing.interpolation not in modes:
        raise UserError(f"unknown interpolation '{framing.interpolation}': {nearest(framing.interpolation, modes)}")
    image = image if image.mode == "RGB" else image.convert("RGB")
    framed = _MODES[framing.resize_mode](image, framing, modes[framing.interpolation])
    return tv.pil_to_tensor(framed).to(torch.float32) / 255


def _shortest(image: Image.Image, framing: Framing, mode: InterpolationMode) -> Image.Image:
    side = framing.image_size
    short, long = sorted(image.size)
    if side * side * long > _STRIP * short:
        return _middle_of_strip(image, side, mode)
    if short != side:
        image = tv.resize(image, [side], interpolation=mode)
    return tv.center_crop(image, [side, side])


def _middle_of_strip(image: Image.Image, side: int, mode: InterpolationMode) -> Image.Image:
    """Return, up to rounding, the centre that resizing all of a long strip would give, without making the rest."""
    short, long = sorted(image.size)
    length = int(side * long / short)
    start = round((length - side) / 2.0) * long / length
    box = (start, 0.0, start + side * long / length, float(short))
    if image.width < image.height:
        box = (box[1], box[0], box[3], box[2])
    return image.resize((side, side), _FILTERS.get(mode.value, Image.Resampling.NEAREST), box=box)


def _squash(image: Image.Image, framing: Framing, mode: InterpolationMode) -> Image.Image:
    return tv.resize(image, [framing.image_size, framing.image_size], interpolation=mode)


def _longest(image: Image.Image, framing: Framing, mode: InterpolationMode) -> Image.Image:
    side = framing.image_size
    ratio = max(image.size) / side
    # A strip keeps at least one line of pixels.
    width, height = (max(1, round(length / ratio)) for length in image.size)
    image = tv.resize(image, [height, width], interpolation=mode)
    across, down = side - width, side - height
    # Of an odd margin the larger half goes right and below.
    return tv.pad(image, [across // 2, down // 2, (across + 1) // 2, (down + 1) // 2], fill=framing.fill_color)


_MODES = {"shortest": _shortest, "squash": _squash, "longest": _longest}
