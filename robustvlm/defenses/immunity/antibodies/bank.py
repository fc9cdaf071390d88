"""Antibodies that come with the package, for the bundled class sets: no model to ask, the same for everybody."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from robustvlm.data.classes import KNOWN, imagenet_names, known_forest
from robustvlm.data.names import name_key
from robustvlm.defenses.immunity.antibodies.entries import Entry, to_proposal
from robustvlm.defenses.immunity.antibodies.texts import AntibodySource, Proposal
from robustvlm.errors import UserError

BANKS = ("emoji", "cifar10", "cifar100", "imagenet1k")


class BankSource(AntibodySource):
    """The bundled banks; each class is looked up by name, first in the bank that knows most of the classes.

    The bank for ImageNet-1k is by superclass: its classes share those of theirs (the level that reports group by).

    Raises:
        UserError: none of the classes is in any bank.

    Example:
        >>> proposal = BankSource().propose(["dog", "cat", "my own class"])
        >>> sorted({text.of_class for text in proposal.texts})
        ['cat', 'dog']
    """

    def propose(self, class_names: Sequence[str]) -> Proposal:
        banks = sorted((load_bank(name) for name in BANKS), key=lambda bank: -_known(bank, class_names))
        entries: dict[str, Entry] = {}
        for name in class_names:
            found = next((bank[name_key(name)] for bank in banks if name_key(name) in bank), None)
            if found is not None:
                entries[name] = found
        if not entries:
            raise UserError(
                f"the bundled antibodies know none of the classes ('{class_names[0]}', ...): "
                "pass a file of your own (--antibodies file:PATH), or let a language model write them (--llm URL)"
            )
        return to_proposal(entries)


@cache
def load_bank(name: str) -> Mapping[str, Entry]:
    """Return a bundled bank by `name_key` of the class.

    Example:
        >>> len(load_bank("cifar10")), len(load_bank("cifar10")["frog"].look_alikes) >= 12
        (10, True)
    """
    text = (files("robustvlm") / "assets" / "antibodies" / f"{name}.json").read_text(encoding="utf-8")
    entries = {label: Entry.model_validate(entry) for label, entry in json.loads(text)["classes"].items()}
    if name == "imagenet1k":
        entries = entries | _by_superclass(entries)
    return {name_key(label): entry for label, entry in entries.items()}


def _by_superclass(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    names = imagenet_names()
    tree = known_forest(next(known for known in KNOWN if known.name == "imagenet1k"), names)[0]
    above = tree.superclasses(tree.superclass_level)
    return {name: entries[group] for name, group in zip(names, above, strict=True)}


def _known(bank: Mapping[str, Entry], class_names: Sequence[str]) -> int:
    return sum(name_key(name) in bank for name in class_names)
