"""Antibodies as texts: what every source of them gives, and which of them name a known class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from robustvlm.data.names import words_of
from robustvlm.errors import UserError, nearest

# When the text of an antibody names a known class: the same name, a plural, a kind of it, what it is a kind of

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
        self, class_names: Sequence[str], kin: Mapping[str, Sequence[str]] | None = None, above: Iterable[str] = ()
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


# What antibodies are: texts that describe what a known class is not, and the same texts embedded

HARD_NEGATIVE = "hard-negative"
CONTEXT = "context"
NOISE = "noise"
SCENE = "scene"
KINDS = (HARD_NEGATIVE, CONTEXT, NOISE, SCENE)
"""A look-alike that is another thing; the thing where it cannot be; a random direction without a text; the place of the
thing without it."""


@dataclass(frozen=True)
class AntibodyText:
    """One antibody: a noun phrase without an article ("wolf"), the class that it guards ("dog"), and its kind.

    Noise belongs to no class: its `of_class` is empty, its text a label.

    Raises:
        UserError: a kind other than `KINDS`.

    Example:
        >>> AntibodyText("wolf", "dog", "hard-negative").of_class
        'dog'
    """

    text: str
    of_class: str
    kind: str = HARD_NEGATIVE

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"the antibody '{self.text}' is of the unknown kind '{self.kind}': {nearest(self.kind, KINDS)}"
            )


@dataclass(frozen=True)
class Proposal:
    """What a source proposes: texts, and for each class names that mean the class itself or a kind of it.

    `kin` never becomes an antibody; the filters drop every text that matches it.
    """

    texts: tuple[AntibodyText, ...]
    kin: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def without(self, names: Iterable[str]) -> Proposal:
        """Return the proposal without texts that are one of `names`, such as the unknown classes of a benchmark.

        Example:
            >>> Proposal((AntibodyText("wolf", "dog"), AntibodyText("fox", "dog"))).without(["Wolves"]).texts
            (AntibodyText(text='fox', of_class='dog', kind='hard-negative'),)
        """
        apart = {words_of(name) for name in names}
        return Proposal(tuple(text for text in self.texts if words_of(text.text) not in apart), self.kin)


class AntibodySource(ABC):
    """Where antibodies come from: a bank, a file, a language model, WordNet.

    Example:
        >>> class Wolves(AntibodySource):
        ...     def propose(self, class_names):
        ...         return Proposal(tuple(AntibodyText("wolf", name) for name in class_names if name == "dog"))
        >>> Wolves().propose(["cat", "dog"]).texts
        (AntibodyText(text='wolf', of_class='dog', kind='hard-negative'),)
    """

    @abstractmethod
    def propose(self, class_names: Sequence[str]) -> Proposal:
        """Return texts for the classes, unfiltered; a class may be left without any."""


@dataclass(frozen=True)
class Antibodies:
    """Antibodies with their embeddings: unit rows [A, D], one a text.

    Raises:
        UserError: as many texts as rows are needed.
    """

    texts: tuple[AntibodyText, ...]
    embeddings: Tensor

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.texts) != len(self.embeddings):
            shape = list(self.embeddings.shape)
            raise UserError(f"{len(self.texts)} antibodies need embeddings [{len(self.texts)}, D], got {shape}")

    def __len__(self) -> int:
        return len(self.texts)

    def of(self, class_name: str) -> tuple[AntibodyText, ...]:
        """Return the antibodies that guard one class."""
        return tuple(text for text in self.texts if text.of_class == class_name)
