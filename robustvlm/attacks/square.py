"""Square Attack: random search over square-shaped changes, forward passes only (Andriushchenko et al. 2020).

Source: arXiv 1912.00049, algorithms 1 to 3. It needs no gradient, so it also finds what a masked gradient hides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from robustvlm.attacks import square_futility, square_l2, square_linf
from robustvlm.attacks.base import ATTACKS, DONE, LaneAttack, State
from robustvlm.attacks.objectives import Objective, objective
from robustvlm.attacks.options import Option
from robustvlm.attacks.threat import ThreatModel, per_image, pixel_box

# The share of pixels that a square covers is halved after these queries of 10,000 (section 5 of the paper).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULE_LENGTH = 10_000


def square_share(query: int, n_iter: int, p_init: float) -> float:
    """Return p, the share of the image's pixels that proposal `query` (counted from 0) of `n_iter` changes.

    Example:
        >>> square_share(0, 5000, 0.8), square_share(20, 5000, 0.8), square_share(20, 10_000, 0.8)
        (0.8, 0.4, 0.4)
    """
    at = int(query / n_iter * _SCHEDULE_LENGTH)
    return p_init / 2 ** sum(at > halving for halving in _HALVINGS)


@dataclass(frozen=True, kw_only=True)
class Square(LaneAttack):
    """Square Attack in the Linf or L2 ball.

    A sub-run evaluates its start and then `n_iter` proposals; each changes one square window of the best point so far
    and is kept if it raises the objective. All random numbers are drawn when a sub-run begins: a table of a few
    floats per query (100 kB a lane for 5000 queries). The schedule of square sizes is stretched to `n_iter`, as in the
    paper; AutoAttack runs the first half of the schedule for 10,000 queries, which fooled no image more.

    Args:
        n_iter: queries after the start, per sub-run (option `queries`).
        p_init: share of the pixels that the first squares cover; AutoAttack's 0.8 for both norms.
        futility: end a sub-run that cannot succeed any more at twice its present pace; the rule, what it was measured
            on and its risk are in `square_futility.py`. Only for objectives that are zero where the class changes.

    Example:
        >>> Square(n_iter=100).uses_gradient
        False
    """

    uses_gradient: ClassVar[bool] = False

    name: str = "square"
    n_iter: int = 5000
    objective: Objective = objective("margin")
    p_init: Annotated[float, Option("p_init", above=0, most=1)] = 0.8
    futility: Annotated[bool, Option("futility")] = True

    def exhaustive(self) -> LaneAttack:
        return replace(self, futility=False)

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        del run
        low, high = pixel_box(x0, threat.eps)
        linf = threat.norm == "Linf"
        x = square_linf.start(low, high, generator) if linf else square_l2.start(x0, threat, generator)
        columns = square_linf.DRAWS if linf else square_l2.DRAWS
        state = {
            "x0": x0,
            "x": x,
            "x_best": x.clone(),
            "loss_best": x0.new_full((1,), float("-inf")),
            "draws": torch.rand(1, self.n_iter, columns, generator=generator),
        }
        state |= {"low": low, "high": high} if linf else {}
        if not self._may_give_up:
            return state
        # Lanes that are taken up later join the state of those under way, which has the same entries.
        return state | square_futility.begin(x0) | {DONE: torch.zeros(1, dtype=torch.bool, device=x0.device)}

    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        del grad
        loss = loss.to(state["loss_best"].dtype)
        better = loss > state["loss_best"]
        state = state | {
            "x_best": torch.where(per_image(better, state["x"]), state["x"], state["x_best"]),
            "loss_best": torch.where(better, loss, state["loss_best"]),
        }
        if self._may_give_up:
            state |= square_futility.watch(state, state["loss_best"], better, step, self.n_iter)
            state[DONE] = square_futility.futile(state, step, self.n_iter)
        return state | {"x": self._propose(state, step, threat)}

    @property
    def _may_give_up(self) -> bool:
        return self.futility and self.objective.signed

    def _propose(self, state: State, step: Tensor, threat: ThreatModel) -> Tensor:
        best = state["x_best"]
        query = step.clamp_max(self.n_iter - 1)  # after the last query of a sub-run the proposal is not evaluated
        draws = state["draws"][torch.arange(len(query), device=query.device), query]
        sides = _sides(self.n_iter, self.p_init, threat.norm, best.shape[2], best.shape[3])
        side = sides.to(query.device)[query]
        if threat.norm == "Linf":
            return square_linf.propose(best, state["low"], state["high"], side, draws)
        return square_l2.propose(best, state["x0"], side, draws, threat)


ATTACKS["square"] = Square


@lru_cache(maxsize=32)
def _sides(n_iter: int, p_init: float, norm: str, height: int, width: int) -> Tensor:
    """Return the width of the square of every query, int64 [n_iter]; L2 windows are odd and at least 3 wide."""
    sides = []
    for query in range(n_iter):
        side = max(round(math.sqrt(square_share(query, n_iter, p_init) * height * width)), 1)
        if norm == "L2":
            side = max(side, 3)
            side += 1 - side % 2
        sides.append(min(side, height, width))
    return torch.tensor(sides)
