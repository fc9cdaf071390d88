"""Auto-PGD, untargeted and towards one wrong class after another (Croce & Hein 2020, arXiv 2003.01690)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from robustvlm.attacks.base import ATTACKS, BEYOND, DONE, MOST, LaneAttack, Option, State
from robustvlm.attacks.fab import boundary_step
from robustvlm.attacks.futility import beyond, learn, nothing_known, out_of_reach, reach
from robustvlm.attacks.objectives import Objective, objective
from robustvlm.attacks.threat import ThreatModel, l2_norms, lengths, per_image, pixel_box, project, random_start
from robustvlm.core.device import sent

# Auto-PGD: step sizes that adapt to the progress of each image (Croce & Hein 2020, arXiv 2003.01690, algorithm 1)

_MOMENTUM = 0.75  # alpha of the paper: the share of the new step in the update
_SUCCESS_SHARE = 0.75  # rho of the paper: halve when fewer than this share of steps raised the loss


def checkpoints(n_iter: int) -> list[int]:
    """Return the steps (1-based) after which the step size is reviewed, as published.

    The first interval is 22 % of the iterations, each next one 3 points shorter, none shorter than 6 %.

    Example:
        >>> checkpoints(100)[:5]
        [22, 41, 57, 70, 80]
    """
    interval, shortest, decrement = max(int(0.22 * n_iter), 1), max(int(0.06 * n_iter), 1), max(int(0.03 * n_iter), 1)
    steps, at = [], 0
    while at + interval <= n_iter:
        at += interval
        steps.append(at)
        interval = max(interval - decrement, shortest)
    return steps


@dataclass(frozen=True, kw_only=True)
class APGD(LaneAttack):
    """Auto-PGD with momentum, step halving at checkpoints and restarts from the best point.

    Per lane it keeps what the review at a checkpoint needs: the best point with loss and gradient, how many steps
    raised the loss since the last checkpoint, and whether the step was halved there.

    Example:
        >>> APGD(name="apgd-ce", objective=objective("ce")).n_iter
        100
    """

    name: str = "apgd-ce"
    n_iter: int = 100
    objective: Objective = objective("ce")

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        del run
        x = random_start(x0, threat, generator)
        low, high = pixel_box(x0, threat.eps)
        return {
            "x0": x0,
            "low": low,
            "high": high,
            "x": x,
            "x_before": x.clone(),
            "x_best": x.clone(),
            "grad_best": torch.zeros_like(x),
            "loss_best": x0.new_full((1,), float("-inf")),
            "loss_before": x0.new_full((1,), float("-inf")),
            "loss_best_at_review": x0.new_full((1,), float("-inf")),
            "step_size": x0.new_full((1,), 2 * threat.eps),
            "rises": x0.new_zeros(1),
            "halved_at_review": torch.ones(1, dtype=torch.bool, device=x0.device),
        }

    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        state = _keep_best(state, loss.to(state["loss_best"].dtype), grad, step)
        state, x, grad = self._review(state, grad, step)
        moved = _momentum_step(state, x, grad, step, threat)
        return state | {"x": moved, "x_before": x}

    def _review(self, state: State, grad: Tensor, step: Tensor) -> tuple[State, Tensor, Tensor]:
        """At a checkpoint, halve the step of lanes that stopped improving and send them back to their best point."""
        due, interval = (table[step] for table in _review_tables(self.n_iter, step.device))
        oscillates = state["rises"] <= _SUCCESS_SHARE * interval
        stalls = ~state["halved_at_review"] & (state["loss_best_at_review"] >= state["loss_best"])
        halve = due & (oscillates | stalls)
        back = per_image(halve, grad)
        x = torch.where(back, state["x_best"], state["x"])
        grad = torch.where(back, state["grad_best"], grad)
        return (
            state
            | {
                "step_size": torch.where(halve, state["step_size"] / 2, state["step_size"]),
                "halved_at_review": torch.where(due, halve, state["halved_at_review"]),
                "loss_best_at_review": torch.where(due, state["loss_best"], state["loss_best_at_review"]),
                "rises": torch.where(due, torch.zeros_like(state["rises"]), state["rises"]),
            },
            x,
            grad,
        )


ATTACKS["apgd-ce"] = APGD
ATTACKS["apgd-dlr"] = lambda: APGD(name="apgd-dlr", objective=objective("dlr"))


@lru_cache(maxsize=32)
def _review_tables(n_iter: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, by number of steps made: whether a review is due, and the length of the interval that ends there."""
    due, interval = torch.zeros(n_iter + 1, dtype=torch.bool), torch.ones(n_iter + 1)
    previous = 0
    for at in checkpoints(n_iter):
        due[at], interval[at] = True, float(at - previous)
        previous = at
    return sent(due, device), sent(interval, device)


def _keep_best(state: State, loss: Tensor, grad: Tensor, step: Tensor) -> State:
    """Record the evaluated point where it raised the loss; at the start of a sub-run it is the best by definition."""
    first = step == 0
    better = (loss > state["loss_best"]) | first
    rises = state["rises"] + ((loss > state["loss_before"]) & ~first).to(state["rises"].dtype)
    images = per_image(better, grad)
    loss_best = torch.where(better, loss, state["loss_best"])
    return state | {
        "x_best": torch.where(images, state["x"], state["x_best"]),
        "grad_best": torch.where(images, grad, state["grad_best"]),
        "loss_best": loss_best,
        "loss_before": loss,
        "loss_best_at_review": torch.where(first, loss_best, state["loss_best_at_review"]),
        "rises": rises,
    }


def _momentum_step(state: State, x: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> Tensor:
    """Return the next point: a projected gradient step, averaged with the previous movement, projected again."""
    if threat.norm == "Linf":
        direction = grad.sign()
    else:
        direction = grad / per_image(l2_norms(grad), grad).clamp_min(1e-12)
    box = (state["low"], state["high"])
    stepped = project(x + per_image(state["step_size"], x) * direction, state["x0"], threat, box)
    share = per_image(torch.where(step == 0, 1.0, _MOMENTUM).to(x.dtype), x)
    return project(x + share * (stepped - x) + (1 - share) * (x - state["x_before"]), state["x0"], threat, box)


# APGD-T: Auto-PGD towards one wrong class after another, with a look first at which of them are within reach

# The walk is over after so many steps, or from so many on where the boundary shows within so many radii.
LONGEST_WALK = 60
FIRST_CLOSE = 10
CLOSE = 1.1
_WALKING = "walking"


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD(APGD):
    """Auto-PGD aimed at one class a sub-run, the likeliest wrong classes first (APGD-T, arXiv 2003.01690, section 4).

    With `futility`, a sub-run begins with up to 60 steps of FAB's walk along the boundary to its class, from the image.
    They show how far that boundary is (by the margin, as those of FAB-T do: distances from a boundary linearised by
    the quotient of DLR err by far more); where it is out of reach (rule and measured risk: `futility`), the sub-run
    ends, otherwise the `n_iter` iterations follow from their random start, as published. Most classes of a robust image
    are out of reach, and save the iterations.

    Args:
        n_targets: number of target classes.
        futility: end sub-runs whose class is out of reach; without effect for an objective whose sign does not tell
            success. Off, the attack is the published one.

    Example:
        >>> TargetedAPGD().n_points(), TargetedAPGD(futility=False).n_points()
        (162, 101)
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

    def walk_points(self, run: int) -> int:
        del run
        return LONGEST_WALK + 1 if self._walks() else 0

    def target_rank(self, run: int) -> int:
        return run // self.n_restarts

    def n_points(self) -> int:
        return super().n_points() + self.walk_points(0)

    def exhaustive(self) -> TargetedAPGD:
        return replace(self, futility=False)

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        state = super().begin(x0, threat, generator, run)
        if not self._walks():
            return state
        flags = {_WALKING: torch.ones(1, dtype=torch.bool)}
        # The start of the iterations waits in "x_before" until the walk is over.
        return state | nothing_known(x0) | flags | {"x": x0.clone(), "begun": torch.zeros(1, dtype=torch.int64)}

    def away_from_image(self) -> TargetedAPGD:
        return self.exhaustive()  # its walk begins at the image

    def rows_walking(self, state: State) -> Tensor | None:
        return state.get(_WALKING)

    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        if not self._walks():
            return super().advance(state, loss, grad, step, threat)
        walking = state[_WALKING]
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
        state = learn(state, distance, lengths(x - x0, threat.norm), loss)
        close = (step >= FIRST_CLOSE) & (reach(state) <= CLOSE * threat.eps)
        # Outside the ball the model may break down; the iterations, which stay inside, go on from there.
        lost = ~loss.isfinite()
        over = close | lost | (step >= LONGEST_WALK)
        return state | {
            "x": torch.where(per_image(over, x), state["x_before"], moved),
            _WALKING: ~over,
            "begun": torch.where(over, step + 1, state["begun"]),
            DONE: ~lost & out_of_reach(state, step, threat.eps),
            BEYOND: torch.where(lost, 0, beyond(state, step)),
        }

    def _walks(self) -> bool:
        return self.futility and self.objective.signed


ATTACKS["apgd-t"] = TargetedAPGD
