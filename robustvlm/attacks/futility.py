"""When to give an attack up: a class that a walk has shown out of reach, a search that cannot succeed in time.

FAB's walk tells at every step how far the image is from the boundary, linearised at the iterate. The iterates lie
beside the boundary, so within some ten steps these distances settle near the length of the shortest perturbation
that the full attack would find. A class is given up when the five latest distances, and the shortest success so far,
exceed the radius by a factor that falls from 3.2 after 6 steps to 1.05 after 100 (`safety`).

Measured risk, over 1,755 walks of the margin to pairs of image and class (an adversarially trained and an undefended
CIFAR-10 model, the bundled robust model; Linf and L2): what `reach` says after k steps exceeded the shortest
perturbation of the whole walk at most by a factor of 1.39 (k = 6), 1.32 (10 to 15), 1.24 (20), 1.11 (30), 1.08 (50) and
1.03 (60), so `safety` allows at least 2.5 times the excess that was ever seen. No class within reach was given up, at
any radius from 0.5/255 to 8/255. Walks of DLR, whose quotient changes along the way, erred by factors up to 3, and are
not trusted: the look of `apgd-t` walks by the margin, and `fab-t:objective=dlr-t` gives nothing up. The rule is no
proof: a boundary unlike its linearisation everywhere on the walk can hide, and `futility=off` then helps.
`python -m benchmarks.futility` measures it on any model.
Nothing is given up for goals whose loss does not tell success (`Goal.tells`).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from robustvlm.attacks.base import BEYOND, DONE, State
from robustvlm.core.device import sent

# Whether a walk along the boundary to a target class has shown that the class is out of reach

FIRST_STEP = 6  # before it too few distances are known
_RECENT = 5
_EARLY, _LATE = 13.0, 500.0


def safety(step: Tensor) -> Tensor:
    """Return by which factor the distances must exceed the radius after so many steps.

    It is 1 + min(13 / step, 500 / step^2), from 6 on.

    Example:
        >>> safety(torch.tensor([5, 10, 20, 100]))
        tensor([   inf, 2.3000, 1.6500, 1.0500])
    """
    steps = step.to(torch.float32).clamp_min(1)
    return torch.where(step >= FIRST_STEP, 1 + torch.minimum(_EARLY / steps, _LATE / steps**2), torch.inf)


def nothing_known(x0: Tensor) -> State:
    """Return the state of one lane [1, ...] before its first step: no distances, no success."""
    unknown = x0.new_full((1,), float("inf"))
    known = {"distances": unknown[:, None].repeat(1, _RECENT), "shortest": unknown.clone()}
    return known | {DONE: torch.zeros(1, dtype=torch.bool), BEYOND: x0.new_zeros(1)}


def learn(state: State, distance: Tensor, length: Tensor, loss: Tensor) -> State:
    """Take in a step of the walk: distances from the linearised boundary, lengths of the points, their losses; [L].

    Only the latest distances are kept. A loss that is not finite says nothing: the model may break down outside the
    ball.
    """
    told = loss.isfinite()
    distances = torch.cat([state["distances"][:, 1:], distance[:, None]], dim=1)
    shortest = torch.where(told & (loss > 0), torch.minimum(length, state["shortest"]), state["shortest"])
    return state | {"distances": torch.where(told[:, None], distances, state["distances"]), "shortest": shortest}


def reach(state: State) -> Tensor:
    """Return the least that the recent distances and the shortest success say of the boundary's distance, [L]."""
    return torch.minimum(state["distances"].amin(1), state["shortest"])


def beyond(state: State, step: Tensor) -> Tensor:
    """Return the radius within which a lane's target is out of reach, [L]; 0 where the walk has not shown any."""
    return torch.where(state["shortest"].isfinite(), reach(state) / safety(step), 0)


def out_of_reach(state: State, step: Tensor, eps: float) -> Tensor:
    """Return which lanes' targets lie out of reach, bool [L]; never where the walk has not crossed the boundary yet.

    Example:
        >>> state = nothing_known(torch.zeros(1, 2))
        >>> for _ in range(5):
        ...     state = learn(state, torch.tensor([0.5]), torch.tensor([0.6]), torch.tensor([1.0]))
        >>> [out_of_reach(state, torch.tensor([10]), eps).item() for eps in (0.1, 0.25)]
        [True, False]
    """
    return state["shortest"].isfinite() & (reach(state) > safety(step) * eps)


# When to give up a random search: its best loss so far, watched at even intervals, cannot reach zero in time.
#
# The rule: with `n` queries in all, of which `q` are made, a search is futile if the loss would stay below zero even at
# twice the pace of the latest half of its queries (from q/2 to q), kept up to the end. It is asked every n/40 queries,
# from query max(n/10, 500) on, and it is silent where such an extrapolation has nothing to stand on:
#
# * fewer than 5 of the latest half's queries were improvements (flat or coarsely rounded outputs: a jump may come);
# * the pace grows, to more than 1.5 times that of the quarter before (saturated outputs fall slowly, then suddenly);
# * outputs look like probabilities (margin at most 1) and the same extrapolation in log-odds does reach zero.
#
# Attacks with gradients go before it in AutoAttack, so that it has to find what gradients hide. As long as it is behind
# them (its best loss is below theirs), they are not known to hide anything, and the pace is expected to go on falling
# as it fell from the quarter before (q/4 to q/2) to the latest half: a pace that falls as q^-d has d = log2 of their
# ratio; of this d the standard error of the numbers of improvements in both is taken off, and what is left is kept
# between 0 (even) and 1 (a loss that grows as the logarithm of the queries, as that of random search does). The search
# then ends where twice that pace would not lead to success, and it is asked twice as often, every n/80 queries.
#
# Measured by replaying the rule on full searches of 5000 queries, on CIFAR-10 models (undefended at Linf 1/255,
# adversarially trained at Linf 4/255, 8/255 and L2 0.5) and on small CIFAR-10 networks (plain, adversarially trained,
# with rounded pixels and so without a gradient, with saturated probabilities). 99 searches succeeded after query 500,
# and none of them would have been given up at an even pace, so with 95 % confidence fewer than 3 % of such late
# successes are lost. The falling pace would have lost one of 27 (at 8/255, on an image that APGD-CE fools), which is
# why it is for searches behind gradients alone: on the 44 images that APGD-CE and APGD-T left alone at 4/255 and 8/255
# the whole budget fooled none, and came further than gradients on 4. There searches end after 721 queries instead of
# 1125 (4/255), 938 instead of 1420 (8/255). On another training of that model (34 images left alone at 4/255, none of
# them fooled) they end after 737 queries, asked every n/80, 787 every n/40, and 1151 at an even pace.
# `square:futility=off` switches the rule off; `python -m benchmarks.futility` measures it on any model.

_INTERVALS = 320  # how finely a search is recorded
FIRST_QUERY = 500  # before this, a search is too young to judge
_SAFETY = 2.0
_STEADY = 1.5
_IMPROVEMENTS = 5


def begin(like: Tensor) -> State:
    """Return the empty record of one lane, on the device of `like`."""
    return {
        "watched_loss": torch.full((1, _INTERVALS + 1), float("-inf"), dtype=torch.float64, device=like.device),
        "watched_rises": torch.zeros(1, _INTERVALS + 1, device=like.device),
        "by_gradients": torch.full((1,), float("-inf"), dtype=torch.float64, device=like.device),
    }


def knowing(state: State, reached: float) -> State:
    """Return the record of one lane with the lowest margin that attacks with gradients have brought its image to."""
    return {"by_gradients": torch.full_like(state["by_gradients"], -reached)}


def watch(state: State, best: Tensor, better: Tensor, step: Tensor, n_iter: int) -> State:
    """Write down the best loss [L] after `step` queries [L] of `n_iter`, and whether the latest one improved it [L]."""
    slots = _slots(n_iter, step.device)
    now = slots[step][:, None]
    # The count goes on from the interval of the query before.
    rises = state["watched_rises"].gather(1, slots[(step - 1).clamp_min(0)][:, None]) + better[:, None]
    return {
        "watched_loss": state["watched_loss"].scatter(1, now, best.double()[:, None]),
        "watched_rises": state["watched_rises"].scatter(1, now, rises.to(state["watched_rises"].dtype)),
    }


def futile(state: State, step: Tensor, n_iter: int) -> Tensor:
    """Return which lanes cannot reach a loss of zero in time, bool [L]; false between the points where it is asked."""
    often, seldom = _due(n_iter, step.device)
    slots = _slots(n_iter, step.device)[step]
    places = [(slots // part)[:, None] for part in (4, 2, 1)]
    quarter, half, now = losses = [state["watched_loss"].gather(1, place).squeeze(1) for place in places]
    before, latest = torch.stack([state["watched_rises"].gather(1, place).squeeze(1) for place in places]).diff(dim=0)
    steady = (now - half) <= _STEADY * 2 * (half - quarter)
    doubt = (1 / before.clamp_min(1) + 1 / latest.clamp_min(1)).sqrt() / math.log(2)
    behind = now < state["by_gradients"]
    due = torch.where(behind, often[step], seldom[step])
    doubt = torch.where(behind, doubt, torch.inf)
    far = _out_of_reach(losses, doubt, step, n_iter)
    bounded = state["watched_loss"][:, 0] >= -1
    far &= ~bounded | _out_of_reach([_log_odds(loss) for loss in losses], doubt, step, n_iter)
    return due & steady & (latest >= _IMPROVEMENTS) & far


def _out_of_reach(losses: Sequence[Tensor], doubt: Tensor, step: Tensor, n_iter: int) -> Tensor:
    """Return where the loss stays below zero at _SAFETY times the pace to be expected; false where undefined.

    Args:
        losses: the best after a quarter, after half and after all of the queries made, [L] each.
        doubt: what is taken off the number d, [L]; infinite for an even pace.
    """
    quarter, half, now = losses
    pace, before = (now - half) / (step / 2).clamp_min(1), (half - quarter) / (step / 4).clamp_min(1)
    falls = ((before / pace).log2() - doubt).nan_to_num(0, posinf=0).clamp(0, 1)
    # The integral of (t / q)^-d from q to n, which is q log(n / q) at d = 1.
    even = (1 - falls).clamp_min(1e-9)
    left = step * torch.expm1(even * (n_iter / step.clamp_min(1)).log()) / even
    return now + _SAFETY * pace * left < 0


def _log_odds(loss: Tensor) -> Tensor:
    return 2 * torch.atanh(loss.clamp(-1, 1))


@lru_cache(maxsize=32)
def _slots(n_iter: int, device: torch.device) -> Tensor:
    """Return the interval that every number of queries falls into, int64 [n_iter + 1]; 0 is the start alone."""
    return sent(-(-torch.arange(n_iter + 1) * _INTERVALS // n_iter), device)


@lru_cache(maxsize=32)
def _due(n_iter: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return after which numbers of queries the rule is asked, bool [n_iter + 1]: behind gradients, and elsewhere.

    That is at every fourth interval's end, and at every eighth.
    """
    slots, steps = _slots(n_iter, torch.device("cpu")), torch.arange(n_iter + 1)
    ends = torch.cat([slots[1:] != slots[:-1], torch.tensor([False])])
    old = ends & (slots >= _INTERVALS // 10) & (steps >= FIRST_QUERY)
    return sent(old & (slots % 4 == 0), device), sent(old & (slots % 8 == 0), device)
