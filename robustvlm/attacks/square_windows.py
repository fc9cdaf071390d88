"""Square windows of different sizes and places, one per lane, as masks and coordinates over the whole image."""

from __future__ import annotations

import torch
from torch import Tensor


def offsets(draws: Tensor, side: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return (top, left) of each lane's window, uniform over all places where it fits.

    Args:
        draws: uniform numbers in [0, 1), [L, 2].
        side: width of the windows, int64 [L], at most the smaller side of the image.

    Example:
        >>> [place.item() for place in offsets(torch.tensor([[0.0, 0.999]]), torch.tensor([3]), 5, 6)]
        [0, 3]
    """
    top, left = (draws[:, axis].double() * (size - side + 1) for axis, size in enumerate((height, width)))
    return top.long(), left.long()


def relative(height: int, width: int, top: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Return every pixel's row and column counted from the window's corner, int64 [L, 1, H, 1] and [L, 1, 1, W]."""
    rows = torch.arange(height, device=top.device).view(1, 1, height, 1) - top.view(-1, 1, 1, 1)
    columns = torch.arange(width, device=left.device).view(1, 1, 1, width) - left.view(-1, 1, 1, 1)
    return rows, columns


def window(height: int, width: int, top: Tensor, left: Tensor, side: Tensor) -> Tensor:
    """Return the mask of each lane's window, bool [L, 1, H, W].

    Example:
        >>> one = torch.tensor([1])
        >>> window(3, 3, one, one, one)[0, 0].int().tolist()
        [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    """
    rows, columns = relative(height, width, top, left)
    sides = side.view(-1, 1, 1, 1)
    return (rows >= 0) & (rows < sides) & (columns >= 0) & (columns < sides)


def bits(numbers: Tensor, count: int) -> Tensor:
    """Return the lowest `count` bits of whole numbers [L] as bool [L, count, 1, 1]: one random sign per channel.

    Example:
        >>> bits(torch.tensor([5]), 3).flatten().tolist()
        [True, False, True]
    """
    shifts = torch.arange(count, device=numbers.device)
    return ((numbers[:, None] >> shifts) & 1).bool()[:, :, None, None]
