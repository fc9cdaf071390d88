"""The size of an image in pixels: the side of a square, or height and width."""

import operator
from typing import Any, TypeAlias

from robustvlm.errors import UserError

Size: TypeAlias = int | tuple[int, int]
"""The side of a square in pixels, or (height, width) where they differ; `as_size` brings any input to this form."""


def as_size(value: Any, what: str = "the image size") -> Size:
    """Return a side, or a pair (height, width), as a `Size`: equal sides are one number.

    Raises:
        UserError: neither a whole number nor a pair of them, or one below 1; it begins with `what`.

    Example:
        >>> as_size(64), as_size([64, 64]), as_size([48, 64])
        (64, 64, (48, 64))
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    try:
        if any(isinstance(side, bool) for side in pair):
            raise TypeError("a bool is no number of pixels")
        height, width = map(operator.index, pair)
    except (TypeError, ValueError):
        raise UserError(f"{what} must be a whole number of pixels, or (height, width), got {value!r}") from None
    if min(height, width) < 1:
        raise UserError(f"{what} must be at least 1 pixel, got {height if height == width else (height, width)}")
    return height if height == width else (height, width)


def sides(size: Size) -> tuple[int, int]:
    """Return height and width of a size.

    Example:
        >>> sides(64), sides((48, 64))
        ((64, 64), (48, 64))
    """
    return (size, size) if isinstance(size, int) else size


def area(size: Size) -> int:
    """Return the number of pixels of an image.

    Example:
        >>> area(64), area((48, 64))
        (4096, 3072)
    """
    height, width = sides(size)
    return height * width


def size_text(size: Size) -> str:
    """Return a size as a text: one number for a square, else height by width.

    Example:
        >>> size_text(64), size_text((48, 64))
        ('64', '48x64')
    """
    return str(size) if isinstance(size, int) else "x".join(map(str, size))
