"""EmojiStyles, the bundled benchmark: emoji drawn in eight styles, composed on seeded backgrounds at run time."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from robustvlm.core.seeds import generator
from robustvlm.data.compose import compose
from robustvlm.data.emoji_facts import (
    SPRITES,
    STYLES_OF_SPLIT,
    TEMPLATES,
    check_known,
    emoji_tree,
    label_set,
    styles_of,
)
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable
from robustvlm.errors import UserError

DEFAULT_COPIES = 4  # 139 test sprites of the default label set, four times each: 556 images


@dataclass(frozen=True)
class Sprite:
    """One drawing: its id without the copy number, its label (-1: no class of the label set) and its WebP bytes."""

    id: str
    label: int
    data: bytes


def draw_sprite(data: bytes, sample_id: str) -> Image.Image:
    """Decode a sprite and compose it into a 64x64 RGB picture that depends on the sprite and the id alone."""
    rgba = np.array(Image.open(io.BytesIO(data)).convert("RGBA"))
    sprite = torch.from_numpy(rgba).permute(2, 0, 1)[None].float() / 255
    pixels = compose(sprite, generator("emoji", sample_id))[0]
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


class EmojiSource(DataSource):
    """The bundled benchmark; 64x64 pictures with ids such as `emoji/twemoji/1f436/0` (style, code points, copy).

    Splits: `train` (six styles), `val` (Streamline), `test` (Twemoji: a style never trained on), and the open-set
    splits `near` (held-out emoji of the same superclasses) and `far` (faces, symbols, flags), label -1, drawn in
    the test style unless `styles` says otherwise. Every sprite is composed `copies` times.

    Raises UserError for an unknown split, label set or style, a style outside the split, or copies below 1.

    Example:
        >>> source = EmojiSource()
        >>> len(source.class_names), len(source.ids())
        (101, 556)
        >>> next(iter(source.samples(limit=1))).image.size
        (64, 64)
    """

    def __init__(
        self,
        *,
        split: str = "test",
        labels: str = "default",
        styles: Sequence[str] | None = None,
        copies: int = DEFAULT_COPIES,
    ) -> None:
        check_known("split", split, STYLES_OF_SPLIT)
        if copies < 1:
            raise UserError(f"copies must be at least 1, got {copies}")
        self.split, self.copies = split, copies
        self.styles = styles_of(split, styles)
        classes = label_set(labels)
        super().__init__(
            f"emoji?split={split}&labels={labels}&styles={','.join(self.styles)}&copies={copies}",
            [item.name for item in classes],
            templates=TEMPLATES,
            tree=emoji_tree(labels),
        )
        self._shown: dict[str, None] = {}
        self._sprites = tuple(self._read())

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> EmojiSource:
        """Open the source named by a spec's options, all of them text: split, labels, styles (a,b) and copies."""
        for name in options:
            check_known("emoji option", name, ("split", "labels", "styles", "copies"))
        copies = options.get("copies", str(DEFAULT_COPIES))
        if not copies.isascii() or not copies.isdigit():
            raise UserError(f"copies must be a whole number, got '{copies}': pass for example emoji?copies=4")
        styles = options.get("styles")
        return cls(
            split=options.get("split", "test"),
            labels=options.get("labels", "default"),
            styles=None if styles is None else styles.split(","),
            copies=int(copies),
        )

    def ids(self) -> list[str]:
        """Return the ids, copy by copy."""
        return [f"{sprite.id}/{copy}" for copy in range(self.copies) for sprite in self._sprites]

    def group(self, sample_id: str) -> str:
        """Return the drawing that an image is made of: its copies stand and fall together."""
        return sample_id.rpartition("/")[0]

    def things(self) -> tuple[str, ...]:
        """Return the names of the drawings of the split."""
        return tuple(self._shown)

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for copy in range(self.copies):
            for sprite in self._sprites:
                sample_id = f"{sprite.id}/{copy}"
                if keep(sample_id):
                    yield Sample(sample_id, draw_sprite(sprite.data, sample_id), sprite.label)

    def _read(self) -> Iterator[Sprite]:
        """Read the compressed sprites of the split: at most a few megabytes, decoded one at a time when streamed."""
        wanted = self.split if self.split in ("near", "far") else "id"
        columns = ["image", "name", "style", "hexcode"]
        table = pq.read_table(SPRITES, columns=columns, filters=[("split", "=", wanted), ("style", "in", self.styles)])
        label_of = {name: label for label, name in enumerate(self.class_names)}
        for row in table.to_pylist():
            label = label_of.get(row["name"], UNKNOWN)
            if (label == UNKNOWN) == (wanted != "id"):
                self._shown.setdefault(row["name"])
                yield Sprite(f"emoji/{row['style']}/{row['hexcode'].lower()}", label, row["image"])

    def _identity(self) -> Iterable[str]:
        for sprite in self._sprites:
            yield f"{sprite.id} {sprite.label} {hashlib.blake2b(sprite.data, digest_size=16).hexdigest()}"
        yield f"copies {self.copies}"
