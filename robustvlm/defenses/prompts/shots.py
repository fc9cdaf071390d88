"""A few images of each class, and the features of images, encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.data import UNKNOWN, DataSource, Sample, to_pixels
from robustvlm.errors import UserError
from robustvlm.models.vlm import VLM


@dataclass(frozen=True)
class Features:
    """Unit features [N, D] with labels [N], ids and groups; label -1 is an unknown class.

    Images of one group (`DataSource.group`) show the same thing, and are one observation to an interval. `unreadable`
    counts images that could not be read and are in none of the rows.
    """

    features: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    unreadable: int = 0

    def rows(self, index: Tensor) -> Features:
        """Return some of the images."""
        chosen = index.tolist()
        return Features(
            self.features[index],
            self.labels[index],
            tuple(self.ids[i] for i in chosen),
            tuple(self.groups[i] for i in chosen),
            self.unreadable,
        )


def choose_shots(source: DataSource, shots: int | None, seed: int) -> list[str]:
    """Return the ids of `shots` images of each class (all where a class has fewer, or `shots` is None).

    Which ones depends on (seed, id) alone. Labels are known once an image is decoded, so this reads the source once. A
    class without images is no error: the context is shared, and its name is all that it needs.

    Raises:
        UserError: no labelled image at all.
    """
    of_class: list[list[tuple[bytes, str]]] = [[] for _ in source.class_names]
    for item in source.samples():
        if isinstance(item, Sample) and item.label != UNKNOWN:
            of_class[item.label].append((_rank(seed, item.id), item.id))
    if not any(of_class):
        raise UserError(
            f"'{source.spec}' has no readable image of a known class: prompts are learnt from a few of each"
        )
    return [name for found in of_class for _, name in sorted(found)[:shots]]


def encode_source(
    vlm: VLM,
    source: DataSource,
    *,
    keep: Callable[[str], bool] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    on_images: Callable[[int], None] | None = None,
) -> Features:
    """Return the features of the readable images that `keep` accepts, in source order.

    Raises:
        UserError: not one image could be read.
    """
    parts: list[Tensor] = []
    labels: list[int] = []
    ids: list[str] = []
    unreadable: list[str] = []
    for batch in _batches(source, keep, limit, batch_size, unreadable):
        pixels = torch.stack([to_pixels(s.image, vlm.framing) for s in batch])
        with torch.no_grad():
            parts.append(vlm.encode_image(pixels.to(vlm.device)).float().cpu())
        labels += [sample.label for sample in batch]
        ids += [sample.id for sample in batch]
        if on_images is not None:
            on_images(len(ids))
    if not parts:
        raise UserError(f"'{source.spec}' has no image that can be read")
    return Features(
        torch.cat(parts), torch.tensor(labels), tuple(ids), tuple(source.group(name) for name in ids), len(unreadable)
    )


def _batches(
    source: DataSource, keep: Callable[[str], bool] | None, limit: int | None, size: int, unreadable: list[str]
) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for item in source.samples(keep=keep, limit=limit):
        if isinstance(item, Sample):
            batch.append(item)
        else:
            unreadable.append(item.id)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogateescape"), digest_size=16).digest()
