"""FAB: the shortest perturbation that changes the class, found along the boundary (Croce & Hein 2020)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from robustvlm.attacks.base import ATTACKS, BEYOND, DONE, MOST, LaneAttack, Option, State
from robustvlm.attacks.futility import beyond, learn, nothing_known, out_of_reach
from robustvlm.attacks.objectives import Objective, objective, require_signed
from robustvlm.attacks.threat import ThreatModel, lengths, per_image, random_start
from robustvlm.core.seeds import row_sums

# Projection onto a hyperplane inside the pixel box, the step of boundary attacks (Croce & Hein 2020, section 3.2).
#
# Wanted, for every lane on its own, is the shortest delta with <w, delta> = gap and 0 <= x + delta <= 1. Pixel i can be
# moved by at most `room_i` in the direction that helps (the one of sign(gap) w_i), and the shortest delta moves it by
#
#     min(t, room_i)  in Linf norm,        min(t |w_i|, room_i)  in L2 norm,
#
# with one level t for all pixels: the least one at which the gap is closed. The level that closes the gap is found by
# fixing variables (Kiwiel 2008, "Variable fixing algorithms for the continuous quadratic knapsack problem"): solve as
# if no pixel met its bound, fix the pixels that did, solve for the rest, until no further pixel is fixed. The level
# rises from round to round, so a fixed pixel stays fixed and the result is exact after finitely many rounds; in
# practice a handful, where sorting the pixels by their bounds would cost more than the rest of the attack.


# Rounds after which a GPU is asked whether there is anything left to fix.
_UNASKED = 8


def step_to_plane(x: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    """Return the shortest delta [B, ...] with <normal, delta> = gap that keeps x + delta in [0, 1].

    Where no point of the box reaches the plane, the result leads to the box's point nearest to it: every pixel with a
    nonzero normal goes to its bound. A normal of zero gives a delta of zero.

    Args:
        x: points [B, ...] in the box [0, 1].
        normal: normals w of the planes, like `x`.
        gap: what <w, x> lacks to reach the plane, [B], either sign.
        norm: "Linf" or "L2", the length to be kept short.

    Example:
        >>> x, w = torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 1.0]])
        >>> step_to_plane(x, w, torch.tensor([0.4]), "Linf")
        tensor([[0.3000, 0.1000]])
    """
    w, flat = normal.flatten(1), x.flatten(1)
    # The plane is the same for any multiple of its normal and gap; this one's squares neither under- nor overflow.
    size = w.abs().amax(1).clamp_min(torch.finfo(w.dtype).tiny)
    w, gap = w / size[:, None], gap / size
    direction = w.sign() * gap.sign()[:, None]
    weight = w.abs()
    # A point that rounding left a hair outside the box has no room rather than a negative one.
    room = torch.where(direction > 0, 1 - flat, flat).clamp_min(0)
    room = torch.where(direction == 0, 0, room)
    speed = torch.ones_like(weight) if norm == "Linf" else weight
    level = _level(weight, speed, room, gap.abs())[:, None]
    # Infinite levels mean that every pixel goes as far as it can, also one whose speed underflowed to zero.
    moved = torch.where(level.isinf(), room, torch.minimum(level * speed, room))
    return (direction * moved).reshape(x.shape)


def _level(weight: Tensor, speed: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """Return the least t >= 0 [B] with sum_i weight_i min(t speed_i, room_i) = gap, infinite where there is none."""
    rate, capacity = weight * speed, weight * room
    free = (rate > 0) & (room > 0)
    for turn in itertools.count(1):
        left = gap - row_sums(torch.where(free, 0, capacity))
        slope = row_sums(torch.where(free, rate, 0))
        level = torch.where(slope > 0, left / slope, torch.where(left > 0, torch.inf, 0.0))
        still_free = free & (level[:, None] * speed <= room)
        # A further round changes nothing where none is needed, and costs a GPU less than to be asked.
        if (free.device.type != "cuda" or turn % _UNASKED == 0) and torch.equal(still_free, free):
            break
        free = still_free
    return level.clamp_min(0)


# One step along a linearised decision boundary, and what it tells of the boundary's distance from the image

_TINY = 1e-12  # makes the bias 0 where neither step moves anything


def boundary_step(
    x0: Tensor,
    x: Tensor,
    loss: Tensor,
    grad: Tensor,
    norm: str,
    *,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """Return the next point of FAB's walk, and the distance of the image from the linearised boundary.

    The boundary is where the objective is zero, linearised at `x`: the hyperplane of all z with
    loss + <grad, z - x> = 0. From `x`, or where the loss is positive from a point pulled back towards the image, the
    walk goes `eta` times the way to the hyperplane's nearest point in the pixel box, mixed with the same step from
    the image (arXiv 1907.02044, equations 8 and 9).

    Args:
        x0: images [B, ...].
        x: points [B, ...], evaluated to `loss` [B] with gradients `grad` [B, ...].
        norm: "Linf" or "L2".
        alpha_max: largest share of the step from the image.
        eta: overshoot.
        beta: share of the distance to the image that is left after a success.

    Example:
        >>> x0, w = torch.full((1, 2), 0.5), torch.tensor([[1.0, 1.0]])
        >>> x, distance = boundary_step(x0, x0, torch.tensor([-0.2]), w, "Linf", eta=1.0)
        >>> x, distance
        (tensor([[0.6000, 0.6000]]), tensor([0.1000]))
    """
    loss = loss.to(x.dtype)
    start = torch.where(per_image(loss > 0, x), x0 + beta * (x - x0), x)
    ahead, home = (step_to_plane(z, grad, -loss - _dot(grad, z - x), norm) for z in (start, x0))
    far, near = lengths(ahead, norm), lengths(home, norm)
    bias = per_image((far / (far + near).clamp_min(_TINY)).clamp_max(alpha_max), x)
    return ((1 - bias) * (start + eta * ahead) + bias * (x0 + eta * home)).clamp(0, 1), near


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return row_sums(a * b)


# FAB: the shortest perturbation that changes the class, found along the boundary (Croce & Hein 2020)


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
        futility: end a target's sub-run when its boundary is out of reach (rule and measured risk: `futility`).
            Without effect untargeted, where the class that the walk leads to may still change, and for `dlr-t`, whose
            linearised boundaries say too little of distances.

    Example:
        >>> FAB().n_runs(n_classes=5)
        4
    """

    walks_boundary: ClassVar[bool] = True

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
        require_signed(self.name, self.objective)

    @property
    def leaves_ball(self) -> bool:
        return True

    def n_runs(self, n_classes: int) -> int:
        if self.n_targets is None:
            return self.n_restarts
        return self.n_restarts * min(self.n_targets, n_classes - 1)

    def walk_points(self, run: int) -> int:
        return self.n_points() if self._gives_up() and not self._begins_away(run) else 0

    def target_rank(self, run: int) -> int:
        return 0 if self.n_targets is None else run // self.n_restarts

    def away_from_image(self) -> FAB:
        return replace(self, random_start=True)

    def exhaustive(self) -> FAB:
        return replace(self, futility=False)

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        away = self._begins_away(run)
        x = random_start(x0, ThreatModel(threat.norm, threat.eps / 2), generator) if away else x0.clone()
        state = {"x0": x0, "x": x, DONE: torch.zeros(1, dtype=torch.bool, device=x0.device)}
        return state | nothing_known(x0) if self._gives_up() else state

    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        x0, x = state["x0"], state["x"]
        moved, distance = boundary_step(
            x0, x, loss, grad, threat.norm, alpha_max=self.alpha_max, eta=self.eta, beta=self.beta
        )
        # Outside the ball the model may break down: the walk learns nothing there, and goes half of its way back.
        lost = ~loss.isfinite()
        state = state | {"x": torch.where(per_image(lost, x), (x0 + x) / 2, moved)}
        if not self._gives_up():
            return state
        known = learn(state, distance, lengths(x - x0, threat.norm), loss)
        return known | {
            DONE: ~lost & out_of_reach(known, step, threat.eps),
            BEYOND: torch.where(lost, 0, beyond(known, step)),
        }

    def _begins_away(self, run: int) -> bool:
        return self.random_start or run % self.n_restarts > 0

    def _gives_up(self) -> bool:
        return self.futility and self.n_targets is not None and self.objective.name == "margin-t"


ATTACKS["fab-t"] = FAB
ATTACKS["fab"] = lambda: FAB(name="fab", objective=objective("margin"), n_targets=None)
