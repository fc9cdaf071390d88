"""Whether a walk along the boundary to a target class has shown that the class is out of reach.

FAB's walk tells at every step how far the image is from the boundary, linearised at the iterate. The iterates lie
beside the boundary, so within some ten steps these distances settle near the length of the shortest perturbation
that the full attack would find. A class is given up when every recent distance, and the shortest success so far,
exceed the radius by a factor that falls from 3 after 10 steps to 1.02 after 100 (`safety`).

The factor was chosen on an adversarially trained CIFAR-10 model and left as it was for an undefended one and for the
bundled model. Over some 600 pairs of image and class, what `reach` said after k steps exceeded the shortest
perturbation of 40 to 60 steps at most by a factor of 1.5 (k = 10), 1.27 (15), 1.19 (20), 1.08 (25) and 1.04 (30): the
excess that `safety` allows is 2.5 times as large at the least, and at no radius from 0.25/255 to 8/255 a class within
reach was given up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.attacks.base import State

FIRST_STEP = 10  # before it the distances still jump
_RECENT = 5
_SLACK = 200.0


def safety(step: Tensor) -> Tensor:
    """Return by which factor the distances must exceed the radius after so many steps: 1 + 200 / step^2, from 10 on.

    Example:
        >>> safety(torch.tensor([5, 10, 20, 100]))
        tensor([   inf, 3.0000, 1.5000, 1.0200])
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
