"""Antibodies from WordNet: what stands beside a class under the same hypernym."""

from __future__ import annotations

from collections.abc import Sequence

from robustvlm.data.wordnet import Nouns, Synset, above, below, find_senses, open_wordnet, words_of_sense
from robustvlm.defenses.immunity.antibodies.texts import AntibodySource, AntibodyText, Proposal
from robustvlm.errors import UserError

_MOST_KIN = 2000


class WordNetSource(AntibodySource):
    """Co-hyponyms of each class, the most frequent words first: a baseline without a language model.

    Args:
        nouns: WordNet's nouns; nltk's by default.
        count: texts for each class; where the siblings are fewer, cousins follow.

    Raises:
        MissingExtra: nltk is not installed.
        UserError: its WordNet is not there, or has none of the classes.
    """

    def __init__(self, nouns: Nouns | None = None, *, count: int = 12) -> None:
        self.nouns, self.count = nouns, count

    def propose(self, class_names: Sequence[str]) -> Proposal:
        nouns = open_wordnet() if self.nouns is None else self.nouns
        texts: list[AntibodyText] = []
        kin: dict[str, tuple[str, ...]] = {}
        for name, sense in zip(class_names, find_senses(nouns, class_names), strict=True):
            if sense is None:
                continue
            kin[name] = _kin(sense)
            texts += [AntibodyText(words_of_sense(other)[0], name) for other in _beside(sense, self.count)]
        if not texts:
            raise UserError(f"WordNet has nothing beside any of the classes ('{class_names[0]}', ...)")
        return Proposal(tuple(texts), kin)


def _beside(sense: Synset, count: int) -> list[Synset]:
    """Return siblings, then cousins, of a sense under its first hypernym: the most frequent first in each round."""
    found: dict[str, Synset] = {}
    apart = {sense.name()}
    for parent in above(sense)[:2]:
        near = {node.name(): node for node in parent.hyponyms() if node.name() not in apart | set(found)}
        found |= dict(sorted(near.items(), key=lambda item: (-_frequency(item[1]), item[0])))
        apart.add(parent.name())
        if len(found) >= count:
            break
    return list(found.values())[:count]


def _frequency(sense: Synset) -> int:
    """Return how often WordNet's own corpus uses the first word of a sense: common words are the ones CLIPs know."""
    return int(sense.lemmas()[0].count())


def _kin(sense: Synset) -> tuple[str, ...]:
    """Return the words of a sense and of all its kinds."""
    words = dict.fromkeys(words_of_sense(sense))
    for kind in below(sense):
        words |= dict.fromkeys(words_of_sense(kind))
        if len(words) > _MOST_KIN:
            break
    return tuple(words)
