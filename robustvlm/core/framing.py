"""How a model takes images: the square it sees, how an image of any shape is brought into it, and by which filter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

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

    Raises:
        UserError: a size below 1, an unknown mode, or no grey level.

    Example:
        >>> Framing(224, resize_mode="squash").at(64)
        Framing(image_size=64, interpolation='bicubic', resize_mode='squash', fill_color=0)
    """

    image_size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"the image size must be at least 1 pixel, got {self.image_size}")
        if self.resize_mode not in RESIZE_MODES:
            hint = nearest(str(self.resize_mode), RESIZE_MODES)
            raise UserError(f"unknown resize_mode '{self.resize_mode}': {hint}")
        if isinstance(self.fill_color, bool) or not isinstance(self.fill_color, int) or not 0 <= self.fill_color < 256:
            raise UserError(f"fill_color must be a grey level from 0 to 255, got {self.fill_color!r}")

    @classmethod
    def of(cls, size: int | Framing) -> Framing:
        """Return a framing as it is, and a plain size as CLIP's usual one."""
        return size if isinstance(size, Framing) else cls(size)

    def at(self, size: int) -> Framing:
        """Return the same framing at another size."""
        return replace(self, image_size=size)

    def options(self) -> dict[str, Any]:
        """Return the fields by name, as a model that stands on another one hands them on."""
        return asdict(self)

    def unusual(self) -> tuple[str, ...]:
        """Return what differs from CLIP's usual mode and padding as texts: nothing for most models."""
        mode = () if self.resize_mode == "shortest" else (f"resize_mode {self.resize_mode}",)
        return (*mode, f"fill_color {self.fill_color}") if self.resize_mode == "longest" and self.fill_color else mode
