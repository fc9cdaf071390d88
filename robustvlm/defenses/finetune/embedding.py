"""From CLIP's features to points of the ball, with constants fitted to the model before training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from robustvlm.defenses.finetune.hita import HierarchicalOptions
from robustvlm.defenses.finetune.hyperbolic import distances, exp0
from robustvlm.errors import UserError


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
