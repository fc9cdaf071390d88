"""Random crops of a few images of each class, which KR-NFT learns what is no known thing from."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.commands.detect.encoding import Encoded, Views
from robustvlm.core import seeds
from robustvlm.defenses.zoo.views import CROP_DRAWS, crops
from robustvlm.errors import UserError

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


def random_crops(seed: int, count: int = CROPS) -> Views:
    """Return what makes `count` random crops of an image; which they are depends on (seed, id) alone."""

    def views(pixels: Tensor, name: str) -> Tensor:
        draws = torch.rand(count, CROP_DRAWS, generator=seeds.generator(seed, "crops", name))
        return crops(pixels.expand(count, -1, -1, -1), draws)

    return views


def require_all(found: Encoded, wanted: frozenset[str], spec: str) -> Encoded:
    """Refuse crops of fewer images than were chosen: those could be read before, and what is learnt would be other."""
    if gone := wanted - set(found.ids):
        raise UserError(
            f"{len(gone)} images of '{spec}' could be read before and not again for their crops, first "
            f"'{min(gone)}': see that the data stay as they are, and begin the run anew"
        )
    return found


def by_image(found: Encoded, count: int = CROPS) -> tuple[Tensor, Tensor]:
    """Return crops [N, C, D] and labels [N], of rows that stand image by image."""
    assert found.features is not None
    return found.features.unflatten(0, (-1, count)), found.labels[::count]
