"""Class sets with a name: their classes, prompt templates and tree."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from robustvlm.data.names import check_names, read_lines
from robustvlm.data.trees import Forest, load_forest
from robustvlm.errors import UserError
from robustvlm.text import name_key

# Prompt templates: the built-in ensembles and template files

DEFAULT: tuple[str, ...] = ("a photo of a {}.",)
"""What a source without known classes is asked with."""

CIFAR: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a small photo of a {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a low contrast photo of a {}.",
    "a bad photo of a {}.",
    "a close-up photo of a {}.",
)
"""For thumbnails: wordings that fit images of 32 pixels."""

IMAGENET: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a blurry photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
    "a {} in its surroundings.",
    "many {} together.",
)
"""For photographs of single objects in varied light, size and style."""


def fill(template: str, name: str) -> str:
    """Return the prompt for one class name.

    Example:
        >>> fill("a photo of a {}.", "cat")
        'a photo of a cat.'
    """
    return template.replace("{}", name)


def read_templates(path: Path) -> tuple[str, ...]:
    """Return the templates in a text file (one a line; blank lines and # comments skipped) or JSON list.

    Raises:
        UserError: no file, no template, or one that does not hold `{}` once.
    """
    found = read_lines(path, "templates")
    if isinstance(found, dict):
        raise UserError(f"the templates file {path} must hold a list, got a JSON object")
    return check_templates(found, f"the templates file {path}")


def check_templates(templates: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the templates without repeats, each holding `{}` once and no other brace."""
    for template in templates:
        rest = template.replace("{}", "", 1)
        if rest == template:
            raise UserError(f"{where}: the template '{template}' lacks {{}}, the place of the class name")
        if "{" in rest or "}" in rest:
            raise UserError(f"{where}: the template '{template}' must hold {{}} once and no other brace")
    if not templates:
        raise UserError(f"{where} holds no template: write one a line, such as: a photo of a {{}}.")
    return tuple(dict.fromkeys(templates))


# Class sets with a name: their classes, and the templates and tree that come with them

CIFAR10: tuple[str, ...] = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

# open_clip's list gives two names to two classes each; these two get the name WordNet gives them first.
_IMAGENET_RENAMED = {744: "projectile", 836: "sunglass"}


@dataclass(frozen=True)
class KnownSet:
    """A named class set: how many classes, its bundled tree and its templates."""

    name: str
    size: int
    templates: tuple[str, ...]

    @property
    def tree_path(self) -> Path:
        """The bundled tree, whose leaves are the classes."""
        return Path(str(files("robustvlm") / "assets" / "trees" / f"{self.name}.json"))


KNOWN: tuple[KnownSet, ...] = (
    KnownSet("cifar10", 10, CIFAR),
    KnownSet("cifar100", 100, CIFAR),
    KnownSet("imagenet1k", 1000, IMAGENET),
)


def recognise(class_names: Sequence[str]) -> KnownSet | None:
    """Return the known set these classes are, whatever their order, case and separators; None if they are none.

    Example:
        >>> recognise(CIFAR10).name
        'cifar10'
    """
    keys = {name_key(name) for name in class_names}
    for known in KNOWN:
        if len(keys) == len(class_names) == known.size and keys == _leaf_keys(known.name):
            return known
    return None


def known_forest(known: KnownSet, class_names: Sequence[str]) -> Forest:
    """Return the bundled tree of a known set over its classes, in their order and spelling."""
    return load_forest(known.tree_path, class_names)


def cifar100_names() -> tuple[str, ...]:
    """Return the CIFAR-100 classes in label order, which is alphabetical."""
    return tuple(sorted(leaf["name"] for leaf in _leaves("cifar100")))


def imagenet_names() -> tuple[str, ...]:
    """Return the ImageNet-1k classes in label order: open_clip's names, made distinct."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(_IMAGENET_RENAMED.get(i, name) for i, name in enumerate(IMAGENET_CLASSNAMES))


def usual_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return ImageNet's usual names in place of the lists of synonyms that many copies of it carry.

    Those are known by their order: 1000 names, of which at least half begin with the usual name of their label. Names
    that two classes share, as in OpenAI's list, become distinct thereby.

    Example:
        >>> usual_names(["tench, Tinca tinca", "goldfish, Carassius auratus"])
        ('tench, Tinca tinca', 'goldfish, Carassius auratus')
    """
    names = tuple(class_names)
    if len(names) != KNOWN[-1].size or recognise(names) is not None:
        return names
    return _usual_order() if _in_usual_order(names) else names


def made_distinct(class_names: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Return ImageNet's class names without names given twice, and what was changed, if anything was.

    Published lists call two classes alike ("missile" and "sunglasses" in OpenAI's, "Cardigan" and "cardigan" in
    torchvision's). Of a list that begins with the usual name in at least half of its 1000 places, names that mean
    several classes are replaced by the usual names of those places; any other list is returned as it is.

    Example:
        >>> made_distinct(["cat", "dog", "cat"])
        (('cat', 'dog', 'cat'), None)
    """
    names = tuple(class_names)
    if len(names) != KNOWN[-1].size:
        return names, None
    usual, counts = _usual_order(), Counter(map(name_key, names))
    twice = [label for label, name in enumerate(names) if counts[name_key(name)] > 1]
    if not twice or not _in_usual_order(names):
        return names, None
    mended = tuple(usual[label] if label in set(twice) else name for label, name in enumerate(names))
    return mended, f"names that two ImageNet classes share were made distinct: {what_changed(names, mended)}"


def what_changed(before: Sequence[str], after: Sequence[str]) -> str:
    """Return on one line which names are others than before.

    Example:
        >>> what_changed(["cat", "missile"], ["cat", "projectile"])
        "1 'missile' -> 'projectile'"
    """
    pairs = enumerate(zip(before, after, strict=True))
    said = [f"{label} '{a}' -> '{b}'" for label, (a, b) in pairs if name_key(a) != name_key(b)]
    return ", ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "")


def read_class_names(path: Path) -> tuple[tuple[str, ...] | Mapping[str, str], str | None]:
    """Return class names in label order from a text file (one a line) or JSON list; a JSON object renames classes.

    Doubled names of ImageNet's lists are made distinct; the second value says so.

    Raises:
        UserError: no file, not text, no name, a name twice.
    """
    found, note = read_lines(path, "class names"), None
    if isinstance(found, list):
        names, note = made_distinct(found)
        check_names(names, f"the class names file {path}")
        return names, note
    check_names(list(found.values()), f"the class names file {path}")
    return found, None


def _usual_order() -> tuple[str, ...]:
    return tuple(name for _, name in sorted(wordnet_names().items()))


def _in_usual_order(names: Sequence[str]) -> bool:
    pairs = zip(names, _usual_order(), strict=True)
    return sum(name_key(a.partition(",")[0]) == name_key(b) for a, b in pairs) >= len(names) // 2


@cache
def wordnet_names() -> dict[str, str]:
    """Return the class name of each of ImageNet's WordNet ids, the folder names of its usual layout.

    Example:
        >>> wordnet_names()["n01440764"]
        'tench'
    """
    return {leaf["wnid"]: leaf["name"] for leaf in _leaves("imagenet1k")}


@cache
def _leaf_keys(name: str) -> frozenset[str]:
    return frozenset(name_key(leaf["name"]) for leaf in _leaves(name))


@cache
def _leaves(name: str) -> tuple[dict[str, str], ...]:
    """Return the leaves of a bundled tree."""
    path = next(known.tree_path for known in KNOWN if known.name == name)
    stack, leaves = [json.loads(path.read_text(encoding="utf-8"))], []
    while stack:
        node = stack.pop()
        stack.extend(node.get("children", ()))
        if "children" not in node:
            leaves.append(node)
    return tuple(leaves)
