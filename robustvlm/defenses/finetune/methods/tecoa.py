"""`tecoa`: text-guided contrastive adversarial training (Mao et al. 2023, arXiv 2212.07016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.finetune.methods.base import Method
from robustvlm.training import Draws


class TeCoA(Method):
    """Cross-entropy of adversarial images against the frozen class embeddings (equations 1 to 3)."""

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        adversarial = self.fooling(pixels, labels, draws)
        return {"loss": F.cross_entropy(self.logits(self.student, adversarial), labels)}
