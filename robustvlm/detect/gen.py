"""GEN: how far the leading softmax probabilities are from a sure answer (Liu, Lochman and Zach 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustvlm.detect.base import Detector, Head, require_temperature
from robustvlm.detect.catalog import SCORES, Score
from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class GEN(Detector):
    """Negative generalised entropy of the leading probabilities, -sum_{k <= M} (p_(k) (1 - p_(k)))^gamma.

    Source: Liu, Lochman and Zach, CVPR 2023, equation 4, with their gamma = 0.1 and M = 100. A small gamma weighs what
    little probability the other classes get, where MSP looks at the leading one alone. The temperature divides the
    logits; all is computed from logarithms, as CLIP's factor of 100 makes probabilities that round to 0 and 1.

    Args:
        gamma: power, in (0, 1).
        leading: M, how many of the largest probabilities count.

    Example:
        >>> import torch
        >>> GEN(Head.of_logits(2), gamma=0.5).score(torch.zeros(1, 2))
        tensor([-1.])
    """

    head: Head
    temperature: float = 1.0
    gamma: float = 0.1
    leading: int = 100

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        if not 0 < self.gamma < 1:
            raise UserError(f"gamma of GEN must lie between 0 and 1, got {self.gamma}: the paper's is 0.1")
        if self.leading < 1:
            raise UserError(f"GEN needs at least 1 leading probability, got {self.leading}")

    def score(self, features: Tensor) -> Tensor:
        logits = self.head.logits(features) / self.temperature
        ranked = logits.topk(min(self.leading, logits.shape[1]), dim=1).values
        total = logits.logsumexp(dim=1, keepdim=True)
        log_p = ranked - total
        # 1 - p of the leading class from the other classes: it would round to 0. All others are at most 1/2.
        others = logits.scatter(1, logits.argmax(dim=1, keepdim=True), float("-inf")).logsumexp(dim=1, keepdim=True)
        log_rest = (-log_p.exp()).log1p()
        log_rest = log_rest.scatter(1, log_rest.new_zeros(len(logits), 1).long(), others - total)
        return -(self.gamma * (log_p + log_rest)).exp().sum(dim=1)


SCORES["gen"] = Score(
    "gen", "GEN", "Liu et al., CVPR 2023", (), lambda s: GEN(s.head, temperature=s.temperature), usual=False
)
