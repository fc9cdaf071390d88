"""Whether a walk along the boundary to a target class has shown that the class is out of reach.

FAB's walk tells at every step how far the image is from the boundary, linearised at the iterate. The iterates lie
beside the boundary, so within some ten steps these distances settle near the length of the shortest perturbation
that the full attack would find. A class is given up when every recent distance, and the shortest success so far,
exceed the radius by a factor that falls from 4 after 10 steps to 1.03 after 100 (`safety`).

Measured risk, over 866 walks to pairs of image and class (an adversarially trained and an undefended CIFAR-10 model,
the bundled model; Linf and L2; both objectives): what `reach` says after k steps exceeded the shortest perturbation
of the whole walk at most by a factor of 1.52 (k = 10), 1.34 (15), 1.24 (20), 1.14 (25) and 1.13 (30), so `safety`
allows at least 2.5 times the excess that was ever seen. No class within reach was given up, at any radius from
0.25/255 to 8/255. The rule is no proof: a boundary unlike its linearisation everywhere on the walk can hide, and
`futility=off` then helps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.attacks.base import State

FIRST_STEP = 10  # before it the distances still jump
_RECENT = 5
_SLACK = 300.0


def safety(step: Tensor) -> Tensor:
    """Return by which factor the distances must exceed the radius after so many steps: 1 + 300 / step^2, from 10 on.

    Example:
        >>> safety(torch.tensor([5, 10, 20, 100]))
        tensor([   inf, 4.0000, 1.7500, 1.0300])
    """
    steps = step.to(torch.float32)
    return torch.where(step >= FIRST_STEP, 1 + _SLACK / steps.clamp_min(1) ** 2, torch.inf)


def nothing_known(x0: Tensor) -> State:
    """Return the state of one lane [1, ...] before its first step: no distances, no success."""
    unknown = x0.new_full((1,), float("inf"))
    return {"distances": unknown[:, None].repeat(1, _RECENT), "shortest": unknown.clone()}


def learn(state: State, distance: Tensor, length: Tensor, success: Tensor) -> State:
    """Take in a step of the walk: distances from the linearised boundary, lengths of the points, which succeeded; [L].

    Only the latest distances are kept.
    """
    distances = torch.cat([state["distances"][:, 1:], distance[:, None]], dim=1)
    shortest = torch.where(success, torch.minimum(length, state["shortest"]), state["shortest"])
    return state | {"distances": distances, "shortest": shortest}


def reach(state: State) -> Tensor:
    """Return the least that the recent distances and the shortest success say of the boundary's distance, [L]."""
    return torch.minimum(state["distances"].amin(1), state["shortest"])


def out_of_reach(state: State, step: Tensor, eps: float) -> Tensor:
    """Return which lanes' targets lie out of reach, bool [L]; never where the walk has not crossed the boundary yet.

    Example:
        >>> state = nothing_known(torch.zeros(1, 2))
        >>> for _ in range(5):
        ...     state = learn(state, torch.tensor([0.5]), torch.tensor([0.6]), torch.tensor([True]))
        >>> [out_of_reach(state, torch.tensor([10]), eps).item() for eps in (0.1, 0.2)]
        [True, False]
    """
    return state["shortest"].isfinite() & (reach(state) > safety(step) * eps)
