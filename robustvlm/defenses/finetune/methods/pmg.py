"""`pmg`: fine-tuning guided by the pre-trained model (Wang et al. 2024, arXiv 2401.04350)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.finetune.methods.base import Materials, Method
from robustvlm.errors import UserError
from robustvlm.training import Draws


class PMG(Method):
    """TeCoA's loss, and two divergences of the student's predictions on adversarial images.

    `general` weighs the one from the original model's predictions for them, `clean` the one from the student's own for
    the clean images. Our reading: KL(adversarial || reference), both weights 1.
    """

    needs_teacher = True

    def __init__(self, materials: Materials, *, general: float = 1.0, clean: float = 1.0) -> None:
        super().__init__(materials)
        for name, weight in (("general", general), ("clean", clean)):
            if not 0 <= weight < math.inf:
                raise UserError(f"the weight '{name}' of pmg must not be negative, got {weight:g}")
        self.general, self.clean = general, clean

    def settings(self) -> dict[str, object]:
        return {"general": self.general, "clean": self.clean}

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        adversarial = self.fooling(pixels, labels, draws)
        logits = self.logits(self.student, adversarial)
        with torch.no_grad():
            original = self.logits(self.teacher, adversarial)
        robust = F.cross_entropy(logits, labels)
        general = _divergence(logits, original)
        clean = _divergence(logits, self.logits(self.student, pixels))
        loss = robust + self.general * general + self.clean * clean
        return {"loss": loss, "robust": robust, "general": general, "clean": clean}


def _divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return KL(p || q) of softmax predictions, a mean over the batch."""
    return F.kl_div(reference.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True)
