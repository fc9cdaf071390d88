"""`fare`: unsupervised adversarial fine-tuning of the vision tower (Schlarmann et al. 2024, arXiv 2402.12336)."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.defenses.finetune.inner_attack import frozen
from robustvlm.defenses.finetune.methods.base import Method
from robustvlm.training import Draws


class FARE(Method):
    """Squared distance of the worst case's features to those the original model has of the clean image (equation 3).

    Features are taken before they are scaled to unit norm.
    """

    labelled = False
    needs_teacher = True

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        del labels
        goal, adversarial = self.worst_case(pixels, draws)
        return {"loss": self._error(adversarial, goal).mean()}

    def worst_case(self, pixels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return the original model's features [B, D] of clean images, and the images [B, 3, S, S] farthest from them.

        Neither carries a gradient.
        """
        with torch.no_grad():
            goal = self.teacher.embed_image(pixels).float()
        with frozen(self.student):
            adversarial, _ = self.attack(lambda x, _: self._error(x, goal).sum(), pixels, draws)
        return goal, adversarial

    def _error(self, pixels: Tensor, goal: Tensor) -> Tensor:
        return (self.student.embed_image(pixels).float() - goal).square().sum(-1)
