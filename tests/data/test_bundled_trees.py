"""The bundled trees fit the class sets they are for."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files

import pytest

from robustvlm.data.classes import (
    CIFAR10,
    KNOWN,
    cifar100_names,
    imagenet_names,
    known_forest,
    recognise,
    usual_names,
    wordnet_names,
)
from robustvlm.text import name_key


@pytest.mark.parametrize("names", [CIFAR10, cifar100_names(), imagenet_names()], ids=[known.name for known in KNOWN])
def test_names_are_recognised_in_any_order_and_spelling(names: tuple[str, ...]) -> None:
    odd = [name.upper().replace(" ", "_") for name in reversed(names)]
    known = recognise(odd)
    assert known is not None
    assert known.size == len(names) == len({name_key(name) for name in names})
    tree = known_forest(known, odd)[0]
    assert list(tree.class_names) == odd
    assert recognise(odd[:-1]) is None
    assert recognise([*odd[:-1], "another"]) is None
    assert 1 < len(tree.level_names(tree.superclass_level)) <= 50


def test_cifar100_has_its_twenty_groups_of_five() -> None:
    tree = known_forest(KNOWN[1], cifar100_names())[0]
    assert [len(group) for group in tree.groups(1).values()] == [5] * 20
    assert tree.superclass_level == 1
    assert tree.siblings("lion") == ("bear", "leopard", "tiger", "wolf")
    assert tree.ancestor("orchid", 2) == tree.ancestor("oak tree", 2)


def test_imagenet_tree_agrees_with_open_clip_and_wordnet() -> None:
    names = imagenet_names()
    assert [wordnet_names()[wnid] for wnid in _synsets()] == list(names)
    tree = known_forest(KNOWN[2], names)[0]
    assert tree.levels == 6
    assert tree.class_names == names
    assert "canine" in tree.ancestors("Siberian Husky")
    assert "feline" in tree.ancestors("lion")
    assert tree.common_level("Siberian Husky", "Alaskan Malamute") < tree.common_level("Siberian Husky", "lion")
    assert tree.common_level("lion", "minivan") == 5
    sizes = Counter(tree.superclasses(tree.superclass_level))
    assert max(sizes.values()) <= 150


def test_lists_of_synonyms_become_the_usual_names() -> None:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    synonyms = [info.index_to_description(i) for i in range(1000)]
    assert usual_names(synonyms) == imagenet_names()
    assert usual_names(synonyms[::-1]) == tuple(synonyms[::-1])
    assert usual_names(CIFAR10) == CIFAR10


def _synsets() -> list[str]:
    return (files("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
