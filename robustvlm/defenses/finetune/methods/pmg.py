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
    the clean images, both 1. The divergence is KL(reference || adversarial), as in the authors' program, where both
    sides of the second have a gradient; `reverse` turns it round. Their program scales no cosine, which amounts to a
    temperature of 1; ours is the model's own.
    """

    needs_teacher = True
    loss = "KL(reference || adversarial)"

    def __init__(
        self, materials: Materials, *, general: float = 1.0, clean: float = 1.0, reverse: bool = False
    ) -> None:
        super().__init__(materials)
        self.reverse = reverse
        for name, weight in (("general", general), ("clean", clean)):
            if not 0 <= weight < math.inf:
                raise UserError(f"the weight '{name}' of pmg must not be negative, got {weight:g}")
        self.general, self.clean = general, clean

    def settings(self) -> dict[str, object]:
        return {"general": self.general, "clean": self.clean, "reverse": self.reverse}

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        adversarial = self.fooling(pixels, labels, draws)
        logits = self.logits(self.student, adversarial)
        with torch.no_grad():
            original = self.logits(self.teacher, adversarial)
        robust = F.cross_entropy(logits, labels)
        general = self._divergence(logits, original)
        clean = self._divergence(logits, self.logits(self.student, pixels))
        loss = robust + self.general * general + self.clean * clean
        return {"loss": loss, "robust": robust, "general": general, "clean": clean}

    def _divergence(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Return the mean over the batch of KL(reference || predictions), or the reverse."""
        first, second = (logits, reference) if self.reverse else (reference, logits)
        return F.kl_div(second.log_softmax(-1), first.log_softmax(-1), reduction="batchmean", log_target=True)
