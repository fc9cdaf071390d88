"""Any data source as training data: a seeded order, decoded pictures within a bound on memory, augmentation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from robustvlm.core.framing import Framing
from robustvlm.core.seeds import generator
from robustvlm.data.pixels import to_pixels
from robustvlm.data.prefetch import prefetch
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable, select
from robustvlm.errors import UserError
from robustvlm.training.augment import AUGMENTATIONS, Augmentation, augment
from robustvlm.training.data import Batch, TrainingData

CACHE_BYTES = 2 * 2**30


class TrainingImages(TrainingData):
    """The images of a source, for training.

    The order of an epoch is a permutation drawn by (seed, epoch); the augmentation of an image by (seed, epoch, id).
    Pictures are kept decoded, 8 bit, at the model's size: all of them if they fit into `cache_bytes`, otherwise as
    many as do, read ahead in the order of training (a pass over the source for each load). Where an image cannot be
    used, the next in the order of the epoch stands in for it.

    Args:
        source: the images; size: side in pixels, or a model's framing, which also says how it is brought about.
        seed: of order and augmentation; how: what is augmented.
        labelled: leave out images of unknown classes.
        ids: the images to use, None for all; limit: use so many of them, chosen by a hash of their ids.
        cache_bytes: bound on decoded pictures in memory.
        ahead: batches made ready in the background; 0 where the model runs on the CPU itself.

    Raises:
        UserError: no image, or none that can be used.

    Example:
        >>> from robustvlm.data import open_data
        >>> images = TrainingImages(open_data("emoji?split=train&copies=1"), size=32, seed=0)
        >>> [tuple(batch.pixels.shape) for batch in images.batches([range(0, 2), range(5, 9)])]
        [(2, 3, 32, 32), (4, 3, 32, 32)]
    """

    def __init__(
        self,
        source: DataSource,
        *,
        size: int | Framing,
        seed: int,
        how: Augmentation = AUGMENTATIONS["crop"],
        labelled: bool = True,
        limit: int | None = None,
        ids: Sequence[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        ahead: int = 0,
    ) -> None:
        self.source, self.framing = source, Framing.of(size)
        side = self.framing.image_size
        self.seed, self.how, self.labelled, self.ahead = seed, how, labelled, ahead
        found = list(ids) if ids is not None else ids_of(source)
        self.ids = select(found, limit) if limit is not None else found
        if not self.ids:
            raise UserError(f"'{source.spec}' holds no images to train on")
        self._room = max(1, cache_bytes // (3 * side * side))
        self._pictures: dict[str, tuple[Tensor, int]] = {}
        self._skipped: dict[str, str] = {}
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def skipped(self) -> Mapping[str, str]:
        return dict(self._skipped)

    def batches(self, spans: Iterable[range]) -> Iterator[Batch]:
        made = self._batches(iter(spans))
        return prefetch(made, self.ahead) if self.ahead else made

    def _batches(self, spans: Iterator[range]) -> Iterator[Batch]:
        # If not all pictures fit, those of as many spans as do are loaded in one pass over the source.
        at_once = len(self.ids) if len(self.ids) <= self._room else self._room
        load: list[range] = []
        for span in spans:
            if load and sum(map(len, load)) + len(span) > at_once:
                yield from self._loaded(load)
                load = []
            load.append(span)
            if len(self.ids) <= self._room:
                yield from self._loaded(load)
                load = []
        if load:
            yield from self._loaded(load)

    def _loaded(self, load: list[range]) -> Iterator[Batch]:
        """Yield the batches of several spans, whose pictures are read together."""
        chosen = self._chosen([position for span in load for position in span])
        for span in load:
            names = [chosen[position] for position in span]
            pixels = torch.stack([self._pictures[name][0] for name in names]).float() / 255
            keys = [(self.seed, p // len(self.ids), name) for p, name in zip(span, names, strict=True)]
            labels = torch.tensor([self._pictures[name][1] for name in names])
            yield Batch(augment(pixels, keys, self.how), labels, tuple(names))

    def _chosen(self, positions: list[int]) -> dict[int, str]:
        """Return the id of the usable image for every position, with its picture in memory."""
        everything = len(self.ids) <= self._room
        if everything and not self._pictures:
            self._read(set(self.ids))
        if not everything:
            wanted = {self._at(position, 0) for position in positions}
            self._pictures = {name: kept for name, kept in self._pictures.items() if name in wanted}
        found: dict[int, str] = {}
        waiting = dict.fromkeys(positions, 0)
        while waiting:
            missing = {self._at(p, by) for p, by in waiting.items()} - self._pictures.keys() - self._skipped.keys()
            self._read(missing)
            if len(self._skipped) == len(self.ids):
                name, reason = next(iter(self._skipped.items()))
                raise UserError(
                    f"none of the images of '{self.source.spec}' can be used; the first, '{name}': {reason}"
                )
            for position, by in list(waiting.items()):
                name = self._at(position, by)
                if name in self._pictures:
                    found[position] = name
                    del waiting[position]
                else:
                    waiting[position] = by + 1
        return found

    def _at(self, position: int, by: int) -> str:
        """Return the id at a position, or `by` places further on in the same epoch."""
        epoch, place = divmod(position, len(self.ids))
        if epoch not in self._orders:
            draws = torch.randperm(len(self.ids), generator=generator(self.seed, "order", epoch))
            # A span may reach over the end of an epoch; earlier ones are not asked for again.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1} | {epoch: draws.tolist()}
        return self.ids[self._orders[epoch][(place + by) % len(self.ids)]]

    def _read(self, wanted: set[str]) -> None:
        """Decode the pictures of some ids; what cannot be used is recorded with its reason."""
        if not wanted:
            return
        for item in self.source.samples(keep=wanted.__contains__):
            if item.id not in wanted:
                continue
            if isinstance(item, Unreadable):
                self._skipped[item.id] = item.reason
            elif item.label == UNKNOWN and self.labelled:
                self._skipped[item.id] = "of an unknown class"
            else:
                self._pictures[item.id] = self._picture(item), item.label
        for name in sorted(wanted - self._pictures.keys() - self._skipped.keys()):
            self._skipped[name] = "gone since the run began"

    def _picture(self, sample: Sample) -> Tensor:
        pixels = to_pixels(sample.image, self.framing)
        return (pixels * 255).round().to(torch.uint8)


def ids_of(source: DataSource) -> list[str]:
    """Return the ids of a source; one that cannot name them is read through once, without decoding."""
    known = source.ids()
    if known is not None:
        return known
    found: dict[str, None] = {}

    def note(name: str) -> bool:
        found.setdefault(name)
        return False

    for _ in source.samples(keep=note):
        pass
    return list(found)
