"""WordNet's nouns, through nltk: the meaning of a class name, what it is a kind of, and what stands beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol

from robustvlm.data.classes import recognise, wordnet_names
from robustvlm.data.names import name_key
from robustvlm.errors import MissingExtra, UserError


class Synset(Protocol):
    """What is used of nltk's synsets: a sense with its words, the senses above and below it."""

    def name(self) -> str: ...
    def lemma_names(self) -> list[str]: ...
    def lemmas(self) -> list[Any]: ...
    def hypernyms(self) -> list[Synset]: ...
    def instance_hypernyms(self) -> list[Synset]: ...
    def hyponyms(self) -> list[Synset]: ...


class Nouns(Protocol):
    """What is used of nltk's WordNet reader."""

    def synsets(self, lemma: str, pos: str) -> Sequence[Any]: ...
    def synset_from_pos_and_offset(self, pos: str, offset: int) -> Any: ...


def open_wordnet() -> Nouns:
    """Return nltk's WordNet reader.

    Raises:
        MissingExtra: nltk is not installed.
        UserError: its WordNet corpus is not there.
    """
    try:
        wordnet: Any = import_module("nltk.corpus").wordnet
    except ImportError:
        raise MissingExtra("nltk", extra="wordnet") from None
    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError):  # not there, or a part of it
        raise UserError("nltk is there, but not its WordNet: run `python -m nltk.downloader wordnet`") from None
    nouns: Nouns = wordnet
    return nouns


def find_senses(nouns: Nouns, class_names: Sequence[str]) -> list[Synset | None]:
    """Return the sense of each class name, None for names that WordNet does not have.

    ImageNet's classes have theirs by definition. Of any other name it is the most frequent noun sense; of a name of
    several words that WordNet lacks, that of the words it ends in ("delivery truck": truck).
    """
    known = recognise(class_names)
    if known is not None and known.name == "imagenet1k":
        offset_of = {name_key(name): int(wnid[1:]) for wnid, name in wordnet_names().items()}
        return [nouns.synset_from_pos_and_offset("n", offset_of[name_key(name)]) for name in class_names]
    return [_sense(nouns, name) for name in class_names]


def _sense(nouns: Nouns, name: str) -> Synset | None:
    words = name_key(name).split()
    for start in range(len(words)):
        for joint in ("_", "-", ""):
            found = nouns.synsets(joint.join(words[start:]), pos="n")
            if found:
                sense: Synset = found[0]
                return sense
    return None


def words_of_sense(sense: Synset) -> tuple[str, ...]:
    """Return the words of a sense as they are written in a sentence, the usual one first."""
    return tuple(lemma.replace("_", " ") for lemma in sense.lemma_names())


def above(sense: Synset) -> list[Synset]:
    """Return what a sense is a kind of, the nearest first; of several hypernyms the first is followed."""
    found: list[Synset] = []
    while True:
        parents = sense.hypernyms() or sense.instance_hypernyms()
        if not parents or parents[0] in found:
            return found
        sense = parents[0]
        found.append(sense)


def below(sense: Synset) -> Iterator[Synset]:
    """Yield everything that is a kind of a sense."""
    seen = {sense.name()}
    stack = list(sense.hyponyms())
    while stack:
        kind = stack.pop()
        if kind.name() not in seen:
            seen.add(kind.name())
            yield kind
            stack += kind.hyponyms()
