"""How a model takes images: the square it sees, how an image of any shape is brought into it, and by which filter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from robustvlm.errors import UserError, nearest

RESIZE_MODES = ("shortest", "squash", "longest")


@dataclass(frozen=True)
class Framing:
    """The geometry of a model's preprocessing, in open_clip's terms.

    Args:
        image_size: side of the square in pixels.
        interpolation: filter of the resize.
        resize_mode: "shortest" scales the shorter side to the square and crops the centre, "squash" scales both sides
            whatever their ratio, "longest" scales the longer side and pads the rest.
        fill_color: grey level 0..255 of the padding.
        short_side: what "shortest" scales the shorter side to before it crops, 256 for many models of 224 pixels; 0 for
            the size of the square itself.

    Raises:
        UserError: a size below 1, an unknown mode, no grey level, or a shorter side that cannot be cropped.

    Example:
        >>> Framing(224, resize_mode="squash").at(64)
        Framing(image_size=64, interpolation='bicubic', resize_mode='squash', fill_color=0, short_side=0)
    """

    image_size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    short_side: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"the image size must be at least 1 pixel, got {self.image_size}")
        if self.resize_mode not in RESIZE_MODES:
            hint = nearest(str(self.resize_mode), RESIZE_MODES)
            raise UserError(f"unknown resize_mode '{self.resize_mode}': {hint}")
        if isinstance(self.fill_color, bool) or not isinstance(self.fill_color, int) or not 0 <= self.fill_color < 256:
            raise UserError(f"fill_color must be a grey level from 0 to 255, got {self.fill_color!r}")
        if self.short_side and (self.resize_mode != "shortest" or self.short_side < self.image_size):
            raise UserError(
                f"short_side is what resize_mode 'shortest' scales to, at least the image size, got {self.short_side} "
                f"with '{self.resize_mode}' and {self.image_size} pixels"
            )

    @property
    def scaled_side(self) -> int:
        """What the shorter side is scaled to in mode "shortest"."""
        return self.short_side or self.image_size

    @classmethod
    def of(cls, size: int | Framing) -> Framing:
        """Return a framing as it is, and a plain size as CLIP's usual one."""
        return size if isinstance(size, Framing) else cls(size)

    def at(self, size: int) -> Framing:
        """Return the same framing at another size."""
        return replace(self, image_size=size, short_side=round(self.short_side * size / self.image_size))

    def options(self) -> dict[str, Any]:
        """Return the fields by name, as a model that stands on another one hands them on."""
        return asdict(self)

    def unusual(self) -> tuple[str, ...]:
        """Return what differs from CLIP's usual mode and padding as texts: nothing for most models."""
        if self.scaled_side != self.image_size:
            return (f"short_side {self.short_side}",)
        mode = () if self.resize_mode == "shortest" else (f"resize_mode {self.resize_mode}",)
        return (*mode, f"fill_color {self.fill_color}") if self.resize_mode == "longest" and self.fill_color else mode


# From an image to the pixels a model takes

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
    side, scaled = framing.image_size, framing.scaled_side
    short, long = sorted(image.size)
    if scaled * scaled * long > _STRIP * short:
        return _middle_of_strip(image, framing, mode)
    if short != scaled:
        image = tv.resize(image, [scaled], interpolation=mode)
    return tv.center_crop(image, [side, side])


def _middle_of_strip(image: Image.Image, framing: Framing, mode: InterpolationMode) -> Image.Image:
    """Return, up to rounding, the centre that resizing all of a long strip would give, without making the rest."""
    side, scaled = framing.image_size, framing.scaled_side
    short, long = sorted(image.size)
    length = int(scaled * long / short)
    start, above = round((length - side) / 2.0) * long / length, round((scaled - side) / 2.0) * short / scaled
    box = (start, above, start + side * long / length, above + side * short / scaled)
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
