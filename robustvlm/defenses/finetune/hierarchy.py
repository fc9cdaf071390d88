"""A class tree as index arrays, and the hierarchical loss over it (arXiv 2604.18867)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustvlm.data.trees import Tree
from robustvlm.defenses.finetune.hyperbolic import check_curvature, hyp_avg
from robustvlm.errors import UserError

# A class tree as index arrays, and the image embedding of every node of it that a batch shows


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


# The hierarchical loss (arXiv 2604.18867): alignment at every level of a tree, vicinity, and the order of norms

_MOST_EPS_TEXT = 10.0  # far beyond the depth of any point; float32 overflows much later


@dataclass(frozen=True, kw_only=True)
class HierarchicalOptions:
    """Every choice of the hierarchical method; each term can be switched off.

    Args:
        curvature: r of the ball.
        depth: sqrt(r) times the mean length of tangent vectors at the start, of images and of class texts; the paper
            does not say how CLIP's features enter the ball (our reading: scaled by one constant for each modality).
        shared_depth: the texts of one level lie at one depth, their mean, so that the nearest is the one of the largest
            cosine, by which the deployed model tells classes apart (our reading); off: each at its own length's depth.
        ordered_depths: with `shared_depth`, level l lies at w_l times the depth of the classes: parents are nearer
            to the origin than children from the start; off: at the mean length of its own texts.
        temperature: of the softmax over negative distances; None: such that the two best logits of an image are as far
            apart as the base model's own (our reading).
        negatives: negative-set augmentation, the non-kin nodes of the levels above and below in each denominator.
        leaf_only: no levels above the classes, in the attack and in the loss.
        per_level: one perturbation for each level instead of a universal one, at as many times the cost.
        eps_text: radius of the perturbation of text embeddings (Linf, on tangent vectors); 0: none.
        vicinity: weight (lambda_1) of the term that draws images to within `vicinity_radius` of their texts.
        norm_order: weight (lambda_2) of the terms that keep parents nearer to the origin than children, by `norm_gap`.
        train_texts: train the text projection along with the vision tower; None: unless the tower is trained through
            adapters (LoRA, SSF), whose learning rate is far too high for a matrix that all texts pass through.
        name_superclasses: superclass texts come from prompts of their names; off: they are the midpoints of their
            classes' texts, level by level, for text towers that do not know the names (our addition).

    Raises:
        UserError: values out of range.

    Example:
        >>> HierarchicalOptions(curvature=0.5).negatives
        True
    """

    curvature: float = 1.0
    depth: float = 1.0
    shared_depth: bool = True
    ordered_depths: bool = False
    temperature: float | None = None
    negatives: bool = True
    leaf_only: bool = False
    per_level: bool = False
    eps_text: float = 2e-4
    vicinity: float = 0.1
    vicinity_radius: float = 1.0
    norm_order: float = 0.1
    norm_gap: float = 0.01
    train_texts: bool | None = None
    name_superclasses: bool = True

    def __post_init__(self) -> None:
        check_curvature(self.curvature)
        for name, value in (("depth", self.depth), ("temperature", self.temperature)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"the {name} must be a positive number, got {value}")
        for name in ("eps_text", "vicinity", "vicinity_radius", "norm_order", "norm_gap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.eps_text > _MOST_EPS_TEXT:
            raise UserError(f"eps_text is a radius on tangent vectors, at most {_MOST_EPS_TEXT:g}, got {self.eps_text}")
        if self.leaf_only and self.per_level:
            raise UserError("leaf_only has one level, so there is nothing for per_level: choose one of the two")


def level_weights(levels: int) -> Tensor:
    """Return w_l = 1 - l / (L + 1) for the levels 0 to L.

    Example:
        >>> level_weights(4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500])
    """
    return 1 - torch.arange(levels) / levels


def alignment(
    apart: Tensor, images: ImageNodes, hierarchy: Hierarchy, weights: Tensor, temperature: float, *, beside: bool
) -> Tensor:
    """Return the HITA loss, the sum over levels of w_l CE_l, a scalar.

    CE_l is the mean, over the rows of level l that the batch shows, of the cross-entropy of a softmax over negative
    distances (`apart` [R, N] over `temperature`), from a row to its own node's text against those of its negatives,
    with `beside` also of the levels above and below.
    """
    allowed = (hierarchy.near if beside else hierarchy.same)[images.node]
    logits = torch.where(allowed, -apart / temperature, -torch.inf)
    own = logits.gather(1, images.node[:, None]).squeeze(1)
    return (_row_weights(images, hierarchy, weights) * (logits.logsumexp(1) - own)).sum()


def vicinity(apart: Tensor, images: ImageNodes, hierarchy: Hierarchy, weights: Tensor, radius: float) -> Tensor:
    """Return L_vic: max(0, distance to the own text - radius), a mean within each level, summed with `weights`."""
    own = apart.gather(1, images.node[:, None]).squeeze(1)
    return (_row_weights(images, hierarchy, weights) * (own - radius).clamp_min(0)).sum()


def norm_order(images: ImageNodes, texts: Tensor, hierarchy: Hierarchy, gap: float) -> Tensor:
    """Return L_gap of labels plus that within classes: max(0, |parent| - |child| + gap), a mean over the pairs.

    Pairs are those of nodes with different names: on labels of their text embeddings [N, D], within classes of the
    image rows that the batch shows.
    """
    labels = _gap(texts.norm(dim=-1), hierarchy.parent_of, ~hierarchy.alike, gap)
    rows = images.shown & ~hierarchy.alike[images.node]
    return labels + _gap(images.points.norm(dim=-1), images.parent, rows, gap)


def _gap(norms: Tensor, parent: Tensor, pairs: Tensor, gap: float) -> Tensor:
    excess = (norms[parent] - norms + gap).clamp_min(0)
    return (excess * pairs).sum() / pairs.sum().clamp_min(1)


def _row_weights(images: ImageNodes, hierarchy: Hierarchy, weights: Tensor) -> Tensor:
    """Return what each row counts: w_l divided by the number of rows that level l shows, 0 for rows not shown; [R]."""
    level = hierarchy.level_of[images.node]
    shown = images.shown.to(weights.dtype)
    counts = torch.zeros_like(weights).index_add(0, level, shown)
    return weights[level] * shown / counts[level].clamp_min(1)
