"""Class trees: ancestors and superclasses of classes, forests of several trees, and the files that hold them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from robustvlm.core.files import parse_json, write_text
from robustvlm.data.names import clean_name, read_text
from robustvlm.errors import UserError, nearest
from robustvlm.text import name_key, one_line

# Class trees: ancestors and superclasses of classes, and forests of several trees over the same classes

_MOST_SUPERCLASSES = 50
"""More groups than this no longer fit a table a person reads."""


@dataclass(frozen=True)
class Tree:
    """One tree whose leaves are the classes; `paths[i]` runs from class i (level 0) to the root (last level).

    All paths have the same length. The nodes of a level stand at equal distance from the root, so each level
    partitions the classes and the levels are nested. A class that is less deep than the deepest one repeats its
    parent: at a level below that parent's own, the parent stands for the classes directly under it.

    Example:
        >>> tree = Tree.from_chains([("cat", "pet", "animal"), ("dog", "pet", "animal"), ("elk", "animal")])
        >>> tree.paths[2], tree.levels
        (('elk', 'animal', 'animal'), 3)
        >>> tree.ancestor("cat", 1), tree.level_names(1)
        ('pet', ('pet', 'animal'))
        >>> tree.siblings("cat", 1)
        ('dog',)
    """

    paths: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.paths or len({len(path) for path in self.paths}) != 1:
            raise ValueError("a tree needs at least one path, and paths of equal length")

    @classmethod
    def from_chains(cls, chains: Sequence[Sequence[str]]) -> Tree:
        """Return the tree of unpadded paths (class, parent, ..., root), one a class."""
        depth = max((len(chain) for chain in chains), default=0)
        return cls(tuple((chain[0], *([chain[1]] * (depth - len(chain))), *chain[1:]) for chain in chains))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The leaves, in class order."""
        return tuple(path[0] for path in self.paths)

    @property
    def root(self) -> str:
        """The name of the top node, which also names the tree within a forest."""
        return self.paths[0][-1]

    @property
    def levels(self) -> int:
        """Number of levels: 0 is the classes, `levels - 1` the root."""
        return len(self.paths[0])

    @cached_property
    def superclass_level(self) -> int:
        """The level reports group by: the lowest with at most 50 groups and at most half as many as classes."""
        most = min(_MOST_SUPERCLASSES, len(self.paths) // 2)
        return next((n for n in range(1, self.levels) if len(self.level_names(n)) <= most), self.levels - 1)

    @cached_property
    def _path_of(self) -> dict[str, tuple[str, ...]]:
        return {path[0]: path for path in self.paths}

    def path(self, leaf: str) -> tuple[str, ...]:
        """Return the nodes from `leaf` (level 0) to the root, one a level."""
        if leaf not in self._path_of:
            raise UserError(f"'{leaf}' is no class of the tree '{self.root}': {nearest(leaf, self._path_of)}")
        return self._path_of[leaf]

    def ancestors(self, leaf: str) -> tuple[str, ...]:
        """Return the distinct nodes above `leaf`, its parent first and the root last."""
        return tuple(dict.fromkeys(self.path(leaf)[1:]))

    def ancestor(self, leaf: str, level: int) -> str:
        """Return the node above `leaf` at `level`."""
        return self.path(leaf)[self._checked(level)]

    def superclasses(self, level: int) -> tuple[str, ...]:
        """Return the node at `level` of every class, in class order: a map from label to superclass name."""
        return tuple(path[self._checked(level)] for path in self.paths)

    def level_names(self, level: int) -> tuple[str, ...]:
        """Return the distinct nodes of `level`, in the order of their first class."""
        return tuple(dict.fromkeys(self.superclasses(level)))

    def superclass_labels(self, level: int) -> tuple[int, ...]:
        """Return, for every class, the index of its superclass in `level_names(level)`."""
        index = {name: i for i, name in enumerate(self.level_names(level))}
        return tuple(index[name] for name in self.superclasses(level))

    def groups(self, level: int) -> dict[str, tuple[str, ...]]:
        """Return the classes under each node of `level`."""
        found: dict[str, list[str]] = {name: [] for name in self.level_names(level)}
        for path in self.paths:
            found[path[level]].append(path[0])
        return {name: tuple(leaves) for name, leaves in found.items()}

    def siblings(self, leaf: str, level: int = 1) -> tuple[str, ...]:
        """Return the other classes under the ancestor of `leaf` at `level`."""
        return tuple(name for name in self.groups(self._checked(level))[self.ancestor(leaf, level)] if name != leaf)

    def common_level(self, first: str, second: str) -> int:
        """Return the lowest level at which two classes share a node: 0 if they are one, `levels - 1` at most."""
        return next(i for i, (a, b) in enumerate(zip(self.path(first), self.path(second), strict=True)) if a == b)

    def restrict(self, class_names: Sequence[str]) -> Tree:
        """Return the tree over some of its classes, in the order given."""
        return Tree.from_chains([(name, *self.ancestors(name)) for name in class_names])

    def to_nested(self) -> dict[str, Any]:
        """Return the tree as nested dictionaries, the format of tree files."""
        nodes: dict[str, dict[str, Any]] = {self.root: {"name": self.root}}
        for path in self.paths:
            down = list(dict.fromkeys(reversed(path)))
            for parent, child in pairwise(down):
                if child not in nodes:
                    nodes[child] = {"name": child}
                    nodes[parent].setdefault("children", []).append(nodes[child])
        return nodes[self.root]

    def _checked(self, level: int) -> int:
        if not 0 <= level < self.levels:
            raise UserError(f"the tree '{self.root}' has levels 0 (classes) to {self.levels - 1} (root), got {level}")
        return level


@dataclass(frozen=True)
class Forest:
    """Several trees over the same classes, told apart by their roots; a single tree is a forest of one.

    Example:
        >>> kind = Tree((("cat", "animal", "kind"), ("car", "vehicle", "kind")))
        >>> place = Tree((("cat", "home", "place"), ("car", "street", "place")))
        >>> [tree.root for tree in Forest((kind, place))]
        ['kind', 'place']
    """

    trees: tuple[Tree, ...]

    def __post_init__(self) -> None:
        if not self.trees:
            raise UserError("a forest needs at least one tree")
        roots = [tree.root for tree in self.trees]
        if len(set(map(name_key, roots))) < len(roots):
            raise UserError(f"the trees of a forest need different roots, got {', '.join(roots)}")
        for tree in self.trees[1:]:
            if tree.class_names != self.trees[0].class_names:
                raise UserError(f"the trees '{roots[0]}' and '{tree.root}' have different classes")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The leaves all trees share, in class order."""
        return self.trees[0].class_names

    def __iter__(self) -> Iterator[Tree]:
        return iter(self.trees)

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, root: str | int) -> Tree:
        """Return a tree by position or by the name of its root."""
        if isinstance(root, int):
            return self.trees[root]
        found = {name_key(tree.root): tree for tree in self.trees}
        if name_key(root) not in found:
            raise UserError(f"no tree '{root}' in the forest: {nearest(root, [tree.root for tree in self.trees])}")
        return found[name_key(root)]

    def restrict(self, class_names: Sequence[str]) -> Forest:
        """Return the forest over some of its classes."""
        return Forest(tuple(tree.restrict(class_names) for tree in self.trees))


# From parent links to a checked `Tree`: every fault of the input is one clear line


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


# Trees and forests in files: nested JSON or YAML, or a CSV of parent, child (and tree)

Links = list[tuple[str, str]]


def load_tree(path: Path | str, class_names: Sequence[str], *, subset: bool = False) -> Tree:
    """Return the one tree in a file; see `load_forest` for the formats and errors."""
    forest = load_forest(path, class_names, subset=subset)
    if len(forest) > 1:
        raise UserError(f"{path} holds {len(forest)} trees where one is expected")
    return forest[0]


def load_forest(path: Path | str, class_names: Sequence[str], *, subset: bool = False) -> Forest:
    """Return the trees in a file, checked against the classes.

    JSON or YAML: `{"name": "root", "children": [{"name": "pets", "children": [{"name": "cat"}, ...]}]}`, where a
    plain string is a leaf, or a list of such trees. CSV: lines `parent,child`, with a third column `tree` for a
    forest; a header line may give the columns another order.

    Raises:
        UserError: what `build_tree` refuses, a file that cannot be read, a node without a name or with one twice.
    """
    path = Path(path)
    return Forest(tuple(build_tree(links, class_names, where=str(path), subset=subset) for links in _links_in(path)))


def group_names(path: Path | str) -> tuple[str, ...]:
    """Return the names of all that has children in the trees of a file, whatever its leaves are.

    Raises:
        UserError: as `load_forest`, but for what it says of classes.
    """
    parents = (parent for links in _links_in(Path(path)) for parent, _ in links)
    return tuple(dict.fromkeys(parents))


def _links_in(path: Path) -> list[Links]:
    text = read_text(path, "tree")
    if path.suffix.lower() in {".csv", ".tsv"}:
        trees = _from_csv(text, path)
    elif path.suffix.lower() in {".json", ".yaml", ".yml"}:
        trees = _from_nested(_parse(text, path), path)
    else:
        raise UserError(f"{path}: a tree file ends in .json, .yaml, .yml, .csv or .tsv")
    if not trees:
        raise UserError(f"{path}: the file holds no tree")
    return trees


def save_forest(forest: Forest, path: Path | str) -> None:
    """Write a forest as nested JSON; a forest of one tree is written as that tree."""
    nested = [tree.to_nested() for tree in forest]
    text = json.dumps(nested[0] if len(nested) == 1 else nested, indent=1, ensure_ascii=False)
    write_text(Path(path), text + "\n")


def _parse(text: str, path: Path) -> Any:
    try:
        return parse_json(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid {path.suffix[1:].upper()}: {one_line(error)}") from None


def _from_nested(value: Any, path: Path) -> list[Links]:
    return [list(_walk(tree, path)) for tree in (value if isinstance(value, list) else [value])]


def _walk(tree: Any, path: Path) -> Iterator[tuple[str, str]]:
    """Yield the (parent, child) links of a nested tree; a name met twice ends it, so YAML aliases do no harm."""
    parent_of: dict[str, str | None] = {}
    stack: list[tuple[str | None, Any]] = [(None, tree)]
    while stack:
        parent, node = stack.pop()
        name, children = _node(node, path)
        if name in parent_of:
            first, second = parent_of[name] or "the root", parent or "the root"
            raise UserError(f"{path}: the name '{name}' is there twice, under '{first}' and under '{second}'")
        parent_of[name] = parent
        if parent is not None:
            yield parent, name
        stack.extend((name, child) for child in reversed(children))


def _node(node: Any, path: Path) -> tuple[str, list[Any]]:
    if isinstance(node, str):
        node = {"name": node}
    if not isinstance(node, dict) or not isinstance(node.get("name"), str) or not node["name"].strip():
        raise UserError(f"{path}: a node must be {{'name': TEXT, 'children': [...]}}, got {_short(node)}")
    children = node.get("children") or []
    if not isinstance(children, list):
        raise UserError(f"{path}: the children of '{node['name']}' must be a list, got {_short(children)}")
    return clean_name(node["name"], str(path)), children


def _short(value: object) -> str:
    shown = "nothing" if value is None else type(value).__name__ if isinstance(value, (dict, list)) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _from_csv(text: str, path: Path) -> list[Links]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        rows = [
            [clean_name(cell, str(path)) for cell in row] for row in csv.reader(io.StringIO(text), delimiter=delimiter)
        ]
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV: {error}") from None
    rows = [row for row in rows if any(row)]
    columns = ["parent", "child", "tree"]
    if rows and {"parent", "child"} <= {cell.lower() for cell in rows[0]}:
        columns = [cell.lower() for cell in rows.pop(0)]
    trees: dict[str, Links] = {}
    for number, row in enumerate(rows, start=1):
        cells = dict(zip(columns, row, strict=False))
        if len(row) > len(columns) or not cells.get("parent") or not cells.get("child"):
            raise UserError(f"{path}: row {number} must be parent,child (and tree), got {','.join(row)!r}")
        trees.setdefault(cells.get("tree", ""), []).append((cells["parent"], cells["child"]))
    return list(trees.values())
