"""Distance to the k-th nearest image of the known classes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.detect.base import FittedDetector, check_known
from robustvlm.errors import UserError

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
