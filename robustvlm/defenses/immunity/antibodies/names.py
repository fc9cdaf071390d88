"""When the text of an antibody names a known class: the same name, a plural, a kind of it, what it is a kind of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from robustvlm.data.names import name_key

_ARTICLES = frozenset(("a", "an", "the", "some"))
_PREPOSITIONS = frozenset(
    ("in", "on", "at", "with", "under", "inside", "from", "for", "to", "without", "over", "behind")
)
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
        >>> words_of("The Ice-Creams"), words_of("cherries"), words_of("wolves")
        (('ice', 'cream'), ('cherry',), ('wolf',))
    """
    plain = re.sub(r"[^\w\s]|_", " ", name_key(text.replace("'s", "")))
    return tuple(_singular(word) for word in plain.split() if word not in _ARTICLES)


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


class KnownNames:
    """The names that antibodies must keep clear of.

    An English noun phrase is a kind of what its last words name ("fire engine" is an engine, "engine room" is not);
    what follows a preposition qualifies what stands before, and of "X of Y" both may be seen. So a text that ends in
    a class's name counts as a kind of the class, and one that a class's name ends in as what the class is a kind of.
    This errs on the safe side: it also takes a sea horse for a horse.

    Args:
        class_names: the known classes.
        kin: per class, names that mean the class itself or a kind of it.
        above: names of superclasses.

    Example:
        >>> known = KnownNames(["apple", "police car", "truck"], {"truck": ["lorry"]}, ["vehicle"])
        >>> for text in ("golden apples", "car", "lorries", "vehicle", "apple pie"):
        ...     print(known.clash(text))
        a kind of 'apple'
        'police car' is a kind of it
        another name of 'truck', or a kind of it
        the superclass 'vehicle'
        None
    """

    def __init__(
        self,
        class_names: Sequence[str],
        kin: Mapping[str, Sequence[str]] | None = None,
        above: Iterable[str] = (),
    ) -> None:
        self._classes = {words_of(name): name for name in reversed(class_names)}
        self._tails = {
            words_of(name)[i:]: name for name in reversed(class_names) for i in range(1, len(words_of(name)))
        }
        self._kin = {words_of(other): name for name, others in (kin or {}).items() for other in others}
        self._above = {words_of(name): name for name in above}

    def clash(self, text: str) -> str | None:
        """Return why `text` cannot stand for something that is none of the classes, or None if it can."""
        words = words_of(text)
        if not words:
            return "no word in it"
        same = self.same(text)
        if same is not None:
            return same
        for part in _heads(words):
            for i in range(len(part)):
                if part[i:] in self._classes:
                    return f"a kind of '{self._classes[part[i:]]}'"
        if words in self._tails:
            return f"'{self._tails[words]}' is a kind of it"
        if words in self._kin:
            return f"another name of '{self._kin[words]}', or a kind of it"
        return f"the superclass '{self._above[words]}'" if words in self._above else None

    def same(self, text: str) -> str | None:
        """Return why `text` is but the name of a class, or None: all that is asked of a thing in an odd setting."""
        name = self._classes.get(words_of(text))
        return None if name is None else f"the name of '{name}'"


def _heads(words: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return what a phrase is about: the words before the first preposition, and of these those before "of"."""
    end = next((i for i, word in enumerate(words) if word in _PREPOSITIONS and i > 0), len(words))
    about = words[:end]
    return (about, about[: about.index("of")]) if "of" in about[1:] else (about,)
