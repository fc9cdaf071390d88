"""Where antibodies come from: the bundled bank, files, WordNet, or noise around the classes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError

from robustvlm.core.files import parse_json
from robustvlm.core.seeds import generator
from robustvlm.data.classes import KNOWN, imagenet_names, known_forest
from robustvlm.data.make_trees import Nouns, Synset, above, below, find_senses, open_wordnet, words_of_sense
from robustvlm.data.names import keys_once, read_text
from robustvlm.defenses.immunity.antibodies import texts as kept
from robustvlm.defenses.immunity.antibodies.llm import Entry, LlmSource, to_proposal
from robustvlm.errors import UserError, nearest
from robustvlm.llm import LlmClient
from robustvlm.text import name_key

# Antibodies that come with the package, for the bundled class sets: no model to ask, the same for everybody

BANKS = ("emoji", "cifar10", "cifar100", "imagenet1k")


class BankSource(kept.AntibodySource):
    """The bundled banks; each class is looked up by name, first in the bank that knows most of the classes.

    ImageNet-1k's classes have texts of their own, and so has any subset of them; a class without an entry shares those
    of its superclass (the level that reports group by).

    Raises:
        UserError: none of the classes is in any bank.

    Example:
        >>> proposal = BankSource().propose(["dog", "cat", "my own class"])
        >>> sorted({text.of_class for text in proposal.texts})
        ['cat', 'dog']
    """

    def propose(self, class_names: Sequence[str]) -> kept.Proposal:
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
    entries = _entries(name)
    if name == "imagenet1k":
        entries = {**entries, **superclass_bank()} | _entries(f"{name}-classes")
    return {name_key(label): entry for label, entry in entries.items()}


def _entries(name: str) -> dict[str, Entry]:
    text = (files("robustvlm") / "assets" / "antibodies" / f"{name}.json").read_text(encoding="utf-8")
    return {label: Entry.model_validate(entry) for label, entry in json.loads(text)["classes"].items()}


@cache
def superclass_bank() -> Mapping[str, Entry]:
    """Return, for ImageNet-1k's classes, what is written about their superclasses."""
    entries, names = _entries("imagenet1k"), imagenet_names()
    tree = known_forest(next(known for known in KNOWN if known.name == "imagenet1k"), names)[0]
    above = tree.superclasses(tree.superclass_level)
    return {name: entries[group] for name, group in zip(names, above, strict=True)}


def _known(bank: Mapping[str, Entry], class_names: Sequence[str]) -> int:
    return sum(name_key(name) in bank for name in class_names)


# Antibodies in files: JSON by class, a CSV table, or lines; and writing them, so that they can be read and edited

_LONGEST = 300
_FORM = '{"classes": {"dog": {"same": [...], "look_alikes": ["wolf", ...], "impossible": [...]}}} or {"dog": ["wolf"]}'


class FileSource(kept.AntibodySource):
    """Antibodies in a file of the user's.

    * `.json`: `{"classes": {CLASS: {"same": [...], "look_alikes": [...], "impossible": [...]}}}`, the form of the
      bundled banks, or in short `{CLASS: [TEXT, ...]}`;
    * `.csv`: a header `class,text` and, if wanted, `kind` (hard-negative or context);
    * anything else: lines `CLASS: TEXT`; blank lines and # comments are skipped.

    Classes are matched without regard to case, "_" and "-"; those that the data does not have are an error. What stands
    under several spellings of a class is put together.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def propose(self, class_names: Sequence[str]) -> kept.Proposal:
        """Return what the file holds.

        Raises:
            UserError: no such file, not of its form, an unknown class, an empty or overlong text, nothing in it.
        """
        text = read_text(self.path, "antibodies")
        known = {name_key(name): name for name in class_names}
        suffix = self.path.suffix.lower()
        if suffix == ".json":
            entries: dict[str, Entry] = {}
            for name, entry in self._json(text).items():
                label = self._class(name, known)
                entries[label] = _joined(entries[label], entry) if label in entries else entry
            proposal = to_proposal(entries)
        else:
            rows = self._csv(text) if suffix == ".csv" else self._lines(text)
            proposal = kept.Proposal(
                tuple(kept.AntibodyText(text, self._class(name, known), kind) for name, text, kind in rows)
            )
        if not proposal.texts:
            raise UserError(f"the antibodies file {self.path} holds no text")
        for item in proposal.texts:
            if not item.text.strip() or len(item.text) > _LONGEST:
                what = "an empty text" if not item.text.strip() else f"a text of {len(item.text)} characters"
                raise UserError(f"{self.path}: '{item.of_class}' has {what}: write noun phrases, as 'wolf'")
        return proposal

    def _class(self, name: str, known: Mapping[str, str]) -> str:
        if name_key(name) not in known:
            raise UserError(f"{self.path}: '{name}' is no class of the data: {nearest(name, known.values())}")
        return known[name_key(name)]

    def _json(self, text: str) -> dict[str, Entry]:
        try:
            content: Any = parse_json(text, pairs=lambda pairs: keys_once(pairs, str(self.path)))
        except ValueError as error:
            raise UserError(f"{self.path} is not valid JSON: {error}") from None
        classes = content.get("classes", content) if isinstance(content, dict) else None
        if not isinstance(classes, dict):
            raise UserError(f"{self.path} must hold {_FORM}")
        entries = {}
        for name, entry in classes.items():
            try:
                entries[name] = Entry.model_validate({"look_alikes": entry} if isinstance(entry, list) else entry)
            except ValidationError:
                raise UserError(f"{self.path}: the entry of '{name}' is not of the form {_FORM}") from None
        return entries

    def _csv(self, text: str) -> list[tuple[str, str, str]]:
        table = csv.DictReader(io.StringIO(text))
        try:
            return self._rows(table)
        except csv.Error as error:
            raise UserError(f"{self.path} is not valid CSV: {error}") from None

    def _rows(self, table: csv.DictReader[str]) -> list[tuple[str, str, str]]:
        columns = [name.strip().lower() for name in table.fieldnames or ()]
        if not {"class", "text"} <= set(columns):
            raise UserError(f"{self.path}: a CSV of antibodies begins with the header class,text or class,text,kind")
        table.fieldnames = columns
        return [
            ((row["class"] or "").strip(), (row["text"] or "").strip(), (row.get("kind") or kept.HARD_NEGATIVE).strip())
            for row in table
        ]

    def _lines(self, text: str) -> list[tuple[str, str, str]]:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, colon, phrase = line.partition(":")
            if not colon:
                raise UserError(f"{self.path}: line {number} must be CLASS: TEXT, as 'dog: wolf', got '{line[:60]}'")
            rows.append((name.strip(), phrase.strip(), kept.HARD_NEGATIVE))
        return rows


def _joined(one: Entry, other: Entry) -> Entry:
    """Return one entry with the phrases of two."""
    return Entry(**{name: (*getattr(one, name), *getattr(other, name)) for name in Entry.model_fields})


# Antibodies from WordNet: what stands beside a class under the same hypernym

_MOST_KIN = 2000


class WordNetSource(kept.AntibodySource):
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

    def propose(self, class_names: Sequence[str]) -> kept.Proposal:
        nouns = open_wordnet() if self.nouns is None else self.nouns
        texts: list[kept.AntibodyText] = []
        kin: dict[str, tuple[str, ...]] = {}
        for name, sense in zip(class_names, find_senses(nouns, class_names), strict=True):
            if sense is None:
                continue
            kin[name] = _kin(sense)
            texts += [kept.AntibodyText(words_of_sense(other)[0], name) for other in _beside(sense, self.count)]
        if not texts:
            raise UserError(f"WordNet has nothing beside any of the classes ('{class_names[0]}', ...)")
        return kept.Proposal(tuple(texts), kin)


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


# From the words of a command to a source of antibodies

FORMS = (
    ("bank", "the bundled ones"),
    ("file:PATH", "your own"),
    ("llm", "written by a language model"),
    ("wordnet", "WordNet's neighbours"),
)
"""What a source can be; noise, which has no texts, is made by `noise_antibodies`."""


def open_source(
    spec: str, *, client: LlmClient | None = None, on_classes: Callable[[int], None] | None = None
) -> kept.AntibodySource:
    """Return the source that `spec` names, one of `FORMS`.

    Raises:
        UserError: an unknown form, or no language model named where one is needed.

    Example:
        >>> type(open_source("bank")).__name__
        'BankSource'
    """
    kind, _, rest = spec.partition(":")
    if kind == "file" and rest:
        return FileSource(rest)
    if spec == "bank":
        return BankSource()
    if spec == "wordnet":
        return WordNetSource()
    if spec != "llm":
        forms = ", ".join(form for form, _ in FORMS)
        hint = nearest(kind, [form.partition(":")[0] for form, _ in FORMS])
        raise UserError(f"antibodies come from {forms}; got '{spec}': {hint}")
    if client is None:
        raise UserError("antibodies by a language model need --llm URL and --llm-model NAME")
    return LlmSource(client, on_classes=on_classes)


# Noise as antibodies: the baseline that is worth nothing, which shows what the texts are worth


def noise_antibodies(count: int, dimensions: int, *, seed: int) -> kept.Antibodies:
    """Return `count` antibodies uniform on the unit sphere of `dimensions`, each a function of seed and number alone.

    In D dimensions P(|cos| > eps) <= 2 exp(-D eps^2 / 2) for a fixed direction (Immuno-VLM, arXiv 2605.30745): such
    antibodies lie far from every class and push nothing. They are not put through the filters, which none would pass.

    Example:
        >>> antibodies = noise_antibodies(2, 64, seed=0)
        >>> antibodies.embeddings.norm(dim=1).round(decimals=4), antibodies.texts[0].text
        (tensor([1., 1.]), 'noise 0')
    """
    rows = [torch.randn(dimensions, generator=generator(seed, "noise antibody", i)) for i in range(count)]
    embeddings = F.normalize(torch.stack(rows), dim=-1) if rows else torch.zeros(0, dimensions)
    return kept.Antibodies(tuple(kept.AntibodyText(f"noise {i}", "", kept.NOISE) for i in range(count)), embeddings)
