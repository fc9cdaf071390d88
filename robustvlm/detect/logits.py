"""Scores from logits: the largest softmax, the energy, its change, and features reshaped before it is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robustvlm.detect.base import Detector, FittedDetector, Head, check_known, confidence, require_temperature
from robustvlm.errors import UserError, nearest

# Scores from softmax probabilities: the largest at the model's own temperature (MSP) and at that of its paper (MCM),
# and the entropy of the leading ones (GEN)


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


# Scores from the logits themselves: the largest one, and the free energy of all of them


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


# Energy change: how much energy an image loses when its nearest classes are taken away

Reset = Literal["joint", "mean"]


@dataclass(frozen=True, eq=False)
class DeltaEnergy(Detector):
    """E(s~) - E(s), where E(s) = -T log sum_k exp(logit_scale s_k / T) and s~ has its largest cosines set to 0.

    Large for known images, whose energy hangs on few classes. With one cosine reset it is -T log(1 - p_1 + 1 / Z) for
    the largest softmax probability p_1 at that temperature and the sum Z of exponentials: wherever 1 / Z is nothing,
    as at a CLIP's own temperature, it ranks images exactly as MSP does, and with two reset nearly as
    -log(1 - p_1 - p_2). So the temperature decides what it sees; T = logit_scale takes the cosines as they are.

    Args:
        head: the zero-shot head.
        n_reset: how many of the largest cosines are set to 0.
        temperature: T, on the logits; 1 is the model's own.
        reset: "joint", all of them at once (our reading, the default), or "mean", the mean over one at a time. With
            `n_reset` 1 the two agree.

    Source: Zhu et al. 2025, arXiv 2510.11296. How several resets are joined, and how many there are by default, the
    text leaves open: our reading.

    Example:
        >>> import torch
        >>> DeltaEnergy(Head(torch.eye(2), 5.0), n_reset=1).score(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([4.3136, 0.0000])
    """

    head: Head
    n_reset: int = 2
    reset: Reset = "joint"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.reset not in ("joint", "mean"):
            raise UserError(f"the energy change resets cosines 'joint' or 'mean', got '{self.reset}'")
        if self.n_reset < 1:
            raise UserError(f"the energy change needs at least 1 cosine to reset, got {self.n_reset}")
        require_temperature(self.temperature)

    def score(self, features: Tensor) -> Tensor:
        logits = self.head.logits(features) / self.temperature
        return self.temperature * energy_change(logits, self.n_reset, self.reset)


def energy_change(logits: Tensor, n_reset: int = 2, reset: Reset = "joint") -> Tensor:
    """Return the energy change of logits [N, K], which are cosines over the temperature; at most all K are reset."""
    top = logits.topk(min(n_reset, logits.shape[1]), dim=1).indices
    whole = logits.logsumexp(dim=1)
    if reset == "joint":
        return whole - logits.scatter(1, top, 0.0).logsumexp(dim=1)
    singles = [logits.scatter(1, top[:, i : i + 1], 0.0).logsumexp(dim=1) for i in range(top.shape[1])]
    return whole - sum(singles[1:], singles[0]) / len(singles)


# Scores that reshape the feature before its energy is taken: ReAct clips it, ASH prunes it

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
