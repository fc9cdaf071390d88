"""Random crops of a few images of each class, which KR-NFT learns what is no known thing from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustvlm.commands.detect.encoding import Answers, Encoded
from robustvlm.core import framing, seeds
from robustvlm.data.source import DataSource, Sample
from robustvlm.defenses.zoo.views import CROP_DRAWS, crops

SHOTS, CROPS = 4, 32
"""Images of each class that are cropped, and crops of each: the authors' few shots, and a quarter of their crops."""


def few_of_each(found: Encoded, shots: int = SHOTS, *, seed: int) -> frozenset[str]:
    """Return the ids of `shots` images of each class, chosen by seed and id; of all where a class has fewer.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1])
        >>> sorted(few_of_each(Encoded(["a", "b", "c", "d"], labels, None, None), 2, seed=0))
        ['a', 'b', 'd']
    """
    of_class: dict[int, list[tuple[int, str]]] = {}
    for name, label in zip(found.ids, found.labels.tolist(), strict=True):
        of_class.setdefault(label, []).append((seeds.derive_seed(seed, "shot", name), name))
    return frozenset(name for label in of_class for _, name in sorted(of_class[label])[:shots])


def encode_crops(
    answers: Answers,
    source: DataSource,
    wanted: frozenset[str],
    *,
    seed: int,
    count: int = CROPS,
    on_images: Callable[[int], None] | None = None,
) -> Encoded:
    """Return the features of `count` random crops of each wanted image, those of an image one after the other.

    Which crops they are depends on (seed, id) alone; an id stands as often as it has crops.
    """
    parts: list[Encoded] = []
    batch: list[tuple[Sample, Tensor]] = []
    for item in source.samples(keep=wanted.__contains__):
        if not isinstance(item, Sample) or item.id not in wanted:
            continue
        pixels = framing.to_pixels(item.image, answers.classifier.framing)
        draws = torch.rand(count, CROP_DRAWS, generator=seeds.generator(seed, "crops", item.id))
        batch.append((item, crops(pixels.expand(count, -1, -1, -1), draws)))
        if len(batch) * count >= answers.batch(pixels.shape):
            parts.append(_asked(answers, batch, seed))
            batch = []
        if on_images is not None:
            on_images(1)
    if batch:
        parts.append(_asked(answers, batch, seed))
    found = [part.features for part in parts if part.features is not None]
    ids, labels = [name for part in parts for name in part.ids], [part.labels for part in parts]
    return Encoded(
        ids, torch.cat(labels) if labels else torch.zeros(0).long(), torch.cat(found) if found else None, None
    )


def _asked(answers: Answers, batch: list[tuple[Sample, Tensor]], seed: int) -> Encoded:
    with seeds.own_draws(answers.classifier.device, seeds.derive_seed(seed, "encode crops", batch[0][0].id)):
        features, _ = answers(torch.cat([pixels for _, pixels in batch]))
    each = [len(pixels) for _, pixels in batch]
    ids = [sample.id for (sample, _), count in zip(batch, each, strict=True) for _ in range(count)]
    labels = torch.tensor([sample.label for sample, _ in batch]).repeat_interleave(torch.tensor(each))
    return Encoded(ids, labels, features, None)


def by_image(found: Encoded, count: int = CROPS) -> tuple[Tensor, Tensor]:
    """Return crops [N, C, D] and labels [N] of what `encode_crops` returned."""
    assert found.features is not None
    return found.features.unflatten(0, (-1, count)), found.labels[::count]
