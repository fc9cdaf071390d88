"""FAB: the shortest perturbation that changes the class, found along the boundary (Croce & Hein 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from robustvlm.attacks.base import ATTACKS, DONE, LaneAttack, State
from robustvlm.attacks.boundary import boundary_step, lengths
from robustvlm.attacks.objectives import OBJECTIVES, Objective, objective
from robustvlm.attacks.options import MOST, Option
from robustvlm.attacks.reach import learn, nothing_known, out_of_reach
from robustvlm.attacks.threat import ThreatModel, random_start
from robustvlm.errors import UserError


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
        futility: end a target's sub-run when its boundary is out of reach (rule and measured risk: `reach`).
            Without effect untargeted, where the class that the walk leads to may still change.

    Example:
        >>> FAB().n_runs(n_classes=5)
        4
    """

    name: str = "fab-t"
    n_iter: int = 100
    objective: Objective = objective("margin-t")
    n_targets: Annotated[int | None, Option("targets", least=1, most=MOST)] = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    random_start: bool = False
    futility: Annotated[bool, Option("futility")] = True

    def __post_init__(self) -> None:
        if not self.objective.signed:
            signed = ", ".join(name for name, known in OBJECTIVES.items() if known.signed)
            raise UserError(
                f"attack '{self.name}' needs an objective whose sign tells success ({signed}), "
                f"got '{self.objective.name}'"
            )

    @property
    def leaves_ball(self) -> bool:
        return True

    def n_runs(self, n_classes: int) -> int:
        if self.n_targets is None:
            return self.n_restarts
        return self.n_restarts * min(self.n_targets, n_classes - 1)

    def target_rank(self, run: int) -> int:
        return 0 if self.n_targets is None else run // self.n_restarts

    def away_from_image(self) -> FAB:
        return replace(self, random_start=True)

    def exhaustive(self) -> FAB:
        return replace(self, futility=False)

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        away = self.random_start or run % self.n_restarts
        x = random_start(x0, ThreatModel(threat.norm, threat.eps / 2), generator) if away else x0.clone()
        state = {"x0": x0, "x": x}
        return state | nothing_known(x0) | {DONE: torch.zeros(1, dtype=torch.bool)} if self._gives_up() else state

    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        x0, x = state["x0"], state["x"]
        moved, distance = boundary_step(
            x0, x, loss, grad, threat.norm, alpha_max=self.alpha_max, eta=self.eta, beta=self.beta
        )
        state = state | {"x": moved}
        if not self._gives_up():
            return state
        state = learn(state, distance, lengths(x - x0, threat.norm), loss > 0)
        return state | {DONE: out_of_reach(state, step, threat.eps)}

    def _gives_up(self) -> bool:
        return self.futility and self.n_targets is not None


ATTACKS["fab-t"] = FAB
ATTACKS["fab"] = lambda: FAB(name="fab", objective=objective("margin"), n_targets=None)
