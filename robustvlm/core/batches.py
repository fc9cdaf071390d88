"""Batch sizes on which an image gets the same bits wherever it stands.

A matrix kernel works on blocks of rows and may sum the rows that are left over in another order: then the last digits
of an image's answer tell its place in the batch, and with it the other images, the number of processes and resumption.
"""

from collections.abc import Callable, Iterator, Sequence
from math import gcd

import torch
from torch import Tensor

from robustvlm.errors import is_out_of_memory

COUPLED = 1e-3
"""An answer that moves by more of its size, asked for again or beside other images, does not move by rounding.

Rounding moves it by about 1e-6 between batch shapes, batch statistics by percents.
"""

TRIES = 4
"""So often is a model asked again that was not seen to draw and seems to look at an image's neighbours."""

# The kernels of CPUs with AVX2 work on blocks of six rows: of six sizes in a row, some leave no rest.
_BLOCK = 6

# Answers of several kinds to the images with these row numbers, each with one row per number.
Ask = Callable[[Tensor], Sequence[Tensor]]


def steady_sizes(ask: Ask, count: int, first: Sequence[Tensor] | None = None) -> tuple[int, ...]:
    """Return batch sizes, descending, on which an image's answer is the same to the bit at every place.

    The first is the largest that was found to be so, `count` if possible; the others are its halves, quarters and so
    on, as far as they give the bits of the first. A single row always has one place.

    Args:
        ask: a model that gives the same answer when asked again.
        count: rows of a full batch.
        first: the answer to `arange(count)`, where it is known.

    Example:
        >>> x = torch.rand(8, 3)
        >>> steady_sizes(lambda rows: [x[rows] * 2], 8)
        (8, 4, 2, 1)
        >>> def rest_apart(rows):  # blocks of six rows, and the rest in another way
        ...     place = torch.arange(len(rows))[:, None]
        ...     return [x[rows] * torch.where(place < len(rows) // 6 * 6, 2, 3)]
        >>> steady_sizes(rest_apart, 8)
        (6,)
    """
    for size in _candidates(count):
        rows = torch.arange(size)
        whole = first if first is not None and size == count else ask(rows)
        shifted = (rows + _shift(size)) % size
        if size == 1 or _same(ask(shifted), whole, shifted):
            break
    sizes, smaller = [size], size // 2
    while smaller >= 1:
        rows = torch.arange(smaller)
        if _same(ask(rows), whole, rows):
            sizes.append(smaller)
        smaller //= 2
    return tuple(sizes)


def narrower(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes that are left when memory does not suffice for the first; half of it where it is the only one.

    Example:
        >>> narrower((64, 16, 8)), narrower((64,))
        ((16, 8), (32,))
    """
    return tuple(sizes[1:]) or (sizes[0] // 2,)


def narrower_after(error: BaseException, sizes: Sequence[int], device: torch.device) -> tuple[int, ...]:
    """Return the sizes to go on with after memory ran out; raise any other error, and where nothing is smaller.

    Example:
        >>> narrower_after(MemoryError(), (64, 16), torch.device("cpu"))
        (16,)
    """
    if not is_out_of_memory(error) or sizes[0] == 1:
        raise error
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return narrower(sizes)


def _candidates(count: int) -> Iterator[int]:
    yield from range(count, max(count - _BLOCK, count // 2), -1)
    while count > 1:
        count //= 2
        yield count


def _shift(size: int) -> int:
    """Return a shift by about half a batch, prime to its size: no set of places but all is mapped onto itself."""
    return next(shift for shift in range(max(size // 2, 1), 0, -1) if gcd(shift, size) == 1)


def _same(new: Sequence[Tensor], old: Sequence[Tensor], rows: Tensor) -> bool:
    pairs = zip(new, old, strict=True)
    return all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b[rows.to(b.device)])) for a, b in pairs)


# Sizes that are tried when rows go to waste: kernels work on blocks of powers of two, or of six rows.
_STEPS = sorted({2**k for k in range(20)} | {3 * 2**k for k in range(19)})


# Numbers that must agree to the bit before a size is believed: of a few, rounding alone lets many agree.
_EVIDENCE = 64


class SteadySizes:
    """Batch sizes on which an image gets the same bits, descending; smaller ones are looked for once that pays.

    Args:
        sizes: those that are known, descending.

    Example:
        >>> sizes = SteadySizes((36, 18))
        >>> [sizes.worth_trying(rows, paid=18) for rows in (1, 7)]  # 17 spare rows, then 11, pay for more than these
        [1, 8]
        >>> sizes.note(1, agree=False, numbers=500)
        >>> sizes.note(8, agree=True, numbers=500)
        >>> sizes.steady
        (36, 18, 8)
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.steady = tuple(sizes)
        self._evidence: dict[int, int] = {}
        self._refused: set[int] = set()
        self._wasted = 0

    def worth_trying(self, rows: int, paid: int) -> int | None:
        """Count the spare rows of a pass; return an open size for its rows once they have cost as much as to try it.

        Args:
            rows: rows that were needed. paid: rows of the batches that held them.
        """
        self._wasted += paid - rows
        known = self._refused.union(self.steady)
        size = next((step for step in _STEPS if rows <= step < paid and step not in known), None)
        if size is None or size > self._wasted:
            return None
        self._wasted -= size
        return size

    def note(self, size: int, *, agree: bool, numbers: int) -> None:
        """Take in whether so many numbers of a trial were the same to the bit; one that was not rules the size out."""
        if not agree:
            self._refused.add(size)
            return
        self._evidence[size] = self._evidence.get(size, 0) + numbers
        if self._evidence[size] >= _EVIDENCE:
            self.steady = tuple(sorted({*self.steady, size}, reverse=True))

    def narrow(self, error: BaseException, device: torch.device) -> None:
        """Go on with smaller sizes after memory ran out; raise any other error, and where nothing is smaller."""
        self.steady = narrower_after(error, self.steady, device)


# Batch sizes: on which of the allowed ones a number of rows costs least

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
