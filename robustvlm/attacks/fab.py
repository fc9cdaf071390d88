"""FAB: the shortest perturbation that changes the class, found along the boundary (Croce & Hein 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustvlm.attacks.base import LaneAttack, State
from robustvlm.attacks.hyperplane import step_to_plane
from robustvlm.attacks.objectives import Objective, objective
from robustvlm.attacks.threat import ThreatModel, per_image, random_start
from robustvlm.errors import UserError

_OBJECTIVES = ("margin", "margin-t", "dlr", "dlr-t")
_TINY = 1e-12  # makes the bias 0 where neither step moves anything


@dataclass(frozen=True, kw_only=True)
class FAB(LaneAttack):
    """Fast Adaptive Boundary attack, FAB-T by default: one sub-run aims at one class, the likeliest wrong ones first.

    Source: arXiv 1907.02044, algorithm 1. A step takes the decision boundary for the hyperplane of the objective's
    linearisation, and goes `eta` times the way to its nearest point in the pixel box, mixed with up to `alpha_max`
    of the same step made from the image itself, which draws the iterates towards the image. A success outside the ball
    is pulled back to the share `beta` of its distance; one inside ends the image, in the engine.

    Our reading, in two points:

    * The step that follows a pull-back uses the hyperplane of the success, which lies beside the boundary, instead of
      asking the model again at the point pulled back to. An iteration so costs one forward and one backward pass where
      the published program makes two forward and one backward; at equal iterations the norms found are the same or
      smaller.
    * The untargeted attack linearises against the class that is strongest at the iterate, one gradient in place of one
      for every class to find the nearest linearised boundary among all.

    Objectives are those whose sign tells success: `margin-t` or `dlr-t` for FAB-T; `margin` or `dlr` untargeted. FAB-T
    hence does not notice a third class winning outside the ball; inside the engine counts it.

    Args:
        n_targets: number of target classes; None for an untargeted objective.
        alpha_max: largest share of the step made from the image.
        eta: overshoot across the hyperplane.
        beta: share of the distance to the image that is left after a success.
        random_start: begin every sub-run at a random point of the ball of half the radius; otherwise only restarts
            after a target's first do, and that one begins at the image.

    Example:
        >>> FAB().n_runs(n_classes=5)
        4
    """

    leaves_ball: ClassVar[bool] = True

    name: str = "fab-t"
    n_iter: int = 100
    objective: Objective = objective("margin-t")
    n_targets: int | None = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    random_start: bool = False

    def __post_init__(self) -> None:
        if self.objective.name not in _OBJECTIVES:
            raise UserError(
                f"attack '{self.name}' needs an objective whose sign tells success ({', '.join(_OBJECTIVES)}), "
                f"got '{self.objective.name}'"
            )

    def n_runs(self, n_classes: int) -> int:
        if self.n_targets is None:
            return self.n_restarts
        return self.n_restarts * min(self.n_targets, n_classes - 1)

    def target_rank(self, run: int) -> int:
        return 0 if self.n_targets is None else run // self.n_restarts

    def away_from_image(self) -> FAB:
        return replace(self, random_start=True)

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        if self.random_start or run % self.n_restarts:
            return {"x0": x0, "x": random_start(x0, ThreatModel(threat.norm, threat.eps / 2), generator)}
        return {"x0": x0, "x": x0.clone()}

    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        del step
        x0, x = state["x0"], state["x"]
        pulled = x0 + self.beta * (x - x0)
        start = torch.where(per_image(loss > 0, x), pulled, x)
        return state | {"x": self._step(start, x0, x, loss.to(x.dtype), grad, threat.norm)}

    def _step(self, start: Tensor, x0: Tensor, x: Tensor, loss: Tensor, grad: Tensor, norm: str) -> Tensor:
        """Return the biased step from `start` to the plane where the linearisation at `x` is zero."""
        ahead, home = (step_to_plane(z, grad, -loss - _dot(grad, z - x), norm) for z in (start, x0))
        far, near = lengths(ahead, norm), lengths(home, norm)
        bias = per_image((far / (far + near).clamp_min(_TINY)).clamp_max(self.alpha_max), x)
        return ((1 - bias) * (start + self.eta * ahead) + bias * (x0 + self.eta * home)).clamp(0, 1)


def lengths(delta: Tensor, norm: str) -> Tensor:
    """Return the Linf or L2 norm of every image's perturbation, [B, ...] -> [B].

    Example:
        >>> lengths(torch.tensor([[3.0, -4.0]]), "L2"), lengths(torch.tensor([[3.0, -4.0]]), "Linf")
        (tensor([5.]), tensor([4.]))
    """
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
