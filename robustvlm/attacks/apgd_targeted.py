"""APGD-T: Auto-PGD towards one wrong class after another, with a look first at which of them are within reach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from robustvlm.attacks.apgd import APGD
from robustvlm.attacks.base import ATTACKS, DONE, State
from robustvlm.attacks.boundary import boundary_step, lengths
from robustvlm.attacks.objectives import Objective, objective
from robustvlm.attacks.options import MOST, Option
from robustvlm.attacks.reach import FIRST_STEP, learn, nothing_known, out_of_reach, reach
from robustvlm.attacks.threat import ThreatModel, per_image

# The walk ends after so many steps, or earlier where the boundary shows within so many radii.
_LONGEST_WALK = 25
_CLOSE = 1.25


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD(APGD):
    """Auto-PGD aimed at one class a sub-run, the likeliest wrong classes first (APGD-T, arXiv 2003.01690, section 4).

    With `futility`, a sub-run begins with 10 to 25 steps of FAB's walk along the boundary to its class, from the image.
    They show how far that boundary is; where it is out of reach (rule and measured risk: `reach`), the sub-run ends,
    otherwise the `n_iter` iterations follow from their random start, as published. Most classes of a robust image are
    out of reach, and save the iterations.

    Args:
        n_targets: number of target classes.
        futility: end sub-runs whose class is out of reach; without effect for an objective whose sign does not tell
            success. Off, the attack is the published one.

    Example:
        >>> TargetedAPGD().n_points(), TargetedAPGD(futility=False).n_points()
        (127, 101)
    """

    name: str = "apgd-t"
    objective: Objective = objective("dlr-t")
    n_targets: Annotated[int, Option("targets", least=1, most=MOST)] = 9
    futility: Annotated[bool, Option("futility")] = True

    @property
    def leaves_ball(self) -> bool:
        return self._walks()

    def n_runs(self, n_classes: int) -> int:
        return self.n_restarts * min(self.n_targets, n_classes - 1)

    def target_rank(self, run: int) -> int:
        return run // self.n_restarts

    def n_points(self) -> int:
        return super().n_points() + (_LONGEST_WALK + 1 if self._walks() else 0)

    def exhaustive(self) -> TargetedAPGD:
        return replace(self, futility=False)

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        state = super().begin(x0, threat, generator, run)
        if not self._walks():
            return state
        flags = {"walking": torch.ones(1, dtype=torch.bool), DONE: torch.zeros(1, dtype=torch.bool)}
        # The start of the iterations waits in "x_before" until the walk is over.
        return state | nothing_known(x0) | flags | {"x": x0.clone(), "begun": torch.zeros(1, dtype=torch.int64)}

    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        if not self._walks():
            return super().advance(state, loss, grad, step, threat)
        walking = state["walking"]
        own_step = torch.where(walking, 0, step - state["begun"])
        iterated = super().advance(state, loss, grad, own_step, threat) | {DONE: own_step >= self.n_iter}
        if not walking.any():
            return iterated
        walked = self._walk(state, loss, grad, step, threat)
        return {key: torch.where(per_image(walking, value), walked[key], value) for key, value in iterated.items()}

    def _walk(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        """Return the state after one more step of the walk, given up, or handed over to the iterations."""
        x0, x = state["x0"], state["x"]
        moved, distance = boundary_step(x0, x, loss, grad, threat.norm)
        state = learn(state, distance, lengths(x - x0, threat.norm), loss > 0)
        close = (step >= FIRST_STEP) & (reach(state) <= _CLOSE * threat.eps)
        over = close | (step >= _LONGEST_WALK)
        return state | {
            "x": torch.where(per_image(over, x), state["x_before"], moved),
            "walking": ~over,
            "begun": torch.where(over, step + 1, state["begun"]),
            DONE: out_of_reach(state, step, threat.eps),
        }

    def _walks(self) -> bool:
        return self.futility and self.objective.signed


ATTACKS["apgd-t"] = TargetedAPGD
