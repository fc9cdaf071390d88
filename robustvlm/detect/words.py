"""Words that name things outside the known classes: from a file, or from the bundled class trees."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from robustvlm.data.names import name_key, read_lines
from robustvlm.data.taxonomy import Forest
from robustvlm.errors import UserError

_TREES = ("cifar10", "cifar100", "emoji", "imagenet1k")

# A word nearer to a known class than this share of the classes are to their nearest other class may mean that class.
RISK_QUANTILE = 0.9


@cache
def tree_words() -> tuple[str, ...]:
    """Return every name in the bundled class trees, leaves and groups, each once, in a fixed order.

    Example:
        >>> len(tree_words()) > 1000, "mammal" in tree_words()
        (True, True)
    """
    found: dict[str, str] = {}
    for tree in _TREES:
        stack = [json.loads((files("robustvlm") / "assets" / "trees" / f"{tree}.json").read_text(encoding="utf-8"))]
        while stack:
            node = stack.pop()
            found.setdefault(name_key(node["name"]), node["name"])
            stack.extend(reversed(node.get("children", ())))
    return tuple(found.values())


def read_words(path: Path) -> tuple[str, ...]:
    """Return the words of a file, one a line or a JSON list.

    Raises UserError when it cannot be read or holds no word.
    """
    found = read_lines(path, "words")
    words = tuple(found.values()) if isinstance(found, dict) else tuple(found)
    words = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not words:
        raise UserError(f"the words file {path} holds no word: write one a line")
    return words


def outside(words: Iterable[str], class_names: Sequence[str], forest: Forest | None = None) -> tuple[str, ...]:
    """Return the words that are neither a class nor, in any tree, a group that holds one.

    Example:
        >>> outside(["wolf", "Dog", "animal"], ["dog"])
        ('wolf', 'animal')
    """
    taken = {name_key(name) for name in class_names}
    for tree in forest or ():
        taken |= {name_key(node) for path in tree.paths for node in path}
    return tuple(word for word in words if name_key(word) not in taken)


def safe_rows(words: Tensor, class_embeddings: Tensor) -> Tensor:
    """Return the rows [M] (int64) of the words that are not so near to a class that they may mean it.

    A word is left out when its largest cosine to a class passes the 90% quantile of the classes' cosines to their
    nearest other class: a beagle to a dog, as a rule (our reading of Immuno-VLM's upper bound, arXiv 2605.30745).

    Args:
        words: unit text embeddings [W, D]; class_embeddings: those of the known classes [K, D].

    Example:
        >>> classes = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), dim=1)
        >>> safe_rows(torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]]), classes)
        tensor([1])
    """
    between = class_embeddings @ class_embeddings.T
    nearest = between.fill_diagonal_(float("-inf")).amax(dim=1)
    risk = torch.quantile(nearest.double(), RISK_QUANTILE)
    return ((words @ class_embeddings.T).amax(dim=1) <= risk).nonzero().flatten()
