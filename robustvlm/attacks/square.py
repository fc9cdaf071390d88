"""Square Attack: random search over square-shaped changes, forward passes only (Andriushchenko et al. 2020).

Source: arXiv 1912.00049, algorithms 1 to 3. It needs no gradient, so it also finds what a masked gradient hides.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from robustvlm.attacks import futility as square_futility
from robustvlm.attacks.base import ATTACKS, DONE, Job, LaneAttack, Option, State
from robustvlm.attacks.objectives import Objective, objective
from robustvlm.attacks.threat import ThreatModel, l2_norms, per_image, pixel_box, project
from robustvlm.core.device import sent
from robustvlm.core.seeds import row_sums

# Square windows of different sizes and places, one per lane, as masks and coordinates over the whole image


def offsets(draws: Tensor, side: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return (top, left) of each lane's window, uniform over all places where it fits.

    Args:
        draws: uniform numbers in [0, 1), [L, 2].
        side: width of the windows, int64 [L], at most the smaller side of the image.

    Example:
        >>> [place.item() for place in offsets(torch.tensor([[0.0, 0.999]]), torch.tensor([3]), 5, 6)]
        [0, 3]
    """
    top, left = (draws[:, axis].double() * (size - side + 1) for axis, size in enumerate((height, width)))
    return top.long(), left.long()


def relative(height: int, width: int, top: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Return every pixel's row and column counted from the window's corner, int64 [L, 1, H, 1] and [L, 1, 1, W]."""
    rows = torch.arange(height, device=top.device).view(1, 1, height, 1) - top.view(-1, 1, 1, 1)
    columns = torch.arange(width, device=left.device).view(1, 1, 1, width) - left.view(-1, 1, 1, 1)
    return rows, columns


def window(height: int, width: int, top: Tensor, left: Tensor, side: Tensor) -> Tensor:
    """Return the mask of each lane's window, bool [L, 1, H, W].

    Example:
        >>> one = torch.tensor([1])
        >>> window(3, 3, one, one, one)[0, 0].int().tolist()
        [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    """
    rows, columns = relative(height, width, top, left)
    sides = side.view(-1, 1, 1, 1)
    return (rows >= 0) & (rows < sides) & (columns >= 0) & (columns < sides)


def bits(numbers: Tensor, count: int) -> Tensor:
    """Return the lowest `count` bits of whole numbers [L] as bool [L, count, 1, 1]: one random sign per channel.

    Example:
        >>> bits(torch.tensor([5]), 3).flatten().tolist()
        [True, False, True]
    """
    shifts = torch.arange(count, device=numbers.device)
    return ((numbers[:, None] >> shifts) & 1).bool()[:, :, None, None]


# Proposals of the Linf Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049, algorithm 2), over lanes.
#
# Every point it visits is a corner of the ball cut with the pixel range: each colour value is the box's `low` or
# `high`.

LINF_DRAWS = 4  # columns of the table of random numbers: row, column, signs, replacement for signs without effect


def start_linf(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Return the first point: vertical stripes one pixel wide, a random end of the box per column and channel.

    Args:
        low, high: box of one image, [1, C, H, W].
    """
    signs = torch.rand(1, low.shape[1], 1, low.shape[3], generator=generator) < 0.5
    return torch.where(signs.to(low.device), high, low)


def propose_linf(best: Tensor, low: Tensor, high: Tensor, side: Tensor, draws: Tensor) -> Tensor:
    """Return the best points with one square each moved to an end of the box per channel.

    A square whose draw repeats what is there already would waste a query; it gets one of the other sign patterns,
    drawn uniformly (*our reading* of the authors' code, which draws again until something changes).

    Args:
        best, low, high: [L, C, H, W].
        side: width of each lane's square, int64 [L].
        draws: uniform numbers in [0, 1), [L, DRAWS].

    Example:
        >>> low, high = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
        >>> propose_linf(low, low, high, torch.tensor([2]), torch.tensor([[0.0, 0.99, 0.9, 0.0]]))[0, 0, :2].tolist()
        [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    _, channels, height, width = best.shape
    inside = window(height, width, *offsets(draws[:, :2], side, height, width), side)
    patterns = 2**channels
    drawn = (draws[:, 2] * patterns).long()
    x = _paint(best, low, high, inside, bits(drawn, channels))
    idle = (x == best).flatten(1).all(1)
    other = drawn ^ (1 + (draws[:, 3] * (patterns - 1)).long())
    return _paint(best, low, high, inside, bits(torch.where(idle, other, drawn), channels))


def _paint(best: Tensor, low: Tensor, high: Tensor, inside: Tensor, signs: Tensor) -> Tensor:
    return torch.where(inside, torch.where(signs, high, low), best)


# Proposals of the L2 Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049, algorithm 3), over lanes

L2_DRAWS = 6  # columns of the table of random numbers: two window corners, signs, orientation
_TILES = 5  # the start covers the image with tiles of a fifth of its side
_TINY = 1e-12


def start_l2(x0: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """Return the first point for one image [1, C, H, W]: a grid of bumps with random signs and orientations."""
    _, channels, height, width = x0.shape
    side = max(min(height, width) // _TILES, 1)
    delta = torch.zeros_like(x0)
    top, left = (height % side) // 2, (width % side) // 2
    rows, columns = range(top, height - side + 1, side), range(left, width - side + 1, side)
    places = [(row, column) for row in rows for column in columns]
    draws = torch.rand(len(places), channels + 1, generator=generator) < 0.5
    for (row, column), (turned, *signs) in zip(places, draws.tolist(), strict=True):
        at, across, size = (torch.tensor([value]) for value in (row, column, side))
        tile = bump(height, width, at, across, size, torch.tensor([turned])).to(x0)
        delta += tile * (torch.tensor(signs).to(x0).view(1, -1, 1, 1) * 2 - 1)
    return on_sphere(delta, x0, threat)


def propose_l2(best: Tensor, x0: Tensor, side: Tensor, draws: Tensor, threat: ThreatModel) -> Tensor:
    """Return the best points with the perturbation of one window moved into another, shaped as a two-sided bump.

    In the first window the new perturbation is the sum of the old one and a bump of random sign, both normalised, with
    the norm that both windows had, plus the part of eps^2 that clipping had left unused; the second window is emptied.

    Args:
        best, x0: [L, C, H, W].
        side: width of each lane's windows, int64 [L].
        draws: uniform numbers in [0, 1), [L, DRAWS].
    """
    _, channels, height, width = best.shape
    delta = best - x0
    corner, corner2 = (offsets(draws[:, at : at + 2], side, height, width) for at in (0, 2))
    first, second = (window(height, width, *place, side) for place in (corner, corner2))
    signs = bits((draws[:, 4] * 2**channels).long(), channels).to(best.dtype) * 2 - 1
    shape = bump(height, width, *corner, side, draws[:, 5] < 0.5).to(best.dtype)
    moved = shape * signs + _unit(delta * first)
    unused = (threat.eps**2 - l2_norms(delta) ** 2).clamp_min(0) / channels
    available = (_energy(delta * (first | second)) + per_image(unused, delta)).sqrt()
    delta = torch.where(first, _unit(moved) * available, torch.where(second, torch.zeros_like(delta), delta))
    return on_sphere(delta, x0, threat)


def bump(height: int, width: int, top: Tensor, left: Tensor, side: Tensor, turned: Tensor) -> Tensor:
    """Return eq. 2 of the paper as images [L, 1, H, W], zero outside the window and of norm 1.

    One half of the window is positive and the other negative, each with a peak at its centre that falls off in
    square rings; `turned` [L] exchanges rows and columns.

    Example:
        >>> corner = torch.tensor([0])
        >>> values = bump(2, 2, corner, corner, torch.tensor([2]), torch.tensor([False]))
        >>> [[round(value, 3) for value in row] for row in values[0, 0].tolist()]
        [[0.139, 0.693], [-0.139, -0.693]]
    """
    rows, columns = relative(height, width, top, left)
    inside = window(height, width, top, left, side)
    sides, turn = side.view(-1, 1, 1, 1), turned.view(-1, 1, 1, 1)
    across, along = torch.where(turn, columns, rows), torch.where(turn, rows, columns)
    upper = across < sides // 2
    half = torch.where(upper, sides // 2, sides - sides // 2)
    ring = torch.maximum(
        (torch.where(upper, across, across - sides // 2) - half // 2).abs(), (along - sides // 2).abs()
    )
    rings = torch.maximum(half // 2, sides // 2) + 1
    sums = _sums_of_squares(max(height, width) + 1, ring.device)
    values = torch.where(inside, sums[rings] - sums[ring.clamp_max(max(height, width))], 0.0)
    above, below = values * (inside & upper), values * (inside & ~upper)
    return _unit(_unit(above) - _unit(below))


def on_sphere(delta: Tensor, x0: Tensor, threat: ThreatModel) -> Tensor:
    """Return x0 + delta with delta scaled to length eps, clipped to [0, 1]; never outside the ball."""
    scale = threat.eps / l2_norms(delta).clamp_min(_TINY)
    return project(x0 + delta * per_image(scale, delta), x0, threat)


def _energy(values: Tensor) -> Tensor:
    """Return the sum of squares of every channel of every image, [L, C, H, W] -> [L, C, 1, 1]."""
    return row_sums((values * values).flatten(0, 1)).view(*values.shape[:2], 1, 1)


def _unit(values: Tensor) -> Tensor:
    """Normalise every channel of every image; zeros stay zeros."""
    return values / _energy(values).sqrt().clamp_min(_TINY)


@lru_cache(maxsize=32)
def _sums_of_squares(count: int, device: torch.device) -> Tensor:
    """Return s[k] = sum over m = 1..k of 1 / m^2, for k = 0..count, rounded to float32 at the end."""
    terms = 1 / torch.arange(1, count + 1, dtype=torch.float64) ** 2
    return sent(torch.cat([torch.zeros(1), terms.cumsum(0).float()]), device)


# Square Attack: random search over square-shaped changes, forward passes only (Andriushchenko et al. 2020)

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
            on and its risk are in `futility.py`. Only for objectives that are zero where the class changes.

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
        x = start_linf(low, high, generator) if linf else start_l2(x0, threat, generator)
        columns = LINF_DRAWS if linf else L2_DRAWS
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

    def told(self, state: State, job: Job) -> State:
        # Margins compare with losses that are margins.
        if not self._may_give_up or self.objective.name != "margin" or DONE not in state:
            return state  # a subclass of a user's may begin with another state
        return state | square_futility.knowing(state, job.reached)

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

    def foresee(self, state: State, step: Tensor, threat: ThreatModel) -> Tensor:
        # Most proposals are turned down; the next one then starts from the same best point.
        return self._propose(state, step, threat)

    @property
    def _may_give_up(self) -> bool:
        return self.futility and self.objective.signed

    def _propose(self, state: State, step: Tensor, threat: ThreatModel) -> Tensor:
        best = state["x_best"]
        query = step.clamp_max(self.n_iter - 1)  # after the last query of a sub-run the proposal is not evaluated
        draws = state["draws"][torch.arange(len(query), device=query.device), query]
        sides = _sides(self.n_iter, self.p_init, threat.norm, best.shape[2], best.shape[3], query.device)
        side = sides[query]
        if threat.norm == "Linf":
            return propose_linf(best, state["low"], state["high"], side, draws)
        return propose_l2(best, state["x0"], side, draws, threat)


ATTACKS["square"] = Square


@lru_cache(maxsize=32)
def _sides(n_iter: int, p_init: float, norm: str, height: int, width: int, device: torch.device) -> Tensor:
    """Return the width of the square of every query, int64 [n_iter]; L2 windows are odd and at least 3 wide."""
    sides = []
    for query in range(n_iter):
        side = max(round(math.sqrt(square_share(query, n_iter, p_init) * height * width)), 1)
        if norm == "L2":
            side = max(side, 3)
            side += 1 - side % 2
        sides.append(min(side, height, width))
    return sent(torch.tensor(sides), device)
