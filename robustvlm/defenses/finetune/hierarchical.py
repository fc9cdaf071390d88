"""`hierarchical`: hyperbolic alignment at every level of class trees, with its embedding and its trained texts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from robustvlm.data.classes import fill
from robustvlm.defenses.finetune import hierarchy
from robustvlm.defenses.finetune.hierarchy import HierarchicalOptions, Hierarchy, ImageNodes
from robustvlm.defenses.finetune.hyperbolic import distances, exp0
from robustvlm.defenses.finetune.methods import Materials, Method, frozen
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.models.class_cache import Parts, in_batches
from robustvlm.models.zero_shot import computing, kept_embeddings
from robustvlm.training import Draws, gathered

# From CLIP's features to points of the ball, with constants fitted to the model before training


@dataclass(frozen=True)
class HyperbolicEmbedding:
    """exp_0 of features (before they are scaled to unit norm) times one constant for each modality.

    Our reading: the direction of a point is that of CLIP's feature and its depth the feature's length, which training
    may change. Among texts of equal length, the nearest one in the ball is the one of the largest cosine.

    Attributes:
        curvature: r.
        image_scale, text_scale: factors from features to tangent vectors at the origin.
        temperature: of the softmax over negative distances.
    """

    curvature: float
    image_scale: float
    text_scale: float
    temperature: float

    def images(self, features: Tensor) -> Tensor:
        """Return points [..., D] of image features [..., D]."""
        return exp0(self.image_scale * features.float(), self.curvature)

    def texts(self, tangents: Tensor) -> Tensor:
        """Return points [..., D] of tangent vectors, which are text features times `text_scale`."""
        return exp0(tangents, self.curvature)


def fit_embedding(
    images: Tensor, texts: Tensor, logit_scale: float, options: HierarchicalOptions
) -> HyperbolicEmbedding:
    """Return the embedding that puts features at the depth the options ask for, on average.

    Without a temperature in the options, the one is taken at which the two best logits of an image, negative distances
    over it, are as far apart as those of the zero-shot classifier, on average over the images.

    Args:
        images: features [B, D] of some training images.
        texts: features [K, D] of the classes.
        logit_scale: of the model.

    Raises:
        UserError: features of length 0, or images that are equally near to two classes, all of them.
    """
    tangent = options.depth / options.curvature**0.5
    scales = [tangent / float(rows.float().norm(dim=-1).mean()) if rows.any() else 0.0 for rows in (images, texts)]
    if not all(scales):
        raise UserError("the model's features are all zero: there is nothing to embed")
    embedding = HyperbolicEmbedding(options.curvature, scales[0], scales[1], options.temperature or 1.0)
    if options.temperature is not None:
        return embedding
    directions = normalize(texts.float(), dim=-1)
    apart = distances(embedding.images(images), embedding.texts(tangent * directions), options.curvature)
    cosines = normalize(images.float(), dim=-1) @ directions.T
    ratio = _gap(-apart) / (logit_scale * _gap(cosines)) if _gap(cosines) > 0 else 0.0
    if not ratio > 0:
        raise UserError("the model tells no two classes apart: there is no temperature to fit, so pass one")
    return HyperbolicEmbedding(options.curvature, scales[0], scales[1], ratio)


def _gap(logits: Tensor) -> float:
    """Return the mean difference of the two largest logits of a row."""
    best = logits.topk(2, dim=1).values
    return float((best[:, 0] - best[:, 1]).mean())


# Text embeddings that are trained through the text projection alone: the text tower runs once, before training

_TEXTS_PER_PASS = 256
_TRIED = 8
_TOLERANCE = 1e-4


class ProjectedTexts(nn.Module):
    """Embeddings [N, D] of named things as a function of the text projection: the mean of their prompts' features.

    What comes out of the text tower is kept; a call costs one matrix product. Works for text towers that end in a
    linear map called `text_projection`, or `proj` for those of transformers, which is checked on a few of the texts;
    for others (`trainable` is False) the embeddings are constants.

    Our reading: the mean is taken before texts are scaled to unit norm, which differs from the usual zero-shot
    embedding only as far as the lengths of a name's prompts differ.

    Args:
        vlm: the model; its projection is used where it stands, so what an optimiser does to it counts.
        names: put in place of the {} of every template.

    Example:
        >>> from robustvlm.models import load_model
        >>> texts = ProjectedTexts(load_model("tiny"), ["apple", "dog"], ["{}", "a {}"])
        >>> texts().shape, texts.trainable
        (torch.Size([2, 192]), True)
    """

    features: Tensor

    def __init__(self, vlm: VLM, names: Sequence[str], templates: Sequence[str]) -> None:
        super().__init__()
        # A list keeps the model out of this module's own parameters: they belong to the model.
        self._found = _projections(vlm)
        self.trainable = len(self._found) == 1 and _is_linear(self._found[0], vlm, names[:_TRIED], templates[:1])
        below = self._found[0] if self.trainable else None
        self.register_buffer("features", _kept_means(vlm, names, templates, below=below), persistent=False)

    def forward(self) -> Tensor:
        """Return the embeddings [N, D] under the present projection, differentiable in it."""
        return _apply(self._found[0], self.features) if self.trainable else self.features

    def projection(self) -> list[nn.Parameter]:
        """Return the parameters of the projection, none where the embeddings are constants."""
        if not self.trainable:
            return []
        owner, name = self._found[0]
        found = getattr(owner, name)
        return [found] if isinstance(found, nn.Parameter) else list(found.parameters())


_Place: TypeAlias = tuple[nn.Module, str]


def _kept_means(vlm: VLM, names: Sequence[str], templates: Sequence[str], *, below: _Place | None) -> Tensor:
    """Return mean features [N, D] of each name's prompts, those below a projection if one is given; they are kept."""
    of = partial(_mean_prompts, vlm, templates=templates, below=below)
    kind = "means of prompts" if below is None else "means of prompts below the projection"
    with computing(vlm):
        return kept_embeddings(vlm, names, templates, of, partial(of, names), kind=kind)


def _mean_prompts(
    vlm: VLM, names: Sequence[str], parts: Parts | None = None, *, templates: Sequence[str], below: _Place | None
) -> Tensor:
    prompts = [fill(template, name) for name in names for template in templates]
    with nullcontext() if below is None else _without(*below):
        rows = in_batches(prompts, _TEXTS_PER_PASS, lambda texts: vlm.embed_text(texts).float(), parts=parts)
    return rows.view(len(names), len(templates), -1).mean(dim=1)


def _projections(vlm: VLM) -> list[_Place]:
    """Return where text projections stand: (module, attribute)."""
    found = []
    for path, module in vlm.named_modules():
        part = getattr(module, "text_projection", None)
        if isinstance(part, (nn.Linear, nn.Parameter)):
            found.append((module, "text_projection"))
        elif path.split(".")[-1] == "text" and isinstance(getattr(module, "proj", None), nn.Linear):
            found.append((module, "proj"))
    return found


@contextmanager
def _without(owner: nn.Module, name: str) -> Iterator[None]:
    """Take a projection out for a while; open_clip leaves it out where there is none."""
    part = getattr(owner, name)
    setattr(owner, name, nn.Identity() if name == "proj" else None)
    try:
        yield
    finally:
        setattr(owner, name, part)


def _apply(place: _Place, features: Tensor) -> Tensor:
    part = getattr(*place)
    # Under autocast the product would have the digits of bfloat16, which move a tangent farther than `eps_text` does.
    with torch.autocast(features.device.type, enabled=False):
        projected: Tensor = features @ part if isinstance(part, nn.Parameter) else part(features)
    return projected


def _is_linear(place: _Place, vlm: VLM, names: Sequence[str], templates: Sequence[str]) -> bool:
    """Tell whether the linear map is all that stands between what is below it and the embeddings."""
    part = getattr(*place)
    width = part.shape[0] if isinstance(part, nn.Parameter) else part.in_features
    with computing(vlm):
        features, embedded = (_mean_prompts(vlm, names, templates=templates, below=at) for at in (place, None))
        if features.shape[1] != width:
            return False
        error = (_apply(place, features) - embedded).norm() / embedded.norm()
    return bool(error < _TOLERANCE)


# `hierarchical`: hyperbolic alignment at every level of class trees (arXiv 2604.18867)

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
            raise UserError(
                f"the method 'hierarchical' needs a class tree: pass {setting('tree', 'FILE')}, or use tecoa"
            )
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
            near = hierarchy.vicinity(apart, images, tree, asked, options.vicinity_radius)
            totals["vicinity"] = totals["vicinity"] + near
            if not options.leaf_only:
                totals["norm order"] = totals["norm order"] + hierarchy.norm_order(images, own, tree, options.norm_gap)
        return totals

    def _seen(self, points: Tensor, labels: Tensor, tangents: Tensor, weights: list[Tensor]) -> Iterator[_Seen]:
        """Yield for every tree the distances, the image rows, the texts of its nodes, itself, and its level weights."""
        r = self.embedding.curvature
        for tree, level in zip(self.trees, weights, strict=True):
            images, own = hierarchy.image_nodes(points, labels, tree, r), self._node_texts(tangents, tree)
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
        return hierarchy.image_nodes(points, classes, tree, self.embedding.curvature).points

    def _alignment(self, apart: Tensor, images: ImageNodes, own: Tensor, tree: Hierarchy, weights: Tensor) -> Tensor:
        del own
        beside = self.options.negatives and not self.options.leaf_only
        return hierarchy.alignment(apart, images, tree, weights, self.embedding.temperature, beside=beside)

    def _level_weights(self) -> list[list[Tensor]]:
        """Return, for every perturbation to be made, the level weights of every tree."""
        device = self.student.device
        full = [hierarchy.level_weights(tree.levels).to(device) for tree in self.trees]
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
        means = means[0] * hierarchy.level_weights(len(means)).to(means)
    return rows * (means[level] / lengths)[:, None]


def _only(level: int, weights: Tensor) -> Tensor:
    """Return the weights with those of all other levels set to 0."""
    return torch.where(torch.arange(len(weights), device=weights.device) == level, weights, 0.0)
