"""S_DIS: nearness to the best prototype, less nearness to the best antibody."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustvlm.core.defaults import LAMBDA_INF
from robustvlm.detect.base import Detector
from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class SDIS(Detector):
    """max_k <z, mu_k> - weight max_a <z, a> over prototypes mu [P, D] and antibodies a [A, D], all unit vectors.

    The features z are those behind the adapter, where there is one. A class may have several prototypes.

    Source: Immuno-VLM, arXiv 2605.30745, the inference score with lambda_inf = weight.

    Example:
        >>> import torch
        >>> SDIS(torch.eye(3)[:2], torch.eye(3)[2:]).score(torch.tensor([[0.0, 0.6, 0.8]]))
        tensor([0.2000])
    """

    prototypes: Tensor
    antibodies: Tensor
    weight: float = LAMBDA_INF

    def __post_init__(self) -> None:
        for name, vectors in (("prototypes", self.prototypes), ("antibodies", self.antibodies)):
            if vectors.ndim != 2 or not len(vectors):
                raise UserError(f"S_DIS needs {name} [at least 1, D], got {list(vectors.shape)}")
        if not self.weight >= 0:
            raise UserError(f"the weight of the antibodies must not be negative, got {self.weight}")

    def score(self, features: Tensor) -> Tensor:
        known = (features @ self.prototypes.to(features).T).amax(dim=1)
        return known - self.weight * (features @ self.antibodies.to(features).T).amax(dim=1)
