"""`hierarchical`: hyperbolic alignment at every level of class trees (arXiv 2604.18867)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TypeAlias

import torch
from torch import Tensor, nn

from robustvlm.defenses.finetune.embedding import fit_embedding
from robustvlm.defenses.finetune.hierarchy import Hierarchy, ImageNodes, image_nodes
from robustvlm.defenses.finetune.hita import (
    HierarchicalOptions,
    alignment,
    level_weights,
    norm_order,
    vicinity,
)
from robustvlm.defenses.finetune.hyperbolic import distances
from robustvlm.defenses.finetune.inner_attack import frozen
from robustvlm.defenses.finetune.methods.base import Materials, Method
from robustvlm.defenses.finetune.texts import ProjectedTexts
from robustvlm.errors import UserError
from robustvlm.training import Draws, gathered

_Seen: TypeAlias = tuple[Tensor, ImageNodes, Tensor, Hierarchy, Tensor]


class Hierarchical(Method):
    """L = L' + lambda_1 L_vic + lambda_2 (L_gap of labels + L_gap within classes), summed over the trees of a forest.

    L' is raised by one perturbation of each image (and one of the text embeddings) for all levels and trees at once,
    and L lowered there. Averages over a superclass's children are taken over the images of all ranks; with accumulation
    over those of one part.
    """

    def __init__(self, materials: Materials, options: HierarchicalOptions | None = None) -> None:
        super().__init__(materials)
        if materials.forest is None:
            raise UserError("the method 'hierarchical' needs a class tree: pass --tree FILE, or use tecoa")
        self.options = options or HierarchicalOptions()
        names = list(dict.fromkeys(name for tree in materials.forest for path in tree.paths for name in path))
        names = [*materials.class_names, *(name for name in names if name not in set(materials.class_names))]
        device = materials.student.device
        self._train_texts = self.options.train_texts
        if self._train_texts is None:
            self._train_texts = not materials.adapters
        self.texts = ProjectedTexts(self.student, names, materials.templates).to(device)
        self.trees = [Hierarchy(tree, names).to(device) for tree in materials.forest]
        with torch.no_grad():
            images = self.student.embed_image(materials.calibration.to(device))
            classes = self.texts()[: len(materials.class_names)]
        self.embedding = fit_embedding(images, classes, self.student.logit_scale, self.options)

    def also_trained(self) -> list[nn.Parameter]:
        return self.texts.projection() if self._train_texts else []

    def settings(self) -> dict[str, object]:
        texts = "trained" if self.also_trained() else "constant" if self._train_texts else "frozen"
        return {"options": asdict(self.options), "embedding": asdict(self.embedding), "texts": texts}

    def measures(self) -> dict[str, float]:
        """Return the mean norm of the first tree's text embeddings by level: parents should be nearer to the origin."""
        tree = self.trees[0]
        with torch.no_grad():
            norms = self._node_texts(self._tangents(), tree).norm(dim=-1)
        return {
            f"text norm, level {level}": float(norms[tree.level_of == level].mean()) for level in range(tree.levels)
        }

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        labels, tangents = gathered(labels), self._tangents()
        found: list[dict[str, Tensor]] = []
        for number, weights in enumerate(self._level_weights()):
            adversarial, delta = self._perturbed(pixels, labels, tangents.detach(), draws, weights, str(number))
            perturbed = tangents if delta is None else tangents + delta
            found.append(self._losses(self._points(adversarial), labels, perturbed, weights))
        # With one perturbation for each level, the constraints are asked of the images perturbed for the classes.
        terms = {**found[0], "alignment": torch.stack([losses["alignment"] for losses in found]).sum()}
        loss = terms["alignment"] + self.options.vicinity * terms["vicinity"]
        return {"loss": loss + self.options.norm_order * terms["norm order"], **terms}

    def _perturbed(
        self, pixels: Tensor, labels: Tensor, tangents: Tensor, draws: Draws, weights: list[Tensor], name: str
    ) -> tuple[Tensor, Tensor | None]:
        """Return the images and the perturbation of the texts that raise the alignment loss."""

        def objective(x: Tensor, delta: Tensor | None) -> Tensor:
            seen = self._seen(self._points(x), labels, tangents if delta is None else tangents + delta, weights)
            return torch.stack([self._alignment(*tree) for tree in seen]).sum()

        with frozen(self.student):
            return self.attack(objective, pixels, draws, texts=tangents, eps_text=self.options.eps_text, name=name)

    def _losses(self, points: Tensor, labels: Tensor, tangents: Tensor, weights: list[Tensor]) -> dict[str, Tensor]:
        options = self.options
        totals = {name: points.new_zeros(()) for name in ("alignment", "vicinity", "norm order")}
        for seen in self._seen(points, labels, tangents, weights):
            totals["alignment"] = totals["alignment"] + self._alignment(*seen)
            apart, images, own, tree, level = seen
            asked = (level > 0).to(level) if options.leaf_only else torch.ones_like(level)
            near = vicinity(apart, images, tree, asked, options.vicinity_radius)
            totals["vicinity"] = totals["vicinity"] + near
            if not options.leaf_only:
                totals["norm order"] = totals["norm order"] + norm_order(images, own, tree, options.norm_gap)
        return totals

    def _seen(self, points: Tensor, labels: Tensor, tangents: Tensor, weights: list[Tensor]) -> Iterator[_Seen]:
        """Yield for every tree the distances, the image rows, the texts of its nodes, itself, and its level weights."""
        r = self.embedding.curvature
        for tree, level in zip(self.trees, weights, strict=True):
            images, own = image_nodes(points, labels, tree, r), self._node_texts(tangents, tree)
            yield distances(images.points, own, r), images, own, tree, level

    def _node_texts(self, tangents: Tensor, tree: Hierarchy) -> Tensor:
        """Return the text embeddings of a tree's nodes, [N, D], from tangent vectors of all names."""
        classes = torch.arange(tree.sizes[0], device=tangents.device)
        nodes = tree.text_of if self.options.name_superclasses else classes
        rows = tangents[nodes]
        if self.options.shared_depth:
            rows = _levelled(rows, tree.level_of[: len(rows)], ordered=self.options.ordered_depths)
        points = self.embedding.texts(rows)
        if self.options.name_superclasses:
            return points
        # Averages over texts go up a tree as those over images do, with every class shown once.
        return image_nodes(points, classes, tree, self.embedding.curvature).points

    def _alignment(self, apart: Tensor, images: ImageNodes, own: Tensor, tree: Hierarchy, weights: Tensor) -> Tensor:
        del own
        beside = self.options.negatives and not self.options.leaf_only
        return alignment(apart, images, tree, weights, self.embedding.temperature, beside=beside)

    def _level_weights(self) -> list[list[Tensor]]:
        """Return, for every perturbation to be made, the level weights of every tree."""
        device = self.student.device
        full = [level_weights(tree.levels).to(device) for tree in self.trees]
        if self.options.leaf_only:
            return [[_only(0, weights) for weights in full]]
        if not self.options.per_level:
            return [full]
        # The root has no rival, so that there is nothing to perturb an image for at its level.
        return [[_only(level, weights) for weights in full] for level in range(max(map(len, full)) - 1)]

    def _points(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of the images of all ranks."""
        return gathered(self.embedding.images(self.student.embed_image(pixels)))

    def _tangents(self) -> Tensor:
        return self.embedding.text_scale * self.texts().float()


def _levelled(rows: Tensor, level: Tensor, *, ordered: bool) -> Tensor:
    """Return rows [N, D] with the mean length of their level in place of their own, or w_l times that of level 0."""
    lengths = rows.norm(dim=-1).clamp_min(1e-12)
    totals = lengths.new_zeros(int(level.max()) + 1)
    means = totals.index_add(0, level, lengths) / totals.index_add(0, level, torch.ones_like(lengths))
    if ordered:
        means = means[0] * level_weights(len(means)).to(means)
    return rows * (means[level] / lengths)[:, None]


def _only(level: int, weights: Tensor) -> Tensor:
    """Return the weights with those of all other levels set to 0."""
    return torch.where(torch.arange(len(weights), device=weights.device) == level, weights, 0.0)
