"""When the text of an antibody names a known class: the same name, a plural, a kind of it, what it is a kind of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

_ARTICLES = frozenset(("a", "an", "the", "some"))
_PREPOSITIONS = frozenset(
    ("in", "on", "at", "with", "under", "inside", "from", "for", "to", "without", "over", "behind")
)
_UNCHANGED = ("ss", "us", "is")
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
    plain = re.sub(r"[^\w\s]|_", " ", text.replace("'s", "").casefold())
    return tuple(_singular(word) for word in plain.split() if word not in _ARTICLES)


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(_UNCHANGED):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "zes")) or (word.endswith("oes") and len(word) > 5):
        return word[:-2]
    return word[:-1]


def clash(text: str, class_name: str, kin: Sequence[str] = ()) -> str | None:
    """Return why `text` cannot stand for "not a `class_name`", or None when the names do not say so.

    An English noun phrase is a kind of what its last words name ("fire engine" is an engine, "engine room" is not);
    what follows a preposition qualifies what stands before, and of "X of Y" both may be seen. So a text that ends in
    the class's name counts as a kind of the class, and one that the class's name ends in as what it is a kind of.
    This errs on the safe side: it also takes a sea horse for a horse.

    Example:
        >>> clash("golden apples", "apple"), clash("car", "police car")
        ("a kind of 'apple'", "'police car' is a kind of it")
        >>> clash("lorry", "truck", ["lorry", "pickup"])
        "another name of 'truck', or a kind of it"
        >>> clash("apple pie", "apple") is None
        True
    """
    ours, theirs = words_of(text), words_of(class_name)
    if not ours:
        return "no word in it"
    if ours == theirs:
        return f"the name of '{class_name}'"
    if any(_ends_in(part, theirs) for part in _heads(ours)):
        return f"a kind of '{class_name}'"
    if _ends_in(theirs, ours):
        return f"'{class_name}' is a kind of it"
    if any(ours == words_of(name) for name in kin):
        return f"another name of '{class_name}', or a kind of it"
    return None


def find_clash(text: str, class_names: Sequence[str], kin: Mapping[str, Sequence[str]]) -> str | None:
    """Return why `text` names one of the known classes, or None; see `clash`."""
    reasons = (clash(text, name, kin.get(name, ())) for name in class_names)
    return next((reason for reason in reasons if reason is not None), None)


def find_same(text: str, class_names: Sequence[str]) -> str | None:
    """Return why `text` is but the name of a known class, or None: all that is asked of a thing in an odd setting."""
    ours = words_of(text)
    return next((f"the name of '{name}'" for name in class_names if words_of(name) == ours), None)


def _heads(words: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return what a phrase is about: the words before the first preposition, and of these those before "of"."""
    end = next((i for i, word in enumerate(words) if word in _PREPOSITIONS and i > 0), len(words))
    about = words[:end]
    return (about, about[: about.index("of")]) if "of" in about[1:] else (about,)


def _ends_in(words: tuple[str, ...], tail: tuple[str, ...]) -> bool:
    return len(words) >= len(tail) > 0 and words[-len(tail) :] == tail
