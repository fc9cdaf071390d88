"""The training and validation sprites as tensors, and batches that depend only on (seed, step)."""

from __future__ import annotations

import io
import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from robustvlm.core.seeds import derive_seed, generator
from robustvlm.data.emoji import BACKGROUNDS, SPRITES, TRAIN_STYLES, emoji_classes
from tools.tiny.augment import augment
from tools.tiny.captions import caption, node_caption


@dataclass(frozen=True)
class Taxonomy:
    """Class, superclass and domain names; for each class the indices above it and whether the default set has it."""

    names: tuple[str, ...]
    superclasses: tuple[str, ...]
    domains: tuple[str, ...]
    superclass_of: Tensor
    domain_of: Tensor
    default: Tensor

    @classmethod
    def load(cls) -> Taxonomy:
        rows = emoji_classes()
        superclasses = tuple(dict.fromkeys(row.superclass for row in rows))
        domains = tuple(dict.fromkeys(row.domain for row in rows))
        return cls(
            names=tuple(row.name for row in rows),
            superclasses=superclasses,
            domains=domains,
            superclass_of=torch.tensor([superclasses.index(row.superclass) for row in rows]),
            domain_of=torch.tensor([domains.index(row.domain) for row in rows]),
            default=torch.tensor([row.default for row in rows]),
        )


@dataclass(frozen=True)
class Sprites:
    """Sprites [N, 4, 64, 64] uint8 of the known classes with label, style and tags of each."""

    pixels: Tensor
    labels: Tensor
    styles: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]

    @classmethod
    def load(cls, taxonomy: Taxonomy, *, styles: tuple[str, ...] = TRAIN_STYLES) -> Sprites:
        """Decode the sprites of the known classes in the given styles."""
        columns = ["image", "name", "style", "tags"]
        table = pq.read_table(SPRITES, columns=columns, filters=[("split", "=", "id"), ("style", "in", styles)])
        chosen = table.to_pylist()
        decoded = [np.array(Image.open(io.BytesIO(row["image"])).convert("RGBA")) for row in chosen]
        return cls(
            pixels=torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous(),
            labels=torch.tensor([taxonomy.names.index(row["name"]) for row in chosen]),
            styles=tuple(row["style"] for row in chosen),
            tags=tuple(tuple(row["tags"]) for row in chosen),
        )

    def as_float(self, rows: list[int]) -> Tensor:
        """Return the chosen sprites as float32 in [0, 1]."""
        return self.pixels[rows].float().div(255)


@dataclass(frozen=True)
class Batch:
    """One picture and one caption of every class, and a prompt for every superclass and domain."""

    pixels: Tensor
    captions: list[str]
    nodes: list[str]
    labels: Tensor


class Batches:
    """Batches without false negatives: each class once, in a random style."""

    def __init__(self, sprites: Sprites, taxonomy: Taxonomy, *, seed: int) -> None:
        self.sprites, self.taxonomy, self.seed = sprites, taxonomy, seed
        self.rows: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row, (label, style) in enumerate(zip(sprites.labels.tolist(), sprites.styles, strict=True)):
            self.rows[label][style].append(row)

    def at(self, step: int) -> Batch:
        """Return the batch of a step: the same whether training ran through or was resumed."""
        rng = random.Random(derive_seed("tiny", self.seed, step))
        chosen = [self._choose(label, rng) for label in range(len(self.taxonomy.names))]
        pixels, colours = augment(self.sprites.as_float(chosen), generator("tiny", self.seed, step))
        nodes = [*self.taxonomy.superclasses, *self.taxonomy.domains]
        return Batch(
            pixels=pixels,
            captions=[self._caption(row, colour, rng) for row, colour in zip(chosen, colours.tolist(), strict=True)],
            nodes=[node_caption(name, rng) for name in nodes],
            labels=self.sprites.labels[chosen],
        )

    def _choose(self, label: int, rng: random.Random) -> int:
        by_style = self.rows[label]
        return rng.choice(by_style[rng.choice(list(by_style))])

    def _caption(self, row: int, colour: int, rng: random.Random) -> str:
        label, taxonomy = int(self.sprites.labels[row]), self.taxonomy
        return caption(
            name=taxonomy.names[label],
            superclass=taxonomy.superclasses[taxonomy.superclass_of[label]],
            domain=taxonomy.domains[taxonomy.domain_of[label]],
            background=list(BACKGROUNDS)[colour],
            style=self.sprites.styles[row],
            tags=self.sprites.tags[row],
            rng=rng,
        )
