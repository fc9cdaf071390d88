"""What every data source is: named classes and a stream of samples with stable ids, and the pixels made of them."""

from __future__ import annotations

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from robustvlm.core.framing import Framing, to_pixels
from robustvlm.core.size import Size
from robustvlm.errors import UserError

if TYPE_CHECKING:
    from robustvlm.data.trees import Forest


# What every data source is: named classes and a stream of samples with stable ids

SAMPLED = 64
"""How many images a digest of the content looks at."""
UNKNOWN = -1
"""Label of an image whose class is none of `class_names` (open-set images)."""


@dataclass(frozen=True)
class Sample:
    """One decoded image (RGB, 8 bit); `label` indexes the source's class names, -1 is an unknown class.

    `captions` are texts about this image alone; `subgroup` says which part of its class it is of, such as a style.
    """

    id: str
    image: Image.Image
    label: int
    captions: tuple[str, ...] = ()
    subgroup: str = ""


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be decoded and why; it is recorded and skipped, never raised."""

    id: str
    reason: str


class Tensors(NamedTuple):
    """Images [N, 3, S, S] in [0, 1], labels [N] (-1: unknown class) and ids, in source order."""

    images: Tensor
    labels: Tensor
    ids: list[str]


def _checked(group: Callable[[Any, str], str]) -> Callable[[Any, str], str]:
    """Return a source's `group` that refuses to name a thing by anything but a text: None would make all images one."""

    @wraps(group)
    def told(self: DataSource, image_id: str) -> str:
        found: object = group(self, image_id)
        if not isinstance(found, str) or not found:
            raise UserError(
                f"group('{image_id}') of '{self.spec}' must return a text that names what the image is a copy of (the "
                f"id, where it is none), got {found!r}"
            )
        return found

    return told


class DataSource(ABC):
    """Images with stable ids and labels, streamed in source order; at most a few images are in memory at once.

    A source implements `_stream` and, where it can be known without decoding, `ids`.

    Example:
        >>> class Dots(DataSource):
        ...     def ids(self):
        ...         return [f"dot-{i}" for i in range(4)]
        ...     def _stream(self, keep):
        ...         for i, name in enumerate(self.ids()):
        ...             if keep(name):
        ...                 yield Sample(name, Image.new("RGB", (2, 2)), i % 2)
        >>> [sample.label for sample in Dots("dots", ["even", "odd"]).samples()]
        [0, 1, 0, 1]
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have what a source says of copies checked wherever it is asked."""
        super().__init_subclass__(**kwargs)
        if "group" in vars(cls):
            cls.group = _checked(cls.group)  # type: ignore[assignment, method-assign]

    def __init__(
        self,
        spec: str,
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = ("a photo of a {}.",),
        tree: Forest | None = None,
    ) -> None:
        self.spec = spec
        self.class_names: tuple[str, ...] = tuple(class_names)
        self.templates: tuple[str, ...] = tuple(templates)
        self.tree = tree
        self.marks: tuple[str, ...] = self.class_names
        """What the source itself calls its classes (folder names, text labels), where that differs from the names."""
        self.remarks: list[str] = []
        """What a reader of any result has to know of the data: what was left aside, how names were understood."""
        self.captioned = False
        """Whether samples have captions; such data may do without classes."""
        self.code = ""
        """Digest of the file that a user's own source stands in: part of what the data is known by."""
        self._label_of: tuple[int, ...] | None = None

    def ids(self) -> list[str] | None:
        """Return the stable ids in source order, or None when only streaming can tell."""
        return None

    def group(self, image_id: str) -> str:
        """Return what images that are no independent evidence have in common, such as their drawing; else the id."""
        return image_id

    def things(self) -> tuple[str, ...]:
        """Return the names of what the images show, be it a class or not, as far as the source knows."""
        return self.class_names

    @abstractmethod
    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        """Yield the items whose id is kept, in source order, calling `keep` exactly once per id before decoding."""

    def samples(
        self, *, limit: int | None = None, keep: Callable[[str], bool] | None = None
    ) -> Iterator[Sample | Unreadable]:
        """Yield samples in source order: of the `limit` selected ids (see `select`), those that `keep` accepts.

        Which ids are selected depends on `limit` alone, so a resumed run that skips finished ids sees the same set.
        """
        if limit is not None and limit < 1:
            raise UserError(f"the limit must be at least 1 image, got {limit}")
        wanted = keep or _everything
        ids = self.ids() if limit is not None else None
        if limit is None:
            items = self._stream(wanted)
        elif ids is not None:
            chosen = frozenset(select(ids, limit))
            items = self._stream(lambda name: name in chosen and wanted(name))
        else:
            items = self._first(limit, wanted)
        for item in items:
            yield self._settled(item) if isinstance(item, Sample) else item

    def tensors(self, size: Size | Framing, *, limit: int | None = None) -> Tensors:
        """Return images as tensors in [0, 1] with labels and ids, held in memory; the `limit` that a run would take.

        Args:
            size: side in pixels or (height, width), or the `framing` of a model, which also says how images are
                brought to it.

        Raises:
            UserError: an image cannot be read, or there is none.

        Example:
            >>> from robustvlm.data import open_data
            >>> images, labels, ids = open_data("emoji").tensors(64, limit=3)
            >>> images.shape, len(ids)
            (torch.Size([3, 3, 64, 64]), 3)
        """
        held: list[Sample] = []
        for item in self.samples(limit=limit):
            if isinstance(item, Unreadable):
                raise UserError(f"image '{item.id}' of '{self.spec}' cannot be read ({item.reason}): leave it out")
            held.append(item)
        if not held:
            raise UserError(f"there is no image in '{self.spec}'")
        images = torch.stack([to_pixels(item.image, size) for item in held])
        return Tensors(images, torch.tensor([item.label for item in held]), [item.id for item in held])

    def _first(self, limit: int, wanted: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        """Yield what `wanted` accepts among the first `limit` ids of a stream, then stop reading."""
        seen = 0

        def gate(image_id: str) -> bool:
            nonlocal seen
            if seen == limit:
                raise _LimitReached
            seen += 1
            return wanted(image_id)

        try:
            for item in self._stream(gate):
                yield item
                if seen == limit:
                    return
        except _LimitReached:
            return

    def settle(self, class_names: Sequence[str], labels: Sequence[int] | None = None) -> None:
        """Take the class names in label order; `labels` are those of the source's own classes, where they move."""
        self.class_names = tuple(class_names)
        self._label_of = None if labels is None else tuple(labels)

    def _settled(self, item: Sample) -> Sample:
        """Return a sample with its label among the settled class names."""
        self.check_label(item.label, item.id)
        if self._label_of is None or item.label == UNKNOWN:
            return item
        return replace(item, label=self._label_of[item.label])

    def require_names(self, given: Sequence[str] | Mapping[str, str] | None) -> None:  # noqa: ARG002
        """Refuse class names of its own that contradict each other, before they are used.

        `given` are those of --classes; a source that is in doubt may do with them.
        """
        return

    def require_templates(self) -> None:
        """Refuse templates of its own that contradict each other, before they are used."""
        return

    def check(self) -> None:
        """Refuse content that does not fit `class_names`; called once the names are settled, before any streaming."""
        return

    def check_numbers(self, labels: Collection[int], where: str) -> None:
        """Refuse numbers without a class name among all labels; say where they may begin at 1 instead of 0."""
        if not labels:
            return
        for label in (min(labels), max(labels)):
            self.check_label(label, where)
        if self._label_of is None and set(labels) - {UNKNOWN} == set(range(1, len(self.class_names))):
            self.remarks.append(f"no image has label 0 ('{self.class_names[0]}'): do the labels begin at 1?")

    def check_label(self, label: int, where: str) -> None:
        """Refuse a label, of those that the source itself has, without a class name."""
        count = len(self.class_names if self._label_of is None else self._label_of)
        if not UNKNOWN <= label < count:
            advice = "pass --classes FILE with a name for every label"
            if label == count:
                advice += "; if the labels begin at 1, begin them at 0"
            found = f"'{self.spec}' has label {label} ({where}) but {count} class names"
            raise UserError(f"{found}, for labels 0 to {count - 1}: {advice}")

    def fingerprint(self) -> str:
        """Return a hex digest of what the source holds: its kind, class names and content identity."""
        kind = self.spec.partition(":")[0].partition("?")[0]
        digest = hashlib.blake2b(digest_size=16)
        moved = () if self._label_of is None else (f"labels {self._label_of}",)
        code = (f"code {self.code}",) if self.code else ()
        for part in (kind, *self.class_names, *moved, *code, "|", *self._identity()):
            text = part.encode("utf-8", "surrogateescape")
            digest.update(len(text).to_bytes(8, "big") + text)
        return digest.hexdigest()

    def content(self) -> str | None:
        """Return a digest of a few images as they are stored, always the same; None where that would be costly.

        Beside the fingerprint, which many sources take from names, sizes and labels: it tells data whose every image
        was changed, as by a corruption, from what they were.
        """
        digest, seen = hashlib.blake2b(digest_size=16), False
        for name, data in self._stored():
            for part in (name.encode("utf-8", "surrogateescape"), data):
                digest.update(len(part).to_bytes(8, "big") + part)
            seen = True
        return digest.hexdigest() if seen else None

    def _stored(self) -> Iterable[tuple[str, bytes]]:
        """Yield the ids of at most `SAMPLED` images, always the same ones, and what is stored of each."""
        return ()

    def _identity(self) -> Iterable[str]:
        """Return texts that change when the content does; the ids unless a source knows better."""
        return self.ids() or (self.spec,)


class _LimitReached(Exception):
    """Raised inside `keep` to end a stream whose remaining ids are not wanted."""


def _everything(_: str) -> bool:
    return True


def select(ids: Iterable[str], limit: int | None) -> list[str]:
    """Return the `limit` ids with the smallest BLAKE2b hash, in hash order; all ids when `limit` is None.

    The choice ignores classes and order, and is nested: the ids for limit 100 are among those for limit 200.

    Example:
        >>> ids = [f"image-{i}" for i in range(50)]
        >>> select(ids, 5) == select(reversed(ids), 20)[:5]
        True
    """
    if limit is None:
        return sorted(ids, key=_rank)
    return heapq.nsmallest(limit, ids, key=_rank)


def _rank(image_id: str) -> tuple[bytes, str]:
    return hashlib.blake2b(image_id.encode("utf-8", "surrogateescape"), digest_size=16).digest(), image_id
