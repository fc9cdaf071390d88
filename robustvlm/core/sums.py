"""Sums that come out the same to the bit: always in one order, whatever batch, layout, thread or processor adds them.

Libraries add up the same numbers in another order when a row stands alone in its batch, lies in memory channel by
channel or pixel by pixel, or is shared by threads. Whatever is recorded, or decides where an attack goes next, is
summed here instead, so that an interrupted run ends with the very numbers of a straight one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_sums(values: Tensor) -> Tensor:
    """Return the sum of every row, [B, ...] -> [B]: halves are added element by element until one number is left.

    Only element-wise additions are made, in an order that follows from the shape of a row alone. The rounding error
    grows with the logarithm of a row's length.

    Example:
        >>> row_sums(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        tensor([ 6., 15.])
    """
    flat = values.flatten(1)
    if flat.shape[1] == 0:
        return flat.new_zeros(len(flat))
    while flat.shape[1] > 1:
        if flat.shape[1] % 2:
            flat = torch.nn.functional.pad(flat, (0, 1))
        half = flat.shape[1] // 2
        flat = flat[:, :half] + flat[:, half:]
    return flat[:, 0]


def row_norms(values: Tensor) -> Tensor:
    """Return the Euclidean length of every row, [B, ...] -> [B], summed as by `row_sums`.

    Example:
        >>> row_norms(torch.tensor([[[3.0], [4.0]]]))
        tensor([5.])
    """
    return row_sums(values * values).sqrt()


def rows_times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return rows [B, D] times a matrix's transpose [K, D] as [B, K], every row by a product of its own.

    A matrix product adds up in another order for two rows than for sixty-four.

    Example:
        >>> rows_times(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        tensor([[11., 17.]])
    """
    matrix = matrix.contiguous()
    return torch.stack([torch.mv(matrix, row.contiguous()) for row in rows]) if len(rows) else rows @ matrix.T
