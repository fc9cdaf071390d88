"""Auto-PGD: step sizes that adapt to the progress of each image (Croce & Hein 2020, arXiv 2003.01690, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.attacks.base import ATTACKS, LaneAttack, State
from robustvlm.attacks.objectives import Objective, objective
from robustvlm.attacks.threat import ThreatModel, l2_norms, per_image, pixel_box, project, random_start

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
        due, interval = (table.to(step.device)[step] for table in _review_tables(self.n_iter))
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


def _review_tables(n_iter: int) -> tuple[Tensor, Tensor]:
    """Return, by number of steps made: whether a review is due, and the length of the interval that ends there."""
    due, interval = torch.zeros(n_iter + 1, dtype=torch.bool), torch.ones(n_iter + 1)
    previous = 0
    for at in checkpoints(n_iter):
        due[at], interval[at] = True, float(at - previous)
        previous = at
    return due, interval


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
