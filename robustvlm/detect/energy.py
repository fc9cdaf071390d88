"""Scores from the logits themselves: the largest one, and the free energy of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustvlm.detect.base import Detector, Head, require_temperature


@dataclass(frozen=True, eq=False)
class MaxLogit(Detector):
    """The largest zero-shot logit: for a CLIP, the cosine to the nearest class.

    Source: Hendrycks et al. 2022, arXiv 1911.11132.

    Example:
        >>> import torch
        >>> MaxLogit(Head(torch.eye(2), 10.0)).score(torch.tensor([[0.6, 0.8]]))
        tensor([8.])
    """

    head: Head

    def score(self, features: Tensor) -> Tensor:
        return self.head.logits(features).amax(dim=1)


@dataclass(frozen=True, eq=False)
class Energy(Detector):
    """Negative free energy, T log sum_k exp(logit_k / T).

    Source: Liu et al. 2020, arXiv 2010.03759, equation 4; their energy is low for known images, hence the sign.

    Example:
        >>> import torch
        >>> Energy(Head(torch.eye(2), 1.0)).score(torch.tensor([[0.0, 0.0]]))
        tensor([0.6931])
    """

    head: Head
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_temperature(self.temperature)

    def score(self, features: Tensor) -> Tensor:
        return free_energy(self.head.logits(features), self.temperature)


def free_energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T log sum_k exp(logit_k / T), [N, K] -> [N]."""
    return temperature * (logits / temperature).logsumexp(dim=1)
