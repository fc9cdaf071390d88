"""When two names say the same thing: case, accents as they are stored, hyphens, articles and plurals do not count."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

_ARTICLES = frozenset(("a", "an", "the", "some"))
_UNCHANGED = ("ss", "us", "is")
_BUSES = re.compile("[^aeiou]uses$")  # octopuses and buses, not houses
_IRREGULAR = {
    "mice": "mouse",
    "geese": "goose",
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
    "people": "person",
    "glasses": "glasses",  # to be told from a glass; of other pairs (scissors, jeans) there is no one half
    "wolves": "wolf",
    "leaves": "leaf",
    "knives": "knife",
    "loaves": "loaf",
    "calves": "calf",
    "halves": "half",
    "shelves": "shelf",
    "scarves": "scarf",
    "hooves": "hoof",
}


@lru_cache(maxsize=65536)
def words_of(text: str) -> tuple[str, ...]:
    """Return the words that two spellings of one noun phrase share: case, hyphens, articles and plurals do not count.

    Plurals by rule (a handful of irregular ones by list): good enough to compare two names with each other, where a
    wrong singular does no harm as long as it is the same for both.

    Example:
        >>> words_of("The Ice-Creams"), words_of("cherries"), words_of("wolves"), words_of("vitamin A")
        (('ice', 'cream'), ('cherry',), ('wolf',), ('vitamin', 'a'))
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).replace("'s", "").casefold())
    words = re.sub(r"[^\w\s]|_", " ", folded).split()
    # An "a" at the end is no article: it tells "vitamin A" from "vitamin".
    last = words[-1:] == ["a"]
    return tuple(_singular(word) for word in words if word not in _ARTICLES) + ("a",) * last


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(_UNCHANGED):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if (
        word.endswith(("ches", "shes", "xes", "sses", "zes"))
        or (word.endswith("oes") and len(word) > 5)
        or _BUSES.search(word)
    ):
        return word[:-2]
    return word[:-1]


def readings(name: str, *, loosely: bool = True) -> frozenset[tuple[str, ...]]:
    """Return what a name stands for: itself, each part of a list, and loosely the same without brackets.

    A number is no name: two data sets may number their classes alike and mean different things by it.

    Example:
        >>> sorted(readings("Timber wolves, grey wolf"))
        [('grey', 'wolf'), ('timber', 'wolf'), ('timber', 'wolf', 'grey', 'wolf')]
        >>> sorted(readings("crane (bird)")), sorted(readings("crane (bird)", loosely=False)), sorted(readings("7"))
        ([('crane',), ('crane', 'bird')], [('crane', 'bird')], [])
    """
    parts = [name, *name.split(",")]
    if loosely:
        parts += [re.sub(r"\([^)]*\)", " ", part) for part in parts]
    found = frozenset(words for part in parts if (words := words_of(part)))
    return frozenset(words for words in found if not all(word.isdecimal() for word in words))


def same_things(texts: Iterable[str], names: Iterable[str], *, loosely: bool = True) -> dict[str, str]:
    """Return, for each text that says the same as one of the names, that name; `loosely` as for `readings`.

    Example:
        >>> same_things(["Wolves", "dog"], ["fox", "wolf, lobo"])
        {'Wolves': 'wolf, lobo'}
    """
    meant: dict[tuple[str, ...], str] = {}
    for name in names:
        for words in readings(name, loosely=loosely):
            meant.setdefault(words, name)
    found: dict[str, str] = {}
    for text in texts:
        hits = [meant[words] for words in readings(text, loosely=loosely) if words in meant]
        if hits:
            found[text] = min(hits)
    return found
