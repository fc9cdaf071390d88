"""Your own attack: where to begin, and where to go after a look at the model; the engine does the rest.

    robustvlm attack tiny --attack own_attack:Momentum:decay=0.9 --limit 20

run in this folder. The iteration is that of MI-FGSM (Dong et al. 2018, arXiv 1710.06081), for Linf.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from robustvlm.attacks import LaneAttack, Objective, Option, ThreatModel, objective, project


@dataclass(frozen=True, kw_only=True)
class Momentum(LaneAttack):
    """Sign steps along a running sum of gradients, each scaled to one; `decay` is how much of the sum is kept."""

    name: str = "momentum"
    n_iter: int = 10
    objective: Objective = objective("ce")
    decay: Annotated[float, Option("decay", least=0, most=1)] = 1.0

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> dict[str, Tensor]:
        """Return the state of one image [1, 3, S, S]: every tensor in it travels with the image."""
        del threat, generator, run
        return {"x0": x0, "x": x0.clone(), "sum": torch.zeros_like(x0)}

    def advance(
        self, state: dict[str, Tensor], loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel
    ) -> dict[str, Tensor]:
        """Return the state of a batch of lanes after one step up the loss."""
        del loss, step
        size = grad.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        total = self.decay * state["sum"] + grad / size
        moved = state["x"] + threat.eps / self.n_iter * total.sign()
        return state | {"x": project(moved, state["x0"], threat), "sum": total}
