"""The contract of a goal, and what it has to know of each row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.attacks.objectives import Objective

REJECTED = -1


@dataclass(frozen=True)
class Case:
    """What a goal has to know of each row: label [B] and target class [B] (int64), and a reference [B, R] or None.

    Example:
        >>> import torch
        >>> Case(torch.tensor([2, 0])).rows(torch.tensor([1])).label.tolist()
        [0]
    """

    label: Tensor
    target: Tensor | None = None
    reference: Tensor | None = None

    def rows(self, index: Tensor) -> Case:
        """Return the case of some rows."""
        return Case(
            self.label[index],
            None if self.target is None else self.target[index],
            None if self.reference is None else self.reference[index],
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Case:
        """Return the case on a device, references in the type of the model's outputs."""
        return Case(
            self.label.to(device),
            None if self.target is None else self.target.to(device),
            None if self.reference is None else self.reference.to(device, dtype),
        )

    @property
    def aim(self) -> Tensor:
        """The target classes; the labels where there are none."""
        return self.label if self.target is None else self.target


class Goal(ABC):
    """What counts as success, and how an attack's objective is read for it.

    Attributes:
        spec: the goal as written on the command line.
        two_way: there are only two outcomes, so that an attack with targets has one of them to aim at.
        still_at_image: the gradient vanishes at the clean image, so that attacks must start elsewhere.
    """

    spec: str
    two_way: bool = False
    still_at_image: bool = False

    @abstractmethod
    def margin(self, output: Tensor, case: Case) -> Tensor:
        """Return [B] numbers, positive as long as the goal is not reached; the smaller, the nearer."""

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        """Return what an attack with this objective maximises, [B]; goals without classes to tell apart: -margin."""
        del objective
        return -self.margin(output, case)

    def reached(self, output: Tensor, case: Case) -> Tensor:
        """Return where the goal is reached, bool [B]."""
        return self.margin(output, case) < 0

    def prediction(self, output: Tensor) -> Tensor:
        """Return the predicted classes, int64 [B]; -1 stands for a rejected image or a model without classes."""
        return output.argmax(1)

    def confidence(self, output: Tensor) -> Tensor:
        """Return the softmax probability of the leading class, float64 [B]; NaN for a model without classes."""
        return output.double().softmax(1).amax(1)

    def cosine(self, output: Tensor, case: Case) -> Tensor | None:
        """Return the cosine that a feature goal is about, [B]; None for other goals."""
        del output, case
        return None

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        """Return up to `n` classes worth aiming at, the likeliest first, from one clean output [O]."""
        del clean_output, n
        return [label]
