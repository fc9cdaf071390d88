"""The photographs in parts: tuned on or held out; of known classes, of their siblings in the tree, of others.

Every part is a Parquet file of its own, so that each command of the benchmark names what it reads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustvlm.data.trees import Tree
from robustvlm.errors import UserError

from .photographs import Photograph, write_parquet

KNOWN_SHARE, FAR_SHARE, HELD_SHARE = 0.5, 0.25, 0.2
FAR_GROUPS, FAMILY = 20, 1


@dataclass(frozen=True)
class Parts:
    """Class names by what a model of the known classes makes of them, and those whose photographs are held out.

    Attributes:
        known: half of the classes.
        near: unknown classes with a known sibling (under one node at level 1 of the tree).
        far: unknown classes of whose group at `far_level` none is known.
        held: a fifth of each, whose photographs nothing is tuned on.
    """

    known: tuple[str, ...]
    near: tuple[str, ...]
    far: tuple[str, ...]
    held: frozenset[str]


def far_level(tree: Tree) -> int:
    """Return the highest level with at least 20 groups: level 3 of ImageNet's tree, which has 44.

    Raises:
        UserError: no level above the classes has so many.
    """
    levels = [level for level in range(1, tree.levels) if len(tree.level_names(level)) >= FAR_GROUPS]
    if not levels:
        raise UserError(
            f"the tree '{tree.root}' has no level with {FAR_GROUPS} groups, which far classes are drawn from"
        )
    return levels[-1]


def divided(tree: Tree, seed: int = 0) -> Parts:
    """Return the parts of the classes of a tree, drawn by the seed alone.

    Far classes are whole groups of a high level, drawn while they are at most a quarter of all. Of the rest, a class of
    every family (level 1) is known first, so that the other classes of the family are siblings of something known.

    Raises:
        UserError: a tree without a level of 20 groups.
    """
    draw = random.Random(seed)
    count = len(tree.class_names)
    groups = list(tree.groups(far_level(tree)).values())
    draw.shuffle(groups)
    far: set[str] = set()
    for group in groups:
        if len(far) + len(group) <= FAR_SHARE * count:
            far.update(group)
    families = [[name for name in family if name not in far] for family in tree.groups(FAMILY).values()]
    first = {draw.choice(family) for family in families if family}
    rest = [name for family in families for name in family if name not in first]
    draw.shuffle(rest)
    known = first | set(rest[: max(0, round(KNOWN_SHARE * count) - len(first))])
    parts = _ordered(tree, known), _ordered(tree, set(rest) - known), _ordered(tree, far)
    held = {name for part in parts for name in draw.sample(part, round(HELD_SHARE * len(part)))}
    return Parts(*parts, frozenset(held))


def _ordered(tree: Tree, names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in tree.class_names if name in names)


def write_parts(photographs: Sequence[Photograph], class_names: Sequence[str], parts: Parts, folder: Path) -> None:
    """Write the parts as Parquet files into a folder.

    `photographs`, `tune` and `held` have all class names; `known`, `near` and `far` their own; `held-known`,
    `held-near` and `held-far` are what of those is held out.
    """
    held = [item for item in photographs if item.class_name in parts.held]
    write_parquet(folder / "photographs.parquet", photographs, class_names)
    write_parquet(folder / "tune.parquet", [p for p in photographs if p.class_name not in parts.held], class_names)
    write_parquet(folder / "held.parquet", held, class_names)
    for name, classes in (("known", parts.known), ("near", parts.near), ("far", parts.far)):
        among = frozenset(classes)
        write_parquet(folder / f"{name}.parquet", [p for p in photographs if p.class_name in among], classes)
        write_parquet(folder / f"held-{name}.parquet", [p for p in held if p.class_name in among], classes)
