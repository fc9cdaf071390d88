"""The facts of EmojiStyles, the bundled benchmark: styles, splits, label sets, prompts and the class tree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from robustvlm.data.taxonomy import Forest
from robustvlm.data.tree_files import load_forest
from robustvlm.errors import UserError, nearest

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
