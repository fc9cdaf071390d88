"""Batch sizes: on which of the allowed ones a number of rows costs least."""

from __future__ import annotations

from collections.abc import Sequence

# A second batch is worth its start only when it saves at least this share of the rows.
_WORTH = 0.2


def batch_sizes(rungs: Sequence[int], rows: int) -> tuple[int, ...]:
    """Return the one or two allowed batch sizes that hold so many rows with the fewest spare ones.

    Args:
        rungs: allowed sizes, descending; the largest holds all rows.

    Example:
        >>> [batch_sizes((64, 32, 16, 8), rows) for rows in (64, 60, 35, 3)]
        [(64,), (64,), (32, 8), (8,)]
    """
    whole = smallest(rungs, rows)
    pairs = [(rung, smallest(rungs, rows - rung)) for rung in rungs if rung < rows]
    best = min(pairs, key=sum, default=(whole,))
    return best if sum(best) <= (1 - _WORTH) * whole else (whole,)


def smallest(rungs: Sequence[int], rows: int) -> int:
    """Return the smallest allowed size that holds so many rows.

    Example:
        >>> smallest((64, 32), 33)
        64
    """
    return min(rung for rung in rungs if rung >= rows)
