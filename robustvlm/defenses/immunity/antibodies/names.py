"""When the text of an antibody names a known class: the same name, a plural, a kind of it, what it is a kind of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from robustvlm.data.nouns import words_of

_PREPOSITIONS = frozenset(
    ("in", "on", "at", "with", "under", "inside", "from", "for", "to", "without", "over", "behind")
)


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
