"""How a model takes images: the size it sees, how an image of any shape is brought to it, and by which filter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from robustvlm.core.size import Size, area, as_size, sides, size_text
from robustvlm.errors import UserError, nearest

RESIZE_MODES = ("shortest", "squash", "longest")


def trial_pixels(count: int, size: Size, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return images [N, 3, height, width] to try a model out on: one ramp from 0 to 1 through all of them.

    Example:
        >>> trial_pixels(2, (4, 6)).shape
        torch.Size([2, 3, 4, 6])
    """
    return torch.linspace(0, 1, count * 3 * area(size), device=device).view(count, 3, *sides(size))


@dataclass(frozen=True)
class Framing:
    """The geometry of a model's preprocessing, in open_clip's terms.

    Args:
        image_size: what the model sees: the side of a square in pixels, or (height, width).
        interpolation: filter of the resize.
        resize_mode: "shortest" scales the image, its ratio kept, until it just covers that size, and crops the centre;
            "squash" scales both sides whatever their ratio; "longest" scales it until it just fits, and pads the rest.
        fill_color: grey level 0..255 of the padding.
        short_side: what "shortest" scales to before it crops: what the shorter side becomes, 256 for many models of 224
            pixels, or (height, width) that the image has to cover; 0 for the image size itself.

    Raises:
        UserError: a size below 1, an unknown mode, no grey level, or a scaled image that cannot be cropped.

    Example:
        >>> Framing(224, resize_mode="squash").at(64)
        Framing(image_size=64, interpolation='bicubic', resize_mode='squash', fill_color=0, short_side=0)
        >>> Framing([48, 64]).image_size
        (48, 64)
    """

    image_size: Size
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    short_side: Size = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_size(self.image_size))
        if self.short_side:
            object.__setattr__(self, "short_side", as_size(self.short_side, "short_side"))
        if self.resize_mode not in RESIZE_MODES:
            hint = nearest(str(self.resize_mode), RESIZE_MODES)
            raise UserError(f"unknown resize_mode '{self.resize_mode}': {hint}")
        if isinstance(self.fill_color, bool) or not isinstance(self.fill_color, int) or not 0 <= self.fill_color < 256:
            raise UserError(f"fill_color must be a grey level from 0 to 255, got {self.fill_color!r}")
        small = any(scaled < side for scaled, side in zip(sides(self.scaled), sides(self.image_size), strict=True))
        if self.short_side and (self.resize_mode != "shortest" or small):
            raise UserError(
                f"short_side is what resize_mode 'shortest' scales to, at least the image size, got "
                f"{size_text(self.short_side)} with '{self.resize_mode}' and {size_text(self.image_size)} pixels"
            )

    @property
    def scaled(self) -> Size:
        """What an image is scaled to cover in mode "shortest"; of a square, what its shorter side becomes."""
        return self.short_side or self.image_size

    @classmethod
    def of(cls, size: Size | Framing) -> Framing:
        """Return a framing as it is, and a plain size as CLIP's usual one."""
        return size if isinstance(size, Framing) else cls(size)

    def at(self, size: Size) -> Framing:
        """Return the same framing at another size.

        Raises:
            UserError: one of the two is no square: nothing says what the same framing would be there.
        """
        size = as_size(size)
        if size == self.image_size:
            return self
        if not (isinstance(size, int) and isinstance(self.image_size, int) and isinstance(self.short_side, int)):
            raise UserError(
                f"only a square can be taken at another size, and only as a square: the model's images have "
                f"{size_text(self.image_size)} pixels (height x width), got {size_text(size)}"
            )
        return replace(self, image_size=size, short_side=round(self.short_side * size / self.image_size))

    def options(self) -> dict[str, Any]:
        """Return the fields by name, as a model that stands on another one hands them on."""
        return asdict(self)

    def unusual(self) -> tuple[str, ...]:
        """Return what differs from CLIP's usual mode and padding as texts: nothing for most models."""
        if self.scaled != self.image_size:
            return (f"short_side {size_text(self.short_side)}",)
        mode = () if self.resize_mode == "shortest" else (f"resize_mode {self.resize_mode}",)
        return (*mode, f"fill_color {self.fill_color}") if self.resize_mode == "longest" and self.fill_color else mode


# From an image to the pixels a model takes

_STRIP = 2**25
"""Pixels of a resized image above which only the part that is kept is made, to bound memory."""
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def to_pixels(image: Image.Image, size: Size | Framing, *, interpolation: str = "bicubic") -> torch.Tensor:
    """Return float32 pixels [3, height, width] in [0, 1], framed as the model takes them.

    The same as open_clip's preprocessing without the normalisation, which is part of the model: `size` may be a
    model's `framing`, which says how; with a size alone the image is scaled to cover it, by `interpolation`, and the
    centre cropped.

    Raises:
        UserError: a size below 1 or an unknown interpolation.

    Example:
        >>> to_pixels(Image.new("RGB", (30, 20), (255, 0, 0)), 8)[:, 0, 0]
        tensor([1., 0., 0.])
        >>> to_pixels(Image.new("RGB", (30, 10), (255, 0, 0)), Framing(9, resize_mode="longest"))[0, :, 0]
        tensor([0., 0., 0., 1., 1., 1., 0., 0., 0.])
        >>> to_pixels(Image.new("RGB", (30, 20)), (6, 16)).shape
        torch.Size([3, 6, 16])
    """
    framing = size if isinstance(size, Framing) else Framing(size, interpolation)
    modes = {mode.value: mode for mode in InterpolationMode}
    if framing.interpolation not in modes:
        raise UserError(f"unknown interpolation '{framing.interpolation}': {nearest(framing.interpolation, modes)}")
    image = image if image.mode == "RGB" else image.convert("RGB")
    framed = _MODES[framing.resize_mode](image, framing, modes[framing.interpolation])
    return tv.pil_to_tensor(framed).to(torch.float32) / 255


def covering(height: int, width: int, scaled: Size) -> tuple[int, int]:
    """Return height and width of an image that is scaled, its ratio kept, until it just covers a size.

    The other side is rounded as the libraries do: down for a square, to the nearest number for others.

    Example:
        >>> covering(20, 33, 8), covering(20, 33, (8, 9)), covering(20, 33, (8, 16))
        ((8, 13), (8, 13), (10, 16))
    """
    if isinstance(scaled, int):
        short, long = sorted((height, width))
        other = int(scaled * long / short)
        return (scaled, other) if height <= width else (other, scaled)
    ratio = min(height / scaled[0], width / scaled[1])
    return round(height / ratio), round(width / ratio)


def _shortest(image: Image.Image, framing: Framing, mode: InterpolationMode) -> Image.Image:
    (height, width), (tall, wide) = (image.height, image.width), sides(framing.scaled)
    # The side that decides, and what it becomes; the scaled image has height * width * (to / by)^2 pixels.
    by, to = (height, tall) if height * wide <= width * tall else (width, wide)
    if to * to * height * width > _STRIP * by * by:
        return _middle_of_strip(image, framing, mode)
    scaled = covering(height, width, framing.scaled)
    if scaled != (height, width):
        image = tv.resize(image, list(scaled), interpolation=mode)
    return tv.center_crop(image, list(sides(framing.image_size)))


def _middle_of_strip(image: Image.Image, framing: Framing, mode: InterpolationMode) -> Image.Image:
    """Return, up to rounding, the centre that resizing all of a long strip would give, without making the rest."""
    height, width = sides(framing.image_size)
    tall, wide = covering(image.height, image.width, framing.scaled)
    left, above = round((wide - width) / 2.0) * image.width / wide, round((tall - height) / 2.0) * image.height / tall
    box = (left, above, left + width * image.width / wide, above + height * image.height / tall)
    return image.resize((width, height), _FILTERS.get(mode.value, Image.Resampling.NEAREST), box=box)


def _squash(image: Image.Image, framing: Framing, mode: InterpolationMode) -> Image.Image:
    return tv.resize(image, list(sides(framing.image_size)), interpolation=mode)


def fitting(height: int, width: int, size: Size) -> tuple[int, int]:
    """Return height and width of an image that is scaled, its ratio kept, until it just fits into a size.

    A strip keeps at least one line of pixels.

    Example:
        >>> fitting(20, 40, 8), fitting(1, 40, 8), fitting(20, 40, (8, 10))
        ((4, 8), (1, 8), (5, 10))
    """
    down, across = sides(size)
    ratio = max(height / down, width / across)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _longest(image: Image.Image, framing: Framing, mode: InterpolationMode) -> Image.Image:
    height, width = fitting(image.height, image.width, framing.image_size)
    image = tv.resize(image, [height, width], interpolation=mode)
    tall, wide = sides(framing.image_size)
    across, down = wide - width, tall - height
    # Of an odd margin the larger half goes right and below.
    return tv.pad(image, [across // 2, down // 2, (across + 1) // 2, (down + 1) // 2], fill=framing.fill_color)


_MODES = {"shortest": _shortest, "squash": _squash, "longest": _longest}
