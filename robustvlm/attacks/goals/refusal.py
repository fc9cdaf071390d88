"""Goals against a model that may refuse: an accepted mistake, a rejected known image, an accepted unknown one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.goals.base import REJECTED, Case, Goal
from robustvlm.attacks.goals.classes import Misclassify
from robustvlm.attacks.objectives import Objective, margin

# How far past its threshold a condition is pushed when two must hold at once, in units of its clean distance: without
# it a perturbation would hover on the edge of both.
_OVERSHOOT = 0.05


class Refusable(Goal):
    """A goal against a model whose last output column is the acceptance score."""

    def prediction(self, output: Tensor) -> Tensor:
        return torch.where(output[:, -1] > 0, output[:, :-1].argmax(1), REJECTED)

    def confidence(self, output: Tensor) -> Tensor:
        return super().confidence(output[:, :-1])


class AcceptedMistake(Refusable):
    """A wrong class that the model accepts.

    Two conditions must hold at once. The loss sums how far each is from holding, in units of its distance at the clean
    image (the reference [B, 2]: clean margin, clean acceptance), so neither drowns the other; an objective contributes
    its choice of class only (the target, or the leading wrong one).
    """

    spec = "misclassify"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return torch.maximum(margin(output[:, :-1], case.label), -output[:, -1])

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        logits, acceptance = output[:, :-1], output[:, -1]
        ahead = margin(logits, case.label)
        if objective.targeted:
            ahead = (logits.gather(1, case.label[:, None]) - logits.gather(1, case.aim[:, None])).squeeze(1)
        scale = output.new_ones(len(output), 2) if case.reference is None else case.reference.abs().clamp_min(1e-6)
        return -F.relu(ahead / scale[:, 0] + _OVERSHOOT) - F.relu(_OVERSHOOT - acceptance / scale[:, 1])

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return (output[:, :-1].argmax(1) != case.label) & (output[:, -1] > 0)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        return Misclassify().targets(clean_output[:-1], label, n)


class Deny(Refusable):
    """Rejection of an image that the model accepts."""

    spec, two_way = "deny", True

    def margin(self, output: Tensor, case: Case) -> Tensor:
        del case
        return output[:, -1]

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return self.margin(output, case) <= 0


class Intrude(Refusable):
    """Acceptance of an image that the model rejects, as any class."""

    spec, two_way = "intrude", True

    def margin(self, output: Tensor, case: Case) -> Tensor:
        del case
        return -output[:, -1]
