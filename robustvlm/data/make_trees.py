"""Class trees made on demand, by WordNet or by a language model."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from robustvlm.data.classes import recognise, wordnet_names
from robustvlm.data.trees import Forest, Tree, build_tree
from robustvlm.errors import MissingExtra, UserError, nearest, setting
from robustvlm.llm import LlmClient, LlmError
from robustvlm.text import name_key

# WordNet's nouns, through nltk: the meaning of a class name, what it is a kind of, and what stands beside it


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


# A class tree from WordNet's hypernyms, cut down to a few levels

LEVELS = 4
"""Inner levels kept at most: WordNet's own chains are 5 to 19 nodes long, most of them with one child."""

_ROOT = "entity"


def wordnet_tree(nouns: Nouns, class_names: Sequence[str], *, levels: int = LEVELS) -> Tree:
    """Return the tree of the classes' hypernyms with at most `levels` inner levels, the root included.

    Of several hypernyms the first is followed. Of the nodes above the classes those stay that some cut selects: the
    topmost with at most a certain number of classes, if they have at least a tenth of it. The first cut allows half of
    all classes, each further one a third of that before; so every level says something, where WordNet's own top
    (entity, physical entity, object, whole) says nothing. A class that WordNet does not have is refused by name.

    Raises:
        UserError: a name that WordNet lacks, or a tree that cannot be built from what it has.
    """
    if levels < 1:
        raise UserError(f"a tree needs at least 1 inner level, got {levels}")
    senses = find_senses(nouns, class_names)
    lost = [name for name, sense in zip(class_names, senses, strict=True) if sense is None]
    if lost:
        raise UserError(
            f"WordNet does not have the class '{lost[0]}' ({len(lost)} of {len(class_names)} not found): "
            "write the tree into a file, or let a language model make it"
        )
    chains = [[node.name() for node in above(sense)] for sense in senses if sense is not None]
    kept = _selected(chains, _cuts(len(class_names), levels - 1))
    short = [[node for node in chain if node in kept] for chain in chains]
    names = _readable_names(senses, set(itertools.chain.from_iterable(short)), class_names)
    links: dict[tuple[str, str], None] = {}
    for leaf, chain in zip(class_names, short, strict=True):
        path = [leaf, *(names[node] for node in chain), names[_ROOT]]
        links.update(dict.fromkeys((parent, child) for child, parent in itertools.pairwise(path)))
    return build_tree(links, class_names, where="the tree from WordNet")


def _cuts(classes: int, count: int) -> list[tuple[float, float]]:
    """Return the (most, least) classes of a node for each cut, the coarsest first."""
    most = [max(2.0, classes / (2 * 3**i)) for i in range(count)]
    return [(size, max(2.0, size / 10)) for size in most]


def _selected(chains: Sequence[Sequence[str]], cuts: Sequence[tuple[float, float]]) -> set[str]:
    """Return the nodes that a cut selects, each with fewer classes than its parent has."""
    sizes = Counter(node for chain in chains for node in chain)
    parent = {child: above for chain in chains for child, above in itertools.pairwise(chain)}
    return {
        node
        for node, size in sizes.items()
        if node in parent and any(least <= size <= most < sizes[parent[node]] for most, least in cuts)
    }


def _readable_names(senses: Sequence[Synset | None], nodes: set[str], class_names: Sequence[str]) -> dict[str, str]:
    """Return a name for each node: its first word that is no class and not taken, else a word marked as a kind."""
    taken = {name_key(name) for name in class_names}
    names: dict[str, str] = {}
    found = {node.name(): node for sense in senses if sense is not None for node in above(sense)}
    for key in [_ROOT, *(key for key in found if key in nodes)]:
        words = words_of_sense(found[key]) if key in found else (_ROOT,)
        marked = (f"{words[0]} (kind{'' if n == 1 else f' {n}'})" for n in itertools.count(1))
        names[key] = next(word for word in itertools.chain(words, marked) if name_key(word) not in taken)
        taken.add(name_key(names[key]))
    return names


# A class tree by a language model: first the groups, then each class into one of them

BY_KIND = "kind of thing"
CLASSES_PER_QUESTION = 40
_LONGEST = 60

SYSTEM = "You sort the classes of an image classifier into a small hierarchy. You answer with short English nouns."

GROUPS = """\
These are the classes of an image classifier:
{classes}

Make two levels of groups above them, by this criterion: {criterion}.
Between {fewest} and {most} groups, such that every class belongs to exactly one; look-alike classes belong together.
Put every group under one of a few domains (2 to 8), the coarser level. No group may have the name of a class.

Answer as JSON: {{"groups": [{{"domain": "...", "group": "..."}}, ...]}}"""

MEMBERS = """\
These are groups of classes, by this criterion: {criterion}.
{groups}

Put each of the following classes into exactly one of these groups. Copy the names as they are.
{classes}

Answer as JSON: {{"members": [{{"name": "...", "group": "..."}}, ...]}}"""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid")

    domain: str
    group: str


class _Groups(BaseModel):
    model_config = ConfigDict(extra="forbid")

    groups: list[_Group]


class _Member(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    group: str


class _Members(BaseModel):
    model_config = ConfigDict(extra="forbid")

    members: list[_Member]


def llm_tree(
    client: LlmClient,
    class_names: Sequence[str],
    *,
    criterion: str = BY_KIND,
    on_classes: Callable[[int], None] | None = None,
) -> Tree:
    """Return a tree class -> group -> domain -> root, where the root is named after the criterion.

    Trees by several criteria make a forest. Every class ends up in exactly one group, or there is no tree: one that the
    model leaves out or puts nowhere is asked for once more.

    Raises:
        LlmError: no usable answer, or none for some class.
        UserError: fewer than 2 classes.
    """
    if len(class_names) < 2:
        raise UserError(f"a tree needs at least 2 classes, got {len(class_names)}")
    domain_of = _ask_groups(client, class_names, criterion)
    group_of: dict[str, str] = {}
    for part in _parts(class_names):
        group_of |= _ask_members(client, part, domain_of, criterion)
        left = [name for name in part if name not in group_of]
        if left:
            group_of |= _ask_members(client, left, domain_of, criterion)
        missing = [name for name in part if name not in group_of]
        if missing:
            raise LlmError(
                f"the language model '{client.endpoint.model}' puts the class '{missing[0]}' into no group, asked "
                "twice: try another model, or write the tree into a file"
            )
        if on_classes is not None:
            on_classes(len(group_of))
    return _build(class_names, group_of, domain_of, criterion)


def _ask_groups(client: LlmClient, class_names: Sequence[str], criterion: str) -> dict[str, str]:
    """Return the domain of each group, by the group's name."""
    fewest, most = max(2, len(class_names) // 12), max(3, min(40, len(class_names) // 3))
    prompt = GROUPS.format(classes=_quoted(class_names), criterion=criterion, fewest=fewest, most=most)
    reply = client.ask(prompt, _Groups, system=SYSTEM)
    domain_of: dict[str, str] = {}
    for row in reply.groups:
        group, domain = _short(row.group), _short(row.domain)
        if group and domain and name_key(group) not in map(name_key, domain_of):
            domain_of[group] = domain
    if not domain_of:
        raise LlmError(f"the language model '{client.endpoint.model}' names no group: try another model")
    return domain_of


def _ask_members(client: LlmClient, part: Sequence[str], domain_of: dict[str, str], criterion: str) -> dict[str, str]:
    prompt = MEMBERS.format(groups=_quoted(list(domain_of)), classes=_quoted(part), criterion=criterion)
    reply = client.ask(prompt, _Members, system=SYSTEM)
    wanted, groups = ({name_key(name): name for name in names} for names in (part, domain_of))
    found: dict[str, str] = {}
    for row in reply.members:
        name, group = wanted.get(name_key(row.name)), groups.get(name_key(_short(row.group)))
        if name is not None and group is not None:
            found.setdefault(name, group)
    return found


def _build(class_names: Sequence[str], group_of: dict[str, str], domain_of: dict[str, str], criterion: str) -> Tree:
    """Return the tree with names that no two nodes share: coarser ones yield, marked as such."""
    taken = {name_key(name) for name in class_names}
    root = _free(criterion, "all", taken)
    used = [group for group in domain_of if group in group_of.values()]
    group_names = {group: _free(group, "group", taken) for group in used}
    domains = {name_key(domain_of[group]): domain_of[group] for group in used}
    domain_names = {key: _free(domain, "domain", taken) for key, domain in domains.items()}
    links = [(root, name) for name in domain_names.values()]
    links += [(domain_names[name_key(domain_of[group])], name) for group, name in group_names.items()]
    links += [(group_names[group_of[name]], name) for name in class_names]
    return build_tree(links, class_names, where="the language model's tree")


def _free(name: str, mark: str, taken: set[str]) -> str:
    while name_key(name) in taken:
        name = f"{name} ({mark})"
    taken.add(name_key(name))
    return name


def _short(name: str) -> str:
    return " ".join(name.split())[:_LONGEST].strip()


def _quoted(names: Sequence[str]) -> str:
    return json.dumps(list(names), ensure_ascii=False)


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + CLASSES_PER_QUESTION] for start in range(0, len(names), CLASSES_PER_QUESTION))


# Trees made on demand: `wordnet` or `llm` in the place of a tree file

MAKERS = ("wordnet", "llm")


def make_forest(
    how: str, class_names: Sequence[str], *, client: LlmClient | None = None, criteria: Sequence[str] = (BY_KIND,)
) -> Forest:
    """Return a tree over the classes from WordNet, or trees by a language model, one for each criterion.

    Raises:
        UserError: an unknown way, no language model named where one is needed, and what the ways themselves refuse.

    Example:
        >>> make_forest("guess", ["cat", "dog"])
        Traceback (most recent call last):
        robustvlm.errors.UserError: a tree is made by 'wordnet' or 'llm', got 'guess': known: 'llm', 'wordnet'
    """
    if how == "wordnet":
        return Forest((wordnet_tree(open_wordnet(), class_names),))
    if how != "llm":
        raise UserError(f"a tree is made by 'wordnet' or 'llm', got '{how}': {nearest(how, MAKERS)}")
    if client is None:
        raise UserError(f"a tree by a language model needs {setting('llm', 'URL')} and {setting('llm_model', 'NAME')}")
    return Forest(tuple(llm_tree(client, class_names, criterion=criterion) for criterion in criteria))
