"""Scores from where features of known images lie: nearest neighbours, Gaussians, and the space that they span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.detect.base import FittedDetector, Head, check_known
from robustvlm.detect.logits import free_energy
from robustvlm.errors import UserError, nearest

# Distance to the k-th nearest image of the known classes

# Cosines to the bank are made for so many images at a time that they take 64 MB at most.
_CHUNK = 2**24
# Squared distances below rounding: keeps the root's gradient finite at an image of the bank.
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class KNN(FittedDetector):
    """Minus the Euclidean distance of the unit feature to its k-th nearest one among the images fitted to.

    No labels are used, and no assumption on the form of the classes.

    Args:
        k: which neighbour. The paper takes 50 of CIFAR-10's 50,000 images and 10 of 1% of ImageNet; the default suits
            some tens of images per class.

    Source: Sun et al. 2022, arXiv 2204.06507.

    Example:
        >>> detector = KNN(k=1).fit_features(torch.eye(2), torch.tensor([0, 1]))
        >>> detector.score(torch.tensor([[0.6, 0.8]]))
        tensor([-0.6325])
    """

    k: int = 10
    bank: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"k must be at least 1 neighbour, got {self.k}")

    def fit_features(self, features: Tensor, labels: Tensor) -> KNN:
        check_known(features, labels)
        if len(features) < self.k:
            raise UserError(f"{self.k} neighbours were asked for among {len(features)} images: pass a smaller k")
        return replace(self, bank=F.normalize(features.detach(), dim=1))

    def score(self, features: Tensor) -> Tensor:
        bank = self.learnt(self.bank).to(features)
        rows = max(1, _CHUNK // len(bank))
        return torch.cat([self._score(part, bank) for part in F.normalize(features, dim=1).split(rows)])

    def _score(self, features: Tensor, bank: Tensor) -> Tensor:
        cosine = (features @ bank.T).topk(self.k, dim=1).values[:, -1]
        return -(2 - 2 * cosine).clamp_min(_TINY).sqrt()


# What scores that model features by Gaussians share: class means, and a covariance that can be inverted

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


# Mahalanobis distance to the nearest class: for unknown images, and for adversarial ones


@dataclass(frozen=True, eq=False)
class Mahalanobis(FittedDetector):
    """Minus the smallest squared Mahalanobis distance to a class mean, under one covariance for all classes.

    The same score is used against unknown classes and against adversarial images, which leave the classes' clouds too
    (not those whose maker knows the score: measure that with `robustvlm detect --under-attack`).

    Args:
        covariance: how the covariance is estimated (see `fit_gaussians`). The paper's is "empirical"; the default
            shrinks it, which matters where there are fewer than about ten images per dimension.

    Source: Lee et al. 2018, arXiv 1807.03888, equation 2, on the last layer's features.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> detector = Mahalanobis("empirical").fit_features(features, torch.tensor([0, 0, 1, 1]))
        >>> detector.score(torch.tensor([[3.0, 0.0], [2.0, 2.0]])).round()
        tensor([-2., -8.])
    """

    covariance: Estimator = "ledoit-wolf"
    gaussians: ClassGaussians | None = field(default=None, repr=False)

    def fit_features(self, features: Tensor, labels: Tensor) -> Mahalanobis:
        check_known(features, labels)
        return replace(self, gaussians=fit_gaussians(features, labels, self.covariance))

    def score(self, features: Tensor) -> Tensor:
        return -self.learnt(self.gaussians).distances(features).amin(dim=1)


# Virtual-logit matching: the energy, less what lies outside the space that known features span

# What is left of float32 features outside a space that holds them all, as a share of their length.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Residual:
    """The directions that known features leave out, [D, D - dim], and the factor that makes a logit of their length."""

    basis: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class ViM(FittedDetector):
    """Energy of the logits minus the virtual logit: alpha times the length of the feature outside the principal space.

    The principal space holds the `dim` leading directions of the second moments around the origin, which is the point
    where the zero-shot head, having no bias, gives equal logits (our reading for CLIP of the paper's change of origin).

    Args:
        head: the zero-shot head.
        dim: dimensions of the principal space; by default half of the features', about the paper's share.

    Source: Wang et al. 2022, arXiv 2203.10807.

    Example:
        >>> features = torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, -0.1], [1.0, 1.0, 0.1]])
        >>> detector = ViM(Head(torch.eye(3)[:2], 1.0), dim=2).fit_features(features, torch.tensor([0, 1, 0]))
        >>> near, far = detector.score(torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.0, 1.0]]))
        >>> bool(near > far)
        True
    """

    head: Head
    dim: int | None = None
    residual: Residual | None = field(default=None, repr=False)

    def fit_features(self, features: Tensor, labels: Tensor) -> ViM:
        check_known(features, labels)
        wide = features.detach().cpu().double()
        size = wide.shape[1]
        dim = size // 2 if self.dim is None else self.dim
        if not 1 <= dim < size:
            raise UserError(f"ViM needs a principal space of 1 to {size - 1} dimensions, got {dim}")
        # Ascending eigenvalues: the first vectors are those that known features leave out.
        basis = torch.linalg.eigh(wide.T @ wide / len(wide)).eigenvectors[:, : size - dim]
        lengths = (wide @ basis).norm(dim=1)
        largest = self.head.logits(wide).amax(dim=1)
        if float(lengths.mean()) <= _ROUNDING * float(wide.norm(dim=1).mean()):
            raise UserError(
                f"the {len(wide)} features to fit lie in at most {dim} dimensions, all of which ViM takes for the "
                "principal space: pass more images, or a smaller dim"
            )
        return replace(self, residual=Residual(basis.to(features), float(largest.mean() / lengths.mean())))

    def score(self, features: Tensor) -> Tensor:
        found = self.learnt(self.residual)
        # The tiny number keeps the gradient of the length finite at zero.
        outside = ((features @ found.basis.to(features)).square().sum(dim=1) + 1e-24).sqrt()
        return free_energy(self.head.logits(features)) - found.scale * outside


# Gaussian discriminant analysis on CLIP features: a training-free classifier, and the density as a score


@dataclass(frozen=True, eq=False)
class GDA(FittedDetector):
    """Gaussians of one covariance around the class means, with equal class weights.

    `score` is the log-density of their mixture up to a constant (our reading: the paper only classifies).
    `logits` is the paper's classifier: zero-shot logits plus `alpha` times those of the discriminant.

    Args:
        head: the zero-shot head.
        alpha: weight of the discriminant in the classifier; `choose_alpha` finds one on images kept apart.
        covariance: its estimator; "ridge" is the paper's, up to the factor (N - 1) / D, which alpha takes up.

    Source: Wang et al. 2024, arXiv 2402.04087.

    Example:
        >>> features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 1.0]])
        >>> detector = GDA(Head(torch.eye(2), 10.0)).fit_features(features, torch.tensor([0, 0, 1, 1]))
        >>> detector.logits(torch.tensor([[0.9, 0.2]])).argmax(1)
        tensor([0])
    """

    head: Head
    alpha: float = 1.0
    covariance: Estimator = "ridge"
    gaussians: ClassGaussians | None = field(default=None, repr=False)

    def fit_features(self, features: Tensor, labels: Tensor) -> GDA:
        check_known(features, labels)
        return replace(self, gaussians=fit_gaussians(features, labels, self.covariance))

    def score(self, features: Tensor) -> Tensor:
        return (-0.5 * self.learnt(self.gaussians).distances(features)).logsumexp(dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [N, K] of the training-free classifier.

        Raises UserError when a class had no image to learn from.
        """
        found = self.learnt(self.gaussians)
        n_classes = len(self.head.class_embeddings)
        if found.classes.tolist() != list(range(n_classes)):
            raise UserError(
                f"the GDA classifier has seen images of {len(found.classes)} of {n_classes} classes: fit it to images "
                "of every class"
            )
        root = found.root.to(features)
        means = found.means.to(features) @ root
        discriminant = features @ root @ means.T - 0.5 * means.square().sum(dim=1)
        return self.head.logits(features) + self.alpha * discriminant


def choose_alpha(
    detector: GDA, features: Tensor, labels: Tensor, grid: Sequence[float] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
) -> GDA:
    """Return the classifier with the `alpha` of the grid that is right most often on images kept apart from the fit.

    Of equals the smallest: the zero-shot head is the safer half.
    """
    check_known(features, labels)
    right = [int((replace(detector, alpha=alpha).logits(features).argmax(1) == labels).sum()) for alpha in sorted(grid)]
    return replace(detector, alpha=sorted(grid)[int(torch.tensor(right).argmax())])
