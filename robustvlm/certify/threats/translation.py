"""The threat of translation: the image moved by whole pixels, what leaves on one side entering on the other."""

import torch
from torch import Tensor

from robustvlm.certify.normal import Array
from robustvlm.certify.threats.base import Move

_SIDE = 513
"""Rows of whole shifts up to which all of them are listed."""


class Translation(Move):
    """Cyclic shifts by whole pixels; Gaussian noise on the shift, rounded to whole pixels.

    For a whole shift s and any real t, floor(s + t + 1/2) = s + floor(t + 1/2), and cyclic shifts add up. So the copies
    of a shifted image are those of the image with the Gaussian shifted by s, and the rounding is part of what is
    averaged: T0 holds for whole shifts. Shifts that bring in black or reflected borders do not add up, and shifts by
    parts of a pixel interpolate: of both nothing is certified.

    Example:
        >>> row = torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]])
        >>> Translation().move(row, torch.tensor([[0.0, 1.4]])).flatten().tolist()
        [3.0, 0.0, 1.0, 2.0]
    """

    name, moves, usual, most = "translation", 2, 4.0, 10_000.0
    allows = (
        "is the image moved by whole pixels, down and to the right or against it, by a Euclidean length below the "
        "radius, where what leaves on one side enters on the other (cyclic)"
    )
    unit = "translation: Euclidean length of the shift in whole pixels"

    def move(self, rows: Tensor, by: Tensor) -> Tensor:
        whole = (by + 0.5).floor().long()
        for axis in (0, 1):
            side = rows.shape[2 + axis]
            places = (torch.arange(side, device=rows.device) - whole[:, axis : axis + 1]) % side
            wide = places[:, None, :, None] if axis == 0 else places[:, None, None, :]
            rows = rows.gather(2 + axis, wide.expand_as(rows))
        return rows

    def inside(self, radius: float, steps: int) -> Array:
        """Return whole shifts within `radius`: all of them if they are no more than `steps`, else the farthest."""
        import numpy as np

        line = np.arange(-int(radius), int(radius) + 1)
        if len(line) <= _SIDE:
            down, right = np.meshgrid(line, line, indexing="ij")
        else:  # too many to look at all: in every row and column the farthest
            ends = np.floor(np.sqrt(radius * radius - line.astype(np.float64) ** 2))
            down, right = np.concatenate([line, line, ends, -ends]), np.concatenate([ends, -ends, line, line])
        shifts = np.unique(np.stack([down.ravel(), right.ravel()], axis=1).astype(np.float64), axis=0)
        length = np.linalg.norm(shifts, axis=1)
        known = (length <= radius) & (length > 0.0)
        shifts, length = shifts[known], length[known]
        return shifts[np.argsort(-length, kind="stable")[:steps]]
