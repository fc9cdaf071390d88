"""FMN: a small ball around each image that grows until the class changes and shrinks after it (Pintor et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from robustvlm.attacks.base import ATTACKS, LaneAttack, Option, State
from robustvlm.attacks.objectives import Objective, objective, require_signed
from robustvlm.attacks.threat import ThreatModel, l2_norms, lengths, per_image, random_start
from robustvlm.core.seeds import row_sums

_LAST_ALPHA = 0.01  # share of the first step that the last one has
_LAST_GAMMA = 1e-3  # share by which a ball still changes at the end
_PAST = 1e-4  # share by which a ball grows at least while nothing is found
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class FMN(LaneAttack):
    """Fast Minimum-Norm attack: it looks for the shortest perturbation, whatever the radius of the run.

    Source: arXiv 2102.12827, algorithm 1. Every image has a ball of its own. Until a first success its radius is
    the distance to the linearised boundary; then it shrinks by a share gamma at a success, never above the shortest
    one found, and grows by gamma elsewhere. A step of L2 length alpha goes up the objective's gradient and is projected
    onto the ball and the pixels' range. alpha (to a hundredth) and gamma (to 0.001) fall along a half cosine.

    Our reading: entries of the gradient that point out of the pixels' range count as zero, in the step and in the
    distance to the boundary. As published they make both too short, and with many white or black pixels the L2 walk may
    come to a halt before its first success.

    From the image, the walk does not depend on the run's radius: an image is fooled at eps exactly when the shortest
    perturbation found is at most eps long. Restarts begin at random points of the ball of half the run's radius.

    Args:
        alpha: length of the first step, in L2.
        gamma: share by which a ball first grows or shrinks.

    Example:
        >>> FMN(n_iter=50).leaves_ball
        True
    """

    walks_boundary: ClassVar[bool] = True

    name: str = "fmn"
    n_iter: int = 100
    objective: Objective = objective("margin")
    alpha: Annotated[float, Option("alpha", above=0, most=1000)] = 1.0
    gamma: Annotated[float, Option("gamma", above=0, most=0.9)] = 0.05
    random_start: bool = False

    def __post_init__(self) -> None:
        require_signed(self.name, self.objective, targeted=False)

    @property
    def leaves_ball(self) -> bool:
        return True

    def away_from_image(self) -> FMN:
        return replace(self, random_start=True)

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        away = self.random_start or run > 0
        x = random_start(x0, ThreatModel(threat.norm, threat.eps / 2), generator) if away else x0.clone()
        infinite = torch.full((1,), math.inf, dtype=x0.dtype, device=x0.device)
        return {"x0": x0, "x": x, "radius": torch.zeros_like(infinite), "shortest": infinite}

    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        x0, x = state["x0"], state["x"]
        loss, length = loss.to(x.dtype), lengths(x - x0, threat.norm)
        grad = torch.where(((x <= 0) & (grad < 0)) | ((x >= 1) & (grad > 0)), 0.0, grad)
        share = 0.5 * (1 + torch.cos(math.pi * step.to(x.dtype) / self.n_iter))
        gamma = _LAST_GAMMA + (self.gamma - _LAST_GAMMA) * share
        alpha = self.alpha * (_LAST_ALPHA + (1 - _LAST_ALPHA) * share)

        success = loss > 0
        shortest = torch.where(success, torch.minimum(state["shortest"], length), state["shortest"])
        dual = row_sums(grad.abs()) if threat.norm == "Linf" else l2_norms(grad)
        # Rounding can leave a point on the boundary itself, on the wrong side, where the estimate is no step any more.
        boundary = torch.maximum(length - loss / dual.clamp_min(_TINY), length * (1 + _PAST))
        smaller = torch.minimum(state["radius"] * (1 - gamma), shortest)
        larger = torch.where(shortest.isfinite(), state["radius"] * (1 + gamma), boundary)
        radius = torch.where(success, smaller, larger)

        moved = x + grad * per_image(alpha / l2_norms(grad).clamp_min(_TINY), x)
        moved = _into_ball(moved - x0, radius, threat.norm)
        # Outside the ball the model may break down: the walk learns nothing there, and goes half of its way back.
        lost = ~loss.isfinite()
        moved = torch.where(per_image(lost, x), (x0 + x) / 2, (x0 + moved).clamp(0, 1))
        radius = torch.where(lost, state["radius"] / 2, radius)
        shortest = torch.where(lost, state["shortest"], shortest)
        return {"x0": x0, "x": moved, "radius": radius, "shortest": shortest}


def _into_ball(delta: Tensor, radius: Tensor, norm: str) -> Tensor:
    """Return perturbations projected onto balls of a radius each."""
    if norm == "Linf":
        bound = per_image(radius, delta)
        return torch.minimum(torch.maximum(delta, -bound), bound)
    return delta * per_image((radius / l2_norms(delta).clamp_min(_TINY)).clamp_max(1.0), delta)


ATTACKS["fmn"] = FMN
