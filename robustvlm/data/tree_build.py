"""From parent links to a checked `Tree`: every fault of the input is one clear line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from robustvlm.data.names import name_key
from robustvlm.data.taxonomy import Tree
from robustvlm.errors import UserError, nearest


def build_tree(
    links: Iterable[tuple[str, str]], class_names: Sequence[str], *, where: str = "tree", subset: bool = False
) -> Tree:
    """Return the tree given by (parent, child) links, whose leaves must be exactly the classes.

    Leaves are matched to classes without regard to case, "_" and "-", and take the spelling of `class_names`.
    With `subset`, leaves that are no class are dropped instead of refused. `where` opens every error message.

    Raises:
        UserError: no link; a node with two parents; a cycle; two roots; a leaf that is no class; a class that is
            missing, has children, or is named twice.

    Example:
        >>> build_tree([("root", "pets"), ("pets", "cat"), ("pets", "dog")], ["dog", "cat"]).paths
        (('dog', 'pets', 'root'), ('cat', 'pets', 'root'))
    """
    parents = _parents(links, where)
    _check_one_root(parents, where)
    _check_no_cycle(parents, where)
    inner = set(parents.values())
    chains = {leaf: _chain(leaf, parents) for leaf in parents if leaf not in inner}
    leaf_of = _match(list(chains), parents, class_names, where, subset)
    for name in class_names:
        if name in chains[leaf_of[name]][1:]:
            raise UserError(f"{where}: the class '{name}' stands under a node of the same name: rename the node")
    return Tree.from_chains([(name, *chains[leaf_of[name]][1:]) for name in class_names])


def _parents(links: Iterable[tuple[str, str]], where: str) -> dict[str, str]:
    parents: dict[str, str] = {}
    for parent, child in links:
        known = parents.get(child)
        if known is not None and known != parent:
            raise UserError(
                f"{where}: '{child}' has two parents, '{known}' and '{parent}': a tree allows one, a forest one a tree"
            )
        parents[child] = parent
    if not parents:
        raise UserError(f"{where}: the tree is empty: give at least a root and one class under it")
    return parents


def _check_one_root(parents: Mapping[str, str], where: str) -> None:
    roots = list(dict.fromkeys(parent for parent in parents.values() if parent not in parents))
    if len(roots) > 1:
        shown = ", ".join(f"'{name}'" for name in roots[:4])
        raise UserError(f"{where}: the tree has {len(roots)} roots ({shown}): put one node above them")


def _check_no_cycle(parents: Mapping[str, str], where: str) -> None:
    done: set[str] = set()
    for start in parents:
        seen: dict[str, None] = {}
        node = start
        while node in parents and node not in done:
            if node in seen:
                trail = [*list(seen)[list(seen).index(node) :], node]
                raise UserError(f"{where}: the tree has a cycle: {' -> '.join(reversed(trail))}")
            seen[node] = None
            node = parents[node]
        done.update(seen)


def _chain(leaf: str, parents: Mapping[str, str]) -> tuple[str, ...]:
    chain = [leaf]
    while chain[-1] in parents:
        chain.append(parents[chain[-1]])
    return tuple(chain)


def _match(
    leaves: Sequence[str], parents: Mapping[str, str], class_names: Sequence[str], where: str, subset: bool
) -> dict[str, str]:
    """Return the leaf that stands for each class."""
    wanted = {name_key(name): name for name in class_names}
    if len(wanted) < len(class_names):
        twice = next(name for name in class_names if wanted[name_key(name)] != name or class_names.count(name) > 1)
        raise UserError(f"{where}: the class name '{twice}' is there twice, a tree needs distinct ones")
    leaf_of: dict[str, str] = {}
    for leaf in leaves:
        name = wanted.get(name_key(leaf))
        if name is None and not subset:
            raise UserError(f"{where}: the leaf '{leaf}' is no class: {nearest(leaf, class_names)}")
        if name is not None and name in leaf_of:
            raise UserError(f"{where}: '{leaf_of[name]}' and '{leaf}' both stand for the class '{name}'")
        if name is not None:
            leaf_of[name] = leaf
    missing = [name for name in class_names if name not in leaf_of]
    if missing:
        inner = {name_key(node) for node in parents.values()}
        why = "has children, classes must be leaves" if name_key(missing[0]) in inner else "is missing from the tree"
        raise UserError(f"{where}: the class '{missing[0]}' {why} ({len(missing)} of {len(class_names)} not found)")
    return leaf_of
