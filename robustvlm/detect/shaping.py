"""Scores that reshape the feature before its energy is taken: ReAct clips it, ASH prunes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robustvlm.detect.base import Detector, FittedDetector, Head, check_known
from robustvlm.detect.energy import free_energy
from robustvlm.errors import UserError, nearest

Variant = Literal["s", "p", "b"]


@dataclass(frozen=True, eq=False)
class ReAct(FittedDetector):
    """Energy of the feature with its entries clipped from above at a percentile of known images' entries.

    Our reading for CLIP, whose features have no ReLU before them: entries of either sign, clipped from above only, as
    published, and not scaled back to unit length.

    Args:
        head: the zero-shot head; percentile: of all entries of the features fitted to (the paper's 90).

    Source: Sun et al. 2021, arXiv 2111.12797.

    Example:
        >>> detector = ReAct(Head(torch.eye(2), 1.0), 50).fit_features(torch.eye(2), torch.tensor([0, 1]))
        >>> detector.score(torch.tensor([[1.0, 0.0]]))
        tensor([0.9741])
    """

    head: Head
    percentile: float = 90.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        _check_percentile(self.percentile)

    def fit_features(self, features: Tensor, labels: Tensor) -> ReAct:
        check_known(features, labels)
        return replace(self, threshold=float(np.percentile(features.detach().cpu().double().numpy(), self.percentile)))

    def score(self, features: Tensor) -> Tensor:
        return free_energy(self.head.logits(features.clamp_max(self.learnt(self.threshold))))


@dataclass(frozen=True, eq=False)
class ASH(Detector):
    """Energy of the feature with its smallest entries set to zero and the others reshaped.

    Our reading for CLIP, whose features have entries of either sign: entries are ordered by size without sign, and
    sums are sums of sizes; on features behind a ReLU this is the published rule.

    Args:
        head: the zero-shot head.
        variant: what becomes of the entries that stay: "s" scales them by exp(sum before / sum after), "p" leaves
            them, "b" gives all of them one size, so that the sum of sizes stays.
        percentile: share of the entries that are set to zero (the paper: 65 to 90).

    Source: Djurisic et al. 2023, arXiv 2209.09858.

    Example:
        >>> ASH(Head(torch.eye(2), 1.0), "p", 50).score(torch.tensor([[0.6, 0.8]]))
        tensor([1.1711])
    """

    head: Head
    variant: Variant = "s"
    percentile: float = 65.0

    def __post_init__(self) -> None:
        if self.variant not in ("s", "p", "b"):
            raise UserError(f"unknown variant of ASH '{self.variant}': {nearest(self.variant, ('s', 'p', 'b'))}")
        _check_percentile(self.percentile)

    def score(self, features: Tensor) -> Tensor:
        return free_energy(self.head.logits(self.shape(features)))

    def shape(self, features: Tensor) -> Tensor:
        """Return the reshaped features [N, D]."""
        size = features.abs()
        dim = features.shape[1]
        kept = size.topk(max(1, dim - round(dim * self.percentile / 100)), dim=1).indices
        stays = torch.zeros_like(features).scatter(1, kept, 1.0)
        if self.variant == "b":
            return features.sign() * stays * (size.sum(dim=1, keepdim=True) / kept.shape[1])
        pruned = features * stays
        if self.variant == "p":
            return pruned
        return pruned * (size.sum(dim=1, keepdim=True) / pruned.abs().sum(dim=1, keepdim=True).clamp_min(1e-12)).exp()


def _check_percentile(value: float) -> None:
    if not 0 <= value < 100:
        raise UserError(f"a percentile lies between 0 and 100, got {value}: pass for example 90")
