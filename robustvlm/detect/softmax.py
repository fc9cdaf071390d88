"""Scores from the largest softmax probability: MSP at the model's own temperature, MCM at that of its paper."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustvlm.detect.base import Detector, Head, confidence, require_temperature


@dataclass(frozen=True, eq=False)
class MSP(Detector):
    """Maximum softmax probability of the zero-shot logits, as log-odds (a monotone map that does not saturate).

    Source: Hendrycks and Gimpel 2017, arXiv 1610.02136.

    Example:
        >>> import torch
        >>> MSP(Head(torch.eye(2), 10.0)).score(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        tensor([10., 2.])
    """

    head: Head

    def score(self, features: Tensor) -> Tensor:
        return confidence(self.head.logits(features))


@dataclass(frozen=True, eq=False)
class MCM(Detector):
    """Maximum concept matching: the largest softmax probability of the cosines over a temperature, as log-odds.

    Source: Ming et al. 2022, arXiv 2211.13445, whose temperature is 1 (that of MSP is 1 / logit_scale).

    Example:
        >>> import torch
        >>> MCM(Head(torch.eye(2), 10.0)).score(torch.tensor([[1.0, 0.0]]))
        tensor([1.])
    """

    head: Head
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_temperature(self.temperature)

    def score(self, features: Tensor) -> Tensor:
        return confidence(self.head.cosines(features) / self.temperature)
