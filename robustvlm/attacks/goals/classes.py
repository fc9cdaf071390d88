"""Goals of class predictions: any wrong class, or a given one."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.attacks.goals.base import Case, Goal
from robustvlm.attacks.objectives import Objective, margin, objective


class Misclassify(Goal):
    """Any wrong class.

    Example:
        >>> Misclassify().reached(torch.tensor([[1.0, 2.0]]), Case(torch.tensor([0]))).item()
        True
    """

    spec = "misclassify"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return margin(output, case.label)

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        return objective(output, case.label, case.aim)

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return output.argmax(1) != case.label

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        order = torch.argsort(clean_output, descending=True, stable=True).tolist()
        return [index for index in order if index != label][:n]


class Targeted(Goal):
    """One given class, whatever the true one."""

    two_way = True

    def __init__(self, target: int, name: str = "") -> None:
        self.target, self.spec = target, f"targeted:{name or target}"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return -margin(output, self._aim(case))

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        aim = self._aim(case)
        rival = output.scatter(1, aim[:, None], float("-inf")).argmax(1)
        return _targeted_form(objective)(output, rival, aim)

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return output.argmax(1) == self._aim(case)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        del clean_output, label, n
        return [self.target]

    def _aim(self, case: Case) -> Tensor:
        return torch.full_like(case.label, self.target)


def _targeted_form(chosen: Objective) -> Objective:
    return chosen if chosen.targeted else objective(f"{chosen.name}-t")
