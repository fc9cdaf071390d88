"""What a trainer reads: an endless order of images, cut into batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Augmented images: pixels [B, 3, S, S] in [0, 1] on the CPU, labels int64 [B], and the id of each."""

    pixels: Tensor
    labels: Tensor
    ids: tuple[str, ...]


class TrainingData(ABC):
    """Images in an endless order: position p is image number p % n of epoch p // n, n = `len`.

    What stands at a position is fixed by the data and its seed, so that a trainer can begin anywhere, and several
    ranks that ask for different positions together read what one would have read.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of images of an epoch."""

    @abstractmethod
    def batches(self, spans: Iterable[range]) -> Iterator[Batch]:
        """Yield the images at each span of positions; spans are taken from the iterable as they are needed."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Images that cannot be used, by id, and why; others stand in their place."""
        return {}


def spans(*, step: int, last: int, batch_size: int, part: int, rank: int, ranks: int) -> Iterator[range]:
    """Yield the positions of every part that one rank sees in the steps from `step` to `last`, in order.

    The batch of step s is positions s * batch_size and on; it is cut into parts of equal size, dealt out in turn.

    Example:
        >>> [list(span) for span in spans(step=1, last=2, batch_size=4, part=1, rank=1, ranks=2)]
        [[5], [7]]
    """
    for at in range(step, last):
        for start in range(rank * part, batch_size, ranks * part):
            yield range(at * batch_size + start, at * batch_size + start + part)
