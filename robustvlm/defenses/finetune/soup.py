"""Model soups: the average of the weights of models that were tuned from one (Wortsman et al. 2022, 2203.05482)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.errors import UserError

State = Mapping[str, Tensor]


def require_alike(states: Sequence[tuple[str, State]]) -> None:
    """Refuse models of different architectures; raise UserError that names the first difference.

    Example:
        >>> require_alike([("a", {"w": torch.ones(2)}), ("b", {"w": torch.ones(3)})])
        Traceback (most recent call last):
        robustvlm.errors.UserError: 'a' and 'b' are of different architectures ('w' is [2] and [3]): a soup needs one
    """
    (first, own), *others = states
    for name, state in others:
        only = sorted(own.keys() ^ state.keys())
        if only:
            who = first if only[0] in own else name
            raise UserError(_different(first, name, f"'{only[0]}' is only in '{who}'"))
        for key, value in own.items():
            if value.shape != state[key].shape:
                shapes = f"'{key}' is {list(value.shape)} and {list(state[key].shape)}"
                raise UserError(_different(first, name, shapes))


def _different(first: str, other: str, why: str) -> str:
    return f"'{first}' and '{other}' are of different architectures ({why}): a soup needs one"


def averaged(states: Sequence[State]) -> dict[str, Tensor]:
    """Return the mean of every tensor, taken in float64; whole numbers are those of the first.

    Example:
        >>> averaged([{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}])
        {'w': tensor([0.5000])}
    """
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in states[0].items()
    }


@dataclass(frozen=True)
class Tasting:
    """One step of a greedy soup: the model that was tried, the measure with it, and whether it stayed."""

    name: str
    value: float
    kept: bool


def greedy(
    states: Sequence[tuple[str, State]], measure: Callable[[State], float]
) -> tuple[dict[str, Tensor], list[Tasting]]:
    """Return the greedy soup: best model first, each further one stays if the average is no worse (Recipe 1).

    Args:
        measure: of a set of weights, the larger the better, on images that chose nothing else.

    Example:
        >>> states = [(str(i), {"w": torch.tensor([float(i)])}) for i in range(3)]
        >>> soup, steps = greedy(states, lambda state: -abs(float(state["w"]) - 0.4))
        >>> soup["w"], [(step.name, step.kept) for step in steps]
        (tensor([0.5000]), [('0', True), ('1', True), ('2', False)])
    """
    alone = sorted(((measure(state), -i) for i, (_, state) in enumerate(states)), reverse=True)
    best, order = alone[0][0], [-i for _, i in alone]
    chosen = [states[order[0]][1]]
    steps = [Tasting(states[order[0]][0], best, True)]
    for i in order[1:]:
        value = measure(averaged([*chosen, states[i][1]]))
        kept = value >= best
        steps.append(Tasting(states[i][0], value, kept))
        if kept:
            best = value
            chosen.append(states[i][1])
    return averaged(chosen), steps
