"""Virtual-logit matching: the energy, less what lies outside the space that known features span."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustvlm.detect.base import FittedDetector, Head, check_known
from robustvlm.detect.energy import free_energy
from robustvlm.errors import UserError


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
        >>> features = torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, -0.1]])
        >>> detector = ViM(Head(torch.eye(3)[:2], 1.0), dim=2).fit_features(features, torch.tensor([0, 1]))
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
        if float(lengths.mean()) <= 0.0:
            raise UserError("the features to fit lie in too few dimensions for ViM: pass more images or a smaller dim")
        return replace(self, residual=Residual(basis.to(features), float(largest.mean() / lengths.mean())))

    def score(self, features: Tensor) -> Tensor:
        found = self.learnt(self.residual)
        # The tiny number keeps the gradient of the length finite at zero.
        outside = ((features @ found.basis.to(features)).square().sum(dim=1) + 1e-24).sqrt()
        return free_energy(self.head.logits(features)) - found.scale * outside
