"""A class tree from WordNet's hypernyms, cut down to a few levels."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from robustvlm.data.names import name_key
from robustvlm.data.taxonomy import Tree
from robustvlm.data.tree_build import build_tree
from robustvlm.data.wordnet import Nouns, Synset, above, find_senses, words_of_sense
from robustvlm.errors import UserError

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
