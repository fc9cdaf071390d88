"""What scores that model features by Gaussians share: class means, and a covariance that can be inverted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustvlm.errors import UserError, nearest

Estimator = Literal["empirical", "ledoit-wolf", "ridge"]
ESTIMATORS = ("empirical", "ledoit-wolf", "ridge")

# Directions with less than this share of the largest variance hold rounding only (Moore-Penrose's usual cut).
_NO_VARIANCE = 1e-12


@dataclass(frozen=True, eq=False)
class ClassGaussians:
    """Gaussians of one covariance around the means of the classes that were seen.

    Args:
        classes: labels of those classes [C], ascending; counts: images of each [C].
        means: [C, D]; root: W [D, R] with W W^T the inverse of the covariance.
        log_determinant: of the covariance, over the directions that have any variance.
    """

    classes: Tensor
    counts: Tensor
    means: Tensor
    root: Tensor
    log_determinant: float

    def distances(self, features: Tensor) -> Tensor:
        """Return squared Mahalanobis distances [N, C] of features [N, D] to the class means."""
        root = self.root.to(features)
        return squared_distances(features @ root, self.means.to(features) @ root)


def fit_gaussians(features: Tensor, labels: Tensor, estimator: Estimator = "ledoit-wolf") -> ClassGaussians:
    """Return Gaussians of one covariance, computed in float64 and given back in the type of the features.

    Estimators of the covariance of the features around their class means:

    * "empirical": the mean of outer products; directions without variance are left out of distances.
    * "ledoit-wolf": shrunk towards a multiple of the identity by the amount that minimises the expected squared error
      (Ledoit and Wolf 2004, J. Multivariate Analysis 88).
    * "ridge": S + tr(S) / (N - 1) I, the empirical Bayes ridge of Kubokawa and Srivastava 2008 that GDA uses, scaled
      so that it tends to S (theirs is D / (N - 1) times its inverse).

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> found = fit_gaussians(features, torch.tensor([0, 0, 1, 1]), "empirical")
        >>> found.distances(torch.tensor([[2.0, 0.0]])).round()
        tensor([[ 0., 16.]])
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"unknown covariance estimator '{estimator}': {nearest(estimator, ESTIMATORS)}")
    wide = features.detach().cpu().double()
    classes, index, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    means = class_means(wide, index, len(classes))
    covariance = shrunk(wide - means[index], estimator)
    root, log_determinant = inverse_root(covariance)
    return ClassGaussians(classes, counts, means.to(features), root.to(features), log_determinant)


def class_means(features: Tensor, index: Tensor, n_classes: int) -> Tensor:
    """Return the mean feature of each class [C, D]; `index` [N] counts classes from 0, each of which occurs."""
    sums = features.new_zeros(n_classes, features.shape[1]).index_add_(0, index, features)
    return sums / index.bincount(minlength=n_classes)[:, None]


def shrunk(centred: Tensor, estimator: Estimator) -> Tensor:
    """Return a covariance [D, D] of rows [N, D] whose mean is zero."""
    n, dim = centred.shape
    empirical = centred.T @ centred / n
    if estimator == "empirical":
        return empirical
    eye = torch.eye(dim, dtype=centred.dtype)
    if estimator == "ridge":
        return empirical + empirical.trace() / max(1, n - 1) * eye
    share = ledoit_wolf_shrinkage(centred)
    return (1 - share) * empirical + share * (empirical.trace() / dim) * eye


def ledoit_wolf_shrinkage(centred: Tensor) -> float:
    """Return the weight in [0, 1] of the identity's multiple (Ledoit and Wolf 2004, section 3.3)."""
    n, dim = centred.shape
    empirical = centred.T @ centred / n
    mean = empirical.trace() / dim
    spread = (empirical.square().sum() - dim * mean.square()) / dim
    # sum_i ||x_i x_i^T - S||^2 / n^2, written with fourth moments so that no [N, D, D] array is needed.
    error = (centred.square().sum(dim=1).square().sum() / n - empirical.square().sum()) / (n * dim)
    if spread <= 0:
        return 1.0
    return float((error / spread).clamp(0.0, 1.0))


def inverse_root(covariance: Tensor) -> tuple[Tensor, float]:
    """Return W [D, R] with W W^T the pseudo-inverse of a covariance [D, D], and the log of its non-zero determinant.

    Raises UserError when there is no variance at all, as of a single image.
    """
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > _NO_VARIANCE * values[-1].clamp_min(0.0)
    if not bool(keep.any()) or float(values[-1]) <= 0.0:
        raise UserError("the features do not vary within their classes: fit to several different images of each class")
    return vectors[:, keep] / values[keep].sqrt(), float(values[keep].log().sum())


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """Return squared Euclidean distances [N, C] of points [N, R] to centres [C, R]."""
    products = points @ centres.T
    lengths = points.square().sum(dim=1)[:, None] + centres.square().sum(dim=1)[None, :]
    return (lengths - 2 * products).clamp_min(0.0)
