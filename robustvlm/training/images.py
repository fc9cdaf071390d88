"""Images as training data: a seeded order, decoded within a bound on memory, cut into batches, augmented."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.framing import Framing, to_pixels
from robustvlm.core.seeds import generator
from robustvlm.core.size import Size, area
from robustvlm.data.decode import prefetch
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable, select
from robustvlm.errors import UserError, nearest

# What a trainer reads: an endless order of images, cut into batches


@dataclass(frozen=True)
class Batch:
    """Augmented images: pixels [B, 3, H, W] in [0, 1] on the CPU, labels int64 [B], and the id of each."""

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


# Random crops, mirroring and colour changes of training images, each drawn by the image's own stream

_GREY = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """What is changed at random in a training image.

    Args:
        crop: smallest side of what is cut out, as a share of the image's; 1: none.
        flip: mirror half of the images.
        colour: largest change of brightness, contrast and saturation, as a share; 0: none.
    """

    crop: float = 1.0
    flip: bool = False
    colour: float = 0.0


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "crop": Augmentation(crop=0.75, flip=True),
    "strong": Augmentation(crop=0.5, flip=True, colour=0.4),
}
"""The augmentations by name; "crop" suits photographs, "none" or a crop without mirroring suits text and digits."""


def parse_augmentation(name: str) -> Augmentation:
    """Return the augmentation of that name, or raise UserError.

    Example:
        >>> parse_augmentation("flip")
        Augmentation(crop=1.0, flip=True, colour=0.0)
    """
    if name not in AUGMENTATIONS:
        raise UserError(f"unknown augmentation '{name}': {nearest(name, AUGMENTATIONS)}")
    return AUGMENTATIONS[name]


def augment(pixels: Tensor, keys: Sequence[tuple[int | str, ...]], how: Augmentation) -> Tensor:
    """Return changed images [B, 3, H, W] in [0, 1]; the draws of image i come from the stream that `keys[i]` names.

    Cutting out samples bilinearly; the picture is never enlarged beyond its border.

    Example:
        >>> pixels = torch.rand(2, 3, 8, 8)
        >>> both = augment(pixels, [("a",), ("b",)], AUGMENTATIONS["strong"])
        >>> torch.equal(augment(pixels[1:], [("b",)], AUGMENTATIONS["strong"]), both[1:])
        True
    """
    if how == Augmentation() or not keys:
        return pixels
    # Seven numbers whatever is switched on, so that e.g. the crop is the same with and without colour.
    draws = torch.stack([torch.rand(7, generator=generator("augment", *key)) for key in keys])
    if how.crop < 1:
        pixels = _cropped(pixels, draws[:, :3], how.crop)
    if how.flip:
        pixels = torch.where(draws[:, 3, None, None, None] < 0.5, pixels.flip(-1), pixels)
    return _recoloured(pixels, draws[:, 4:], how.colour) if how.colour else pixels


def _cropped(pixels: Tensor, draws: Tensor, least: float) -> Tensor:
    """Cut out parts of the image's shape, their area uniform between least² and 1, and bring them to full size."""
    side = (least**2 + (1 - least**2) * draws[:, 0]).sqrt()
    offset = (2 * draws[:, 1:] - 1) * (1 - side)[:, None]
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = offset
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _recoloured(pixels: Tensor, draws: Tensor, most: float) -> Tensor:
    """Change saturation, contrast and brightness, each by a factor between 1 - most and 1 + most."""
    factors = 1 + most * (2 * draws - 1)
    saturation, contrast, brightness = (factor[:, None, None, None] for factor in factors.T)
    grey = (pixels * _GREY[:, None, None]).sum(dim=1, keepdim=True)
    pixels = grey + (pixels - grey) * saturation
    middle = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return ((middle + (pixels - middle) * contrast) * brightness).clamp(0, 1)


# Any data source as training data: a seeded order, decoded pictures within a bound on memory, augmentation

CACHE_BYTES = 2 * 2**30


class TrainingImages(TrainingData):
    """The images of a source, for training.

    The order of an epoch is a permutation drawn by (seed, epoch); the augmentation of an image by (seed, epoch, id).
    Pictures are kept decoded, 8 bit, at the model's size: all of them if they fit into `cache_bytes`, otherwise as
    many as do, read ahead in the order of training (a pass over the source for each load). Where an image cannot be
    used, the next in the order of the epoch stands in for it.

    Args:
        source: the images; size: side in pixels or (height, width), or a model's framing, which also says how it is
            brought about.
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
        size: Size | Framing,
        seed: int,
        how: Augmentation = AUGMENTATIONS["crop"],
        labelled: bool = True,
        limit: int | None = None,
        ids: Sequence[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        ahead: int = 0,
    ) -> None:
        self.source, self.framing = source, Framing.of(size)
        self.seed, self.how, self.labelled, self.ahead = seed, how, labelled, ahead
        found = list(ids) if ids is not None else ids_of(source)
        self.ids = select(found, limit) if limit is not None else found
        if not self.ids:
            raise UserError(f"'{source.spec}' holds no images to train on")
        self._room = max(1, cache_bytes // (3 * area(self.framing.image_size)))
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
