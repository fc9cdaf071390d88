"""Goals of a class tree: wrong at one level, or at all levels by one perturbation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustvlm.attacks.goals.base import Case, Goal
from robustvlm.attacks.objectives import Objective, margin


class Superclass(Goal):
    """A class of another superclass, at one level of the class tree.

    The logit of a superclass is the largest of its classes' logits, so that the leading superclass is the one of the
    predicted class.

    Args:
        groups: superclass of every class, int64 [K], numbered from 0.
        level: how the level is named.

    Example:
        >>> goal = Superclass(torch.tensor([0, 0, 1]), "1")
        >>> goal.margin(torch.tensor([[1.0, 3.0, 2.0]]), Case(torch.tensor([0]))).item()
        1.0
    """

    def __init__(self, groups: Tensor, level: str) -> None:
        self.groups, self.spec = groups, f"superclass:{level}"
        self.n_groups = int(groups.max()) + 1

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return margin(self.group_logits(output), self.group_of(case.label))

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        return objective(self.group_logits(output), self.group_of(case.label), self.group_of(case.aim))

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return self.group_of(output.argmax(1)) != self.group_of(case.label)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        """Return the leading class of every other superclass, the likeliest first."""
        groups = self.groups.tolist()
        leaders: dict[int, int] = {groups[label]: label}
        for index in torch.argsort(clean_output, descending=True, stable=True).tolist():
            leaders.setdefault(groups[index], index)
        return list(leaders.values())[1 : n + 1]

    def group_logits(self, output: Tensor) -> Tensor:
        """Return the largest logit of every superclass, [B, K] -> [B, S]."""
        index = self.groups.to(output.device).expand(len(output), -1)
        empty = output.new_full((len(output), self.n_groups), float("-inf"))
        return empty.scatter_reduce(1, index, output, reduce="amax")

    def group_of(self, classes: Tensor) -> Tensor:
        """Return the superclasses of classes, int64 [B]."""
        return self.groups.to(classes.device)[classes]


class SuperclassAll(Goal):
    """One perturbation against all levels at once; reached at the coarsest level, which is wrong at all finer ones.

    The loss is the sum over levels l = 0 (classes) .. L of the objective there, weighted 1 - l / (L + 1)
    (arXiv 2604.18867, the HITA loss's weights). A target of the same superclass says nothing at a level, so the level
    is left out for that image.

    Args:
        levels: goals of the levels from the finest (level 0, every class by itself) to the coarsest below the root.
    """

    spec = "superclass:all"

    def __init__(self, levels: Sequence[Superclass]) -> None:
        self.levels = tuple(levels)
        self.weights = [1 - level / (len(levels) + 1) for level in range(len(levels))]

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return self.levels[-1].margin(output, case)

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        total = output.new_zeros(len(output))
        for weight, level in zip(self.weights, self.levels, strict=True):
            part = level.loss(output, objective, case)
            if objective.targeted:
                part = torch.where(level.group_of(case.aim) == level.group_of(case.label), torch.zeros_like(part), part)
            total = total + weight * part
        return total

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return self.levels[-1].reached(output, case)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        return self.levels[-1].targets(clean_output, label, n)
