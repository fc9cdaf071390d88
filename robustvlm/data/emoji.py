"""EmojiStyles, the bundled benchmark: emoji drawn in eight styles, composed on seeded backgrounds at run time."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable
from robustvlm.data.trees import Forest, load_forest
from robustvlm.errors import UserError, nearest

# The facts of EmojiStyles, the bundled benchmark: styles, splits, label sets, prompts and the class tree

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SPRITES = ASSETS / "emoji" / "sprites.parquet"
TREE = ASSETS / "trees" / "emoji.json"
TEST_STYLE = "twemoji"
VALIDATION_STYLE = "streamline-emojis"
TRAIN_STYLES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "emojione")
STYLES = (*TRAIN_STYLES, VALIDATION_STYLE, TEST_STYLE)
TEMPLATES = ("{}", "a {}", "a picture of a {}", "an icon of a {}", "an emoji of a {}", "a photo of a {}.")
LABEL_SETS = ("default", "all")

STYLES_OF_SPLIT = {
    "train": TRAIN_STYLES,
    "val": (VALIDATION_STYLE,),
    "test": (TEST_STYLE,),
    "near": STYLES,
    "far": STYLES,
}


@dataclass(frozen=True)
class EmojiClass:
    """One class of the benchmark, its place in the tree, and whether the default label set has it."""

    name: str
    superclass: str
    domain: str
    default: bool


@lru_cache(maxsize=1)
def emoji_classes() -> tuple[EmojiClass, ...]:
    """Return the 173 classes in label order.

    Example:
        >>> classes = emoji_classes()
        >>> len(classes), sum(item.default for item in classes), classes[0].superclass
        (173, 101, 'mammal')
    """
    rows = json.loads((ASSETS / "emoji" / "classes.json").read_text(encoding="utf-8"))["classes"]
    return tuple(EmojiClass(**row) for row in rows)


def label_set(labels: str) -> tuple[EmojiClass, ...]:
    """Return the classes of a label set: `default` (at most four of each superclass) or `all`."""
    check_known("label set", labels, LABEL_SETS)
    return tuple(item for item in emoji_classes() if item.default or labels == "all")


def emoji_tree(labels: str = "all") -> Forest:
    """Return the tree class -> superclass -> domain -> root over the classes of a label set.

    Example:
        >>> emoji_tree()[0].ancestor("dog", 1)
        'mammal'
    """
    names = [item.name for item in label_set(labels)]
    return load_forest(TREE, names, subset=labels != "all")


def styles_of(split: str, styles: Sequence[str] | None) -> tuple[str, ...]:
    """Return the styles to read, in the order of STYLES, so that their order in the spec does not matter.

    Raises UserError for an unknown style or one that the split does not have.
    """
    allowed = STYLES_OF_SPLIT[split]
    if styles is None:
        return (TEST_STYLE,) if split in ("near", "far") else allowed
    for style in styles:
        check_known("style", style, STYLES)
        if style not in allowed:
            raise UserError(f"the split '{split}' has no style '{style}': its styles are {', '.join(allowed)}")
    return tuple(style for style in allowed if style in styles)


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known, naming the nearest ones."""
    if name not in tuple(known):
        raise UserError(f"unknown {what} '{name}': {nearest(name, known)}")


# Put sprites on seeded backgrounds: pure tensor functions shared by the bundled data set and its training

BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.05, 0.05, 0.05),
    "gray": (0.55, 0.55, 0.55),
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.60, 0.15),
    "yellow": (0.97, 0.90, 0.30),
    "green": (0.25, 0.70, 0.30),
    "blue": (0.20, 0.40, 0.90),
    "light blue": (0.60, 0.80, 1.00),
    "purple": (0.55, 0.25, 0.75),
    "pink": (1.00, 0.65, 0.80),
    "brown": (0.50, 0.32, 0.18),
}
_PLAIN = 0.3  # share of backgrounds of one colour; the others are gradients
_TEXTURED = 0.35  # share with a low-frequency texture on top


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return [n] draws from the uniform distribution on [low, high)."""
    return torch.rand(n, generator=generator) * (high - low) + low


def chance(n: int, probability: float, generator: torch.Generator) -> Tensor:
    """Return [n, 1, 1, 1] zeros and ones, one with the given probability."""
    return (torch.rand(n, 1, 1, 1, generator=generator) < probability).float()


def background(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return plain, gradient or textured backgrounds [n, 3, size, size] in [0, 1] and the index of each main colour.

    Example:
        >>> pixels, colour = background(2, 8, torch.Generator().manual_seed(0))
        >>> tuple(pixels.shape), tuple(colour.shape)
        ((2, 3, 8, 8), (2,))
    """
    palette = torch.tensor(list(BACKGROUNDS.values()))
    colour = torch.randint(len(palette), (n,), generator=generator)
    first = (palette[colour] + 0.08 * torch.randn(n, 3, generator=generator)).clamp(0, 1)
    plain = torch.rand(n, 1, generator=generator) < _PLAIN
    second = torch.where(plain, first, (first + 0.22 * torch.randn(n, 3, generator=generator)).clamp(0, 1))
    weight = _ramp(uniform(n, 0, 2 * math.pi, generator), size)
    pixels = torch.lerp(first[:, :, None, None], second[:, :, None, None], weight)
    noise = torch.randn(n, 3, 8, 8, generator=generator) * 0.06 * chance(n, _TEXTURED, generator)
    texture = F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False)
    return (pixels + texture).clamp(0, 1), colour


def _ramp(angle: Tensor, size: int) -> Tensor:
    """Return [N, 1, size, size] weights that rise from 0 to 1 along each angle (radians)."""
    axis = torch.linspace(-1, 1, size)
    along = axis[None, None, :] * angle.cos()[:, None, None] + axis[None, :, None] * angle.sin()[:, None, None]
    return (along * 0.5 + 0.5).clamp(0, 1)[:, None]


def placement_grid(
    n: int, size: int, *, scale: Tensor, angle: Tensor, shift: Tensor, shear: Tensor, aspect: Tensor, flip: Tensor
) -> Tensor:
    """Return the sampling grid [n, size, size, 2] that draws each sprite scaled, turned (radians), sheared and moved.

    `scale`, `angle`, `shear`, `aspect` and `flip` (1, or -1 to mirror) have shape [n], `shift` [n, 2] is in units of
    half the image.
    """
    cosine, sine = angle.cos(), angle.sin()
    across = torch.stack([cosine, sine + shear], -1) * (flip / (scale * aspect))[:, None]
    down = torch.stack([-sine, cosine], -1) * (aspect / scale)[:, None]
    inverse = torch.stack([across, down], 1)
    offset = -(inverse @ shift[:, :, None])
    return F.affine_grid(torch.cat([inverse, offset], 2), [n, 4, size, size], align_corners=False)


def draw(sprites: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Sample sprites [N, 4, H, W] (straight alpha, [0, 1]); return premultiplied colour and alpha [N, 3|1, S, S]."""
    colour, alpha = sprites[:, :3], sprites[:, 3:]
    drawn = F.grid_sample(torch.cat([colour * alpha, alpha], 1), grid, align_corners=False)
    return drawn[:, :3], drawn[:, 3:].clamp(0, 1)


def compose(sprites: Tensor, generator: torch.Generator) -> Tensor:
    """Return sprites [N, 4, S, S] on backgrounds with a mild change of size, angle and place: [N, 3, S, S] in [0, 1].

    Example:
        >>> sprite = torch.ones(1, 4, 16, 16)
        >>> tuple(compose(sprite, torch.Generator().manual_seed(0)).shape)
        (1, 3, 16, 16)
    """
    return compose_on(sprites, generator)[0]


def compose_on(sprites: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return what `compose` does, and the place of each background's main colour in `BACKGROUNDS`: int64 [N]."""
    n, _, _, size = sprites.shape
    scale = uniform(n, 0.75, 1.0, generator)
    angle = uniform(n, -10, 10, generator) * (math.pi / 180)
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - scale)[:, None]
    one = torch.ones(n)
    grid = placement_grid(n, size, scale=scale, angle=angle, shift=shift, shear=torch.zeros(n), aspect=one, flip=one)
    colour, alpha = draw(sprites, grid)
    backdrop, index = background(n, size, generator)
    return (colour + backdrop * (1 - alpha)).clamp(0, 1), index


# EmojiStyles, the bundled benchmark: emoji drawn in eight styles, composed on seeded backgrounds at run time

DEFAULT_COPIES = 4  # 139 test sprites of the default label set, four times each: 556 images


@dataclass(frozen=True)
class Sprite:
    """One drawing: its id without the copy number, its label (-1: no class of the label set) and its WebP bytes."""

    id: str
    label: int
    data: bytes


def draw_sprite(data: bytes, image_id: str) -> Image.Image:
    """Decode a sprite and compose it into a 64x64 RGB picture that depends on the sprite and the id alone."""
    rgba = np.array(Image.open(io.BytesIO(data)).convert("RGBA"))
    sprite = torch.from_numpy(rgba).permute(2, 0, 1)[None].float() / 255
    pixels = compose(sprite, generator("emoji", image_id))[0]
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def drawing_of(image_id: str) -> str:
    """Return the id of the drawing that an image is a copy of.

    Example:
        >>> drawing_of("emoji/noto/1f600/3")
        'emoji/noto/1f600'
    """
    return image_id.rpartition("/")[0]


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

    def group(self, image_id: str) -> str:
        """Return the drawing that an image is made of: its copies stand and fall together."""
        return drawing_of(image_id)

    def things(self) -> tuple[str, ...]:
        """Return the names of the drawings of the split."""
        return tuple(self._shown)

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for copy in range(self.copies):
            for sprite in self._sprites:
                image_id = f"{sprite.id}/{copy}"
                if keep(image_id):
                    style = sprite.id.split("/")[1]
                    yield Sample(image_id, draw_sprite(sprite.data, image_id), sprite.label, subgroup=style)

    def _read(self) -> Iterator[Sprite]:
        """Read the compressed sprites of the split: at most a few megabytes, decoded one at a time when streamed."""
        wanted = self.split if self.split in ("near", "far") else "id"
        # `read_table` and computing with tables would load pandas.
        with pq.ParquetFile(SPRITES) as file:
            rows = file.read(["image", "name", "style", "hexcode", "split"]).to_pylist()
        label_of = {name: label for label, name in enumerate(self.class_names)}
        for row in rows:
            if row["split"] != wanted or row["style"] not in self.styles:
                continue
            label = label_of.get(row["name"], UNKNOWN)
            if (label == UNKNOWN) == (wanted != "id"):
                self._shown.setdefault(row["name"])
                yield Sprite(f"emoji/{row['style']}/{row['hexcode'].lower()}", label, row["image"])

    def _identity(self) -> Iterable[str]:
        for sprite in self._sprites:
            yield f"{sprite.id} {sprite.label} {hashlib.blake2b(sprite.data, digest_size=16).hexdigest()}"
        yield f"copies {self.copies}"
