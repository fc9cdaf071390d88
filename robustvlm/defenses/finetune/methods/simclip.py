"""`simclip`: Siamese adversarial fine-tuning with cosine similarity (Hossain and Imteaj 2024, arXiv 2407.14971)."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.defenses.finetune.inner_attack import frozen
from robustvlm.defenses.finetune.methods.base import Method
from robustvlm.training import Draws


class SimCLIP(Method):
    """Negative cosine of the clean and the perturbed image's features, symmetric, each in turn held constant.

    Nothing ties the features to those of the original model. Our reading: the inner attack lowers the cosine to the
    student's own features of the clean image.
    """

    labelled = False

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        del labels
        encode = self.student.encode_image
        with frozen(self.student):
            with torch.no_grad():
                goal = encode(pixels)
            adversarial, _ = self.attack(lambda x, _: -(encode(x) * goal).sum(), pixels, draws)
        perturbed, clean = encode(adversarial), encode(pixels)
        pull = (perturbed * clean.detach()).sum(-1) + (clean * perturbed.detach()).sum(-1)
        return {"loss": -pull.mean() / 2}
