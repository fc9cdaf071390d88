"""Objectives: what an attack maximises, one number per image, as functions of the logits.

| name           | formula (to be maximised)                                        | classes |
|----------------|------------------------------------------------------------------|---------|
| `ce`           | -log softmax(z)_y                                                | >= 2    |
| `dlr`          | -(z_y - max_{i != y} z_i) / (z_(1) - z_(3))                      | >= 3    |
| `margin`       | max_{i != y} z_i - z_y                                           | >= 2    |
| `ce-t`         | log softmax(z)_t                                                 | >= 2    |
| `dlr-t`        | -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)                     | >= 4    |
| `margin-t`     | z_t - z_y                                                        | >= 2    |

z_(i) is the i-th largest logit, y the label, t the target. `dlr` and `dlr-t` are from Croce & Hein 2020
(arXiv 2003.01690, eq. 6 and 7). They divide by a spread of logits that does not exist for few classes; the
stated fallback is `margin` / `margin-t` for two classes, and z_(1) - z_(3) as the spread of `dlr-t` for three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.device import sent
from robustvlm.errors import UserError, nearest

# Keeps the quotient finite when the leading logits coincide; far below any spread that a model produces.
_TINY = 1e-12


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """Return z_y - max_{i != y} z_i per image: positive exactly when the image is classified right.

    Example:
        >>> import torch
        >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).item()
        1.0
    """
    right = logits.gather(1, label[:, None]).squeeze(1)
    others = logits.scatter(1, label[:, None], float("-inf"))
    return right - others.amax(1)


def _pick(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index[:, None]).squeeze(1)


def _cross_entropy(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    del target
    return F.cross_entropy(logits, label, reduction="none")


def _cross_entropy_targeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    del label
    return -F.cross_entropy(logits, target, reduction="none")


def _margin_untargeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    del target
    return -margin(logits, label)


def _margin_targeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return _pick(logits, target) - _pick(logits, label)


def _dlr(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    del target
    if logits.shape[1] < 3:
        return -margin(logits, label)
    top = logits.topk(3, dim=1).values
    return -margin(logits, label) / (top[:, 0] - top[:, 2] + _TINY)


def _dlr_targeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    gain = _margin_targeted(logits, label, target)
    n_classes = logits.shape[1]
    if n_classes < 3:
        return gain
    top = logits.topk(min(4, n_classes), dim=1).values
    reference = top[:, 2] if n_classes == 3 else 0.5 * (top[:, 2] + top[:, 3])
    return gain / (top[:, 0] - reference + _TINY)


@dataclass(frozen=True)
class Objective:
    """A named function (logits [B, K], label [B], target [B]) -> loss [B] that an attack maximises.

    Args:
        boundary: an attack walks along where it is zero, so that a goal is asked for its `boundary` by it, not for its
            loss.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])
        >>> objective("margin")(z, y, y).item()
        -1.0
    """

    name: str
    targeted: bool
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    boundary: bool = False

    def __call__(self, logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
        return self.function(logits, label, target)

    @property
    def at_boundary(self) -> Objective:
        """The same for attacks that walk along where it is zero."""
        return replace(self, boundary=True)

    @property
    def signed(self) -> bool:
        """Whether the loss is positive exactly where the attack has succeeded (for the target, if there is one)."""
        return not self.name.startswith("ce")

    def fallback(self, n_classes: int) -> str | None:
        """Say what replaces the published formula when there are too few classes for it, or None."""
        if self.name == "dlr" and n_classes < 3:
            return "DLR needs 3 classes: with 2 the margin takes its place"
        if self.name == "dlr-t" and n_classes < 3:
            return "targeted DLR needs 4 classes: with 2 the margin takes its place"
        if self.name == "dlr-t" and n_classes == 3:
            return "targeted DLR needs 4 classes: with 3 it is scaled by the spread of the first and third logit"
        return None


@dataclass(frozen=True)
class Mixture:
    """Objectives of the rows of one batch, where these belong to several attacks: `of` has the number of each row's.

    Args:
        walking: rows whose loss is the margin of their target instead, bool [B] on the model's device; None: none.
    """

    objectives: tuple[Objective, ...]
    of: Sequence[int]
    walking: Tensor | None = None

    def rows(self, first: int, after: int) -> Mixture | Objective:
        """Return what a part of the rows maximises."""
        of = self.of[first:after]
        if self.walking is not None:
            return Mixture(self.objectives, of, self.walking[first:after])
        return self.objectives[of[0]] if len(set(of)) == 1 else Mixture(self.objectives, of)

    def loss(self, loss_of: Callable[[Objective, Tensor], Tensor]) -> Tensor:
        """Return the loss of every row [B]; `loss_of` gives it for an objective and the rows with these numbers [B].

        It is asked for all B rows each time, those of the objective over and over, so that a row's loss comes from the
        same kernels as in a batch that is all of one objective.
        """
        if len(set(self.of)) == 1:
            found = loss_of(self.objectives[self.of[0]], torch.arange(len(self.of)))
        else:
            found = self._mixed(loss_of)
        if self.walking is None:
            return found
        walked = loss_of(objective("margin-t").at_boundary, torch.arange(len(self.of)))
        return torch.where(self.walking, walked, found)

    def _mixed(self, loss_of: Callable[[Objective, Tensor], Tensor]) -> Tensor:
        parts, order = list[Tensor](), list[int]()
        for number in sorted(set(self.of)):
            mine = [row for row, of in enumerate(self.of) if of == number]
            over_and_over = torch.tensor([mine[row % len(mine)] for row in range(len(self.of))])
            parts.append(loss_of(self.objectives[number], over_and_over)[: len(mine)])
            order += mine
        place = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(parts)[sent(torch.tensor(place), parts[0].device)]


OBJECTIVES = {
    item.name: item
    for item in (
        Objective("ce", False, _cross_entropy),
        Objective("dlr", False, _dlr),
        Objective("margin", False, _margin_untargeted),
        Objective("ce-t", True, _cross_entropy_targeted),
        Objective("dlr-t", True, _dlr_targeted),
        Objective("margin-t", True, _margin_targeted),
    )
}


def objective(name: str) -> Objective:
    """Return the objective of that name, or raise a UserError that names the nearest ones."""
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective '{name}': {nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def require_signed(name: str, objective: Objective, *, targeted: bool = True) -> None:
    """Refuse, for the attack of that name, an objective whose sign does not tell success; name those that it takes."""
    if not objective.signed:
        signed = ", ".join(known.name for known in OBJECTIVES.values() if known.signed and targeted >= known.targeted)
        raise UserError(
            f"attack '{name}' needs an objective whose sign tells success ({signed}), got '{objective.name}'"
        )
