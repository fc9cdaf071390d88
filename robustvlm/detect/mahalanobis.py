"""Mahalanobis distance to the nearest class: for unknown images, and for adversarial ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from robustvlm.detect.base import FittedDetector, check_known
from robustvlm.detect.covariance import ClassGaussians, Estimator, fit_gaussians


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
