"""`clean`: the control, ordinary fine-tuning on unperturbed images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.finetune.methods.base import Method
from robustvlm.training import Draws


class Clean(Method):
    """Cross-entropy of clean images against the frozen class embeddings."""

    attacked = False

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        del draws
        return {"loss": F.cross_entropy(self.logits(self.student, pixels), labels)}
