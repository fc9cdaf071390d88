"""Energy change: how much energy an image loses when its nearest classes are taken away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from robustvlm.detect.base import Detector, Head, require_temperature
from robustvlm.errors import UserError

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
