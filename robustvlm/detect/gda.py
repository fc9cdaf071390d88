"""Gaussian discriminant analysis on CLIP features: a training-free classifier, and the density as a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustvlm.detect.base import FittedDetector, Head, check_known
from robustvlm.detect.covariance import ClassGaussians, Estimator, fit_gaussians
from robustvlm.errors import UserError


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
