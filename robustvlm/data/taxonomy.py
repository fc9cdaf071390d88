"""Class trees: ancestors and superclasses of classes, and forests of several trees over the same classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from robustvlm.data.names import name_key
from robustvlm.errors import UserError, nearest

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
