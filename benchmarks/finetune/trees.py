"""A second tree for each set, by where a thing is found; the bundled ones say what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robustvlm.data.trees import Tree

_CIFAR10: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sky": {"sky above": ("airplane", "bird")},
    "land": {
        "road": ("automobile", "truck"),
        "house": ("cat", "dog"),
        "field or forest": ("deer", "horse"),
    },
    "water": {"pond or sea": ("ship", "frog")},
}
_EMOJI: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "wild nature": {
        "forest": ("bear", "owl", "evergreen tree", "deciduous tree", "four leaf clover", "butterfly", "ant"),
        "sea": ("fish", "dolphin", "octopus", "crab", "sailboat", "ship", "speedboat", "desert island"),
        "river or pond": ("duck", "frog", "crocodile", "canoe", "fountain"),
        "desert or mountain": ("lizard", "dragon", "cactus", "mountain"),
    },
    "garden and farm": {
        "farm": ("cow", "chicken", "baby chick", "ear of corn", "egg"),
        "garden": ("honeybee", "lady beetle", "rose", "cherry blossom", "hibiscus", "bouquet", "carrot", "eggplant"),
        "orchard": ("apple", "banana", "grapes", "cherries", "avocado"),
    },
    "house": {
        "living room": ("dog", "cat", "candle", "clock", "book", "musical keyboard", "desktop computer"),
        "bedroom or bathroom": ("bed", "bathtub", "baby bottle", "dress", "high-heeled shoe", "handbag", "glasses"),
        "kitchen": ("bread", "croissant", "cookie", "doughnut", "hot beverage"),
        "party": ("birthday cake", "candy", "crown", "beer", "cocktail glass", "french fries"),
    },
    "town": {
        "street": ("car", "bus", "fire engine", "bicycle", "church", "castle", "factory", "hospital"),
        "station": ("steam locomotive", "train", "tram", "backpack"),
        "air": ("airplane", "helicopter", "rocket"),
        "fair or stadium": ("ferris wheel", "basketball", "baseball", "american football", "bowling"),
    },
    "work": {
        "stage": ("guitar", "drum", "saxophone", "headphone", "camera"),
        "workshop": ("hammer", "key", "bomb", "battery"),
        "office": ("magnifying glass", "envelope", "clipboard", "calendar", "briefcase"),
    },
}


def by_place(name: str, class_names: Sequence[str]) -> Tree:
    """Return the tree of a set, `cifar10` or `emoji`, over some of its classes."""
    groups = {"cifar10": _CIFAR10, "emoji": _EMOJI}[name]
    chain = {
        leaf: (leaf, place, area, "place")
        for area, places in groups.items()
        for place, leaves in places.items()
        for leaf in leaves
    }
    return Tree.from_chains([chain[leaf] for leaf in class_names])
