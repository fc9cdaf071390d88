"""Phase 1, prototypes: where images of a class lie, pulled towards its text as far as a bound on the angle asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.immunity.mixtures import spherical_kmeans
from robustvlm.defenses.immunity.vmf import concentration, mean_resultant
from robustvlm.errors import UserError

_SHARE = 0.125
_LARGEST = 1.0 - 1e-6  # of a resultant: images of one class that all look the same


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Unit prototypes [K, M, D], M a class, and how they came about.

    Attributes:
        alpha: weight of the text in each, [K, M]: 1 where a class has no images.
        kappa: concentration of each class's images, [K]; that of all classes together for one with too few images.
        counts: images of each class, [K].
        xi: largest angle to the text, in radians.
    """

    vectors: Tensor
    alpha: Tensor
    kappa: Tensor
    counts: Tensor
    xi: float


def align(visual: Tensor, text: Tensor, xi: float) -> tuple[Tensor, Tensor]:
    """Return mu = Norm((1 - alpha) v + alpha t) and alpha, with the smallest alpha for which arccos(<mu, t>) <= xi.

    Geodesic antigen alignment (Immuno-VLM, arXiv 2605.30745): the point of the ball around t that is nearest to v, in
    closed form on the great circle through both. With theta the angle between v and t, alpha is 0 for theta <= xi, else
    sin(theta - xi) / (sin(theta - xi) + sin(xi)).

    Args:
        visual, text: unit vectors [..., D]. xi: radians, from 0 (the text) to pi (the images).

    Raises:
        UserError: xi outside 0 to pi.

    Example:
        >>> mu, alpha = align(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.pi / 4)
        >>> mu, alpha
        (tensor([[0.7071, 0.7071]]), tensor([0.5000]))
    """
    if not 0.0 <= xi <= torch.pi:
        raise UserError(f"xi must be an angle between 0 and 180 degrees, got {xi * 180 / torch.pi:g}")
    v, t = visual.double(), text.double()
    theta = angle(v, t)
    away = torch.sin((theta - xi).clamp_min(0.0))
    # Opposite vectors span no great circle: the text alone is then within reach.
    alpha = torch.where(theta > torch.pi - 1e-6, 1.0, away / (away + max(math.sin(xi), 1e-300)))
    alpha = torch.where(theta <= xi, 0.0, alpha)
    mu = F.normalize((1.0 - alpha)[..., None] * v + alpha[..., None] * t, dim=-1)
    return mu.to(visual.dtype), alpha.to(visual.dtype)


def angle(one: Tensor, other: Tensor) -> Tensor:
    """Return the angles in radians between unit vectors [..., D], exact for near and for opposite ones too.

    Example:
        >>> angle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(1.5708)
    """
    return 2.0 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))


def automatic_xi(features: Tensor, labels: Tensor, text: Tensor) -> float:
    """Return an eighth of the median angle between the mean image and the text of a class, in radians.

    Our reading; the paper leaves xi open. The share is relative, so that it does not depend on the gap between the two
    modalities in this model; an eighth was chosen on validation data, where prototypes nearer to the images found
    unknown ones less well in a style that was not learnt from (docs/immunize.md has the figures).

    Example:
        >>> round(automatic_xi(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([[0.0, 1.0]])), 4)
        0.1963
    """
    seen = labels.unique()
    means = torch.stack([F.normalize(features[labels == k].mean(dim=0), dim=0) for k in seen])
    return _SHARE * float(angle(means.double(), text[seen].to(means).double()).median())


def fit_prototypes(
    features: Tensor, labels: Tensor, text: Tensor, *, xi: float | None = None, per_class: int = 1, seed: int = 0
) -> Prototypes:
    """Return the prototypes of all classes; one without images keeps its text (alpha = 1).

    Args:
        features: unit features [N, D] of images. labels: [N], those below 0 are left out.
        text: unit text embeddings [K, D]. xi: radians; None: see `automatic_xi`.
        per_class: M; a class with fewer different images has equal ones.

    Raises:
        UserError: no labelled image, or no prototypes asked for.

    Example:
        >>> found = fit_prototypes(torch.eye(2), torch.tensor([0, 1]), torch.eye(2))
        >>> found.vectors.shape, found.alpha.flatten().tolist()
        (torch.Size([2, 1, 2]), [0.0, 0.0])
    """
    if per_class < 1:
        raise UserError(f"a class needs at least 1 prototype, got {per_class}")
    features, labels = features[labels >= 0], labels[labels >= 0]
    if not len(features):
        raise UserError("there is no image of a known class to make prototypes from: pass --no-images to do without")
    xi = automatic_xi(features, labels, text) if xi is None else xi
    vectors, alphas, lengths = [], [], []
    counts = torch.bincount(labels, minlength=len(text))
    for k in range(len(text)):
        own = features[labels == k]
        centres = spherical_kmeans(own, per_class, seed=seed, stream=str(k)) if len(own) else text[k].expand(1, -1)
        mu, alpha = align(centres, text[k].to(centres).expand_as(centres), xi)
        if not len(own):
            mu, alpha = text[k].expand(per_class, -1).to(features), torch.ones(per_class)
        vectors.append(mu)
        alphas.append(alpha)
        lengths.append(float(own.double().mean(dim=0).norm()) if len(own) else 0.0)
    kappa = _concentrations(lengths, counts, features.shape[1])
    return Prototypes(torch.stack(vectors), torch.stack(alphas), kappa, counts, xi)


def text_prototypes(text: Tensor) -> Prototypes:
    """Return the prototypes of the zero-shot mode: the texts themselves, alpha = 1; there is no kappa (0).

    Example:
        >>> text_prototypes(torch.eye(3)).vectors.shape
        torch.Size([3, 1, 3])
    """
    count = len(text)
    none = torch.zeros(count, dtype=torch.int64)
    return Prototypes(text[:, None, :], torch.ones(count, 1), torch.zeros(count), none, 0.0)


def _concentrations(lengths: list[float], counts: Tensor, dim: int) -> Tensor:
    """Return kappa of each class; classes of one image or none get that of the mean resultant of the others."""
    found = {
        k: min(_LARGEST, mean_resultant(length, int(n)))
        for k, (length, n) in enumerate(zip(lengths, counts, strict=True))
        if n >= 2
    }
    pooled = sum(found.values()) / len(found) if found else 0.0
    return torch.tensor([float(concentration(found.get(k, pooled), dim)) for k in range(len(lengths))])
