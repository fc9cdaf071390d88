"""What antibodies are: texts that describe what a known class is not, and the same texts embedded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from robustvlm.data.nouns import words_of
from robustvlm.errors import UserError, nearest

HARD_NEGATIVE = "hard-negative"
CONTEXT = "context"
NOISE = "noise"
KINDS = (HARD_NEGATIVE, CONTEXT, NOISE)
"""A look-alike that is another thing; the thing where it cannot be; a random direction without a text."""


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
