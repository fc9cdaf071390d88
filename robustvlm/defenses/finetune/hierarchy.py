"""A class tree as index arrays, and the image embedding of every node of it that a batch shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustvlm.data.taxonomy import Tree
from robustvlm.defenses.finetune.hyperbolic import hyp_avg


class Hierarchy(nn.Module):
    """The nodes of one tree, numbered level by level: the K classes first, the root last.

    Two nodes are kin when some class has both names on its path: what stands above or below is no rival. A negative of
    a node is any other that is not kin to it and lies on its level, or (negative-set augmentation) one above or below.

    Args:
        tree: its leaves are the classes.
        texts: the names of all text embeddings; the tree's nodes are found among them.

    Attributes:
        sizes: number of nodes of each level.
        text_of: index into `texts` of each node, int64 [N].
        level_of: level of each node, int64 [N].
        parent_of: node above each node, the root's its own, int64 [N].
        alike: whether a node has its parent's name (a class less deep than others repeats its parent), bool [N].
        node_of_class: node above each class at each level, int64 [levels, K].
        near, same: negatives (columns) of each node (row), with and without the levels beside its own, and the node
            itself, as the denominator of a softmax wants it; bool [N, N].

    Example:
        >>> tree = Tree.from_chains([("cat", "pet", "all"), ("dog", "pet", "all"), ("elk", "wild", "all")])
        >>> h = Hierarchy(tree, ["cat", "dog", "elk", "pet", "wild", "all"])
        >>> h.sizes, h.near[0].tolist()  # cat against itself, dog, elk and, from the level above, wild
        ((3, 2, 1), [True, True, True, False, True, False])
    """

    text_of: Tensor
    level_of: Tensor
    parent_of: Tensor
    alike: Tensor
    node_of_class: Tensor
    near: Tensor
    same: Tensor

    def __init__(self, tree: Tree, texts: Sequence[str]) -> None:
        super().__init__()
        levels = [tree.level_names(level) for level in range(tree.levels)]
        self.sizes = tuple(len(found) for found in levels)
        level_of = torch.repeat_interleave(torch.arange(len(levels)), torch.tensor(self.sizes))
        names = [name for found in levels for name in found]
        place = {name: i for i, name in enumerate(texts)}
        text_of = torch.tensor([place[name] for name in names])
        starts = torch.tensor([sum(self.sizes[:level]) for level in range(len(levels))])
        node_of_class = torch.tensor([tree.superclass_labels(level) for level in range(tree.levels)]) + starts[:, None]
        parent_of = torch.arange(len(names))
        parent_of[node_of_class[:-1]] = node_of_class[1:]
        rival = ~_kin(tree, names) | torch.eye(len(names), dtype=torch.bool)
        apart = (level_of[:, None] - level_of[None, :]).abs()
        for name, value in (
            ("text_of", text_of),
            ("level_of", level_of),
            ("parent_of", parent_of),
            ("alike", text_of == text_of[parent_of]),
            ("node_of_class", node_of_class),
            ("near", rival & (apart <= 1)),
            ("same", rival & (apart == 0)),
        ):
            self.register_buffer(name, value, persistent=False)

    @property
    def levels(self) -> int:
        """Number of levels, L + 1 in the paper's notation."""
        return len(self.sizes)


def _kin(tree: Tree, names: Sequence[str]) -> Tensor:
    """Return whether two nodes stand on one path, by name; bool [N, N]."""
    place: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        place.setdefault(name, []).append(i)
    on_path = torch.zeros(len(tree.paths), len(names))
    for k, path in enumerate(tree.paths):
        on_path[k, [i for name in path for i in place[name]]] = 1.0
    return on_path.T @ on_path > 0


@dataclass(frozen=True)
class ImageNodes:
    """Image embeddings: the images of a batch, then one row for every node above the classes, level by level.

    Attributes:
        points: in the ball, [R, D] with R = B + nodes above the classes; the origin where `shown` is not set.
        node: the node of each row, int64 [R].
        shown: whether the batch has an image of it, bool [R].
        parent: the row of the parent, the root's its own, int64 [R].
    """

    points: Tensor
    node: Tensor
    shown: Tensor
    parent: Tensor


def image_nodes(points: Tensor, labels: Tensor, hierarchy: Hierarchy, r: float) -> ImageNodes:
    """Return image embeddings of all nodes from those of the images: points [B, D] of classes `labels` [B].

    A superclass's is the Einstein midpoint of its children's (HypAvg): at level 1 of the images of its classes, above
    of the nodes one level below, as many of them as the batch shows.
    """
    classes, above = hierarchy.sizes[0], sum(hierarchy.sizes[1:])
    node = torch.cat([labels, torch.arange(classes, classes + above, device=labels.device)])
    parent = hierarchy.parent_of[node] - classes + len(points)
    rows, shown, start = [points], [torch.ones_like(labels, dtype=torch.bool)], 0
    for size in hierarchy.sizes[1:]:
        end = start + len(rows[-1])
        slots = torch.arange(end, end + size, device=labels.device)
        members = (parent[start:end] == slots[:, None]) & shown[-1]
        rows.append(hyp_avg(rows[-1], members, r))
        shown.append(members.any(-1))
        start = end
    return ImageNodes(torch.cat(rows), node, torch.cat(shown), parent)
