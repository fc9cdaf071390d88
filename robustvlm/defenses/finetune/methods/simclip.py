"""`simclip`: Siamese adversarial fine-tuning with cosine similarity (Hossain and Imteaj 2024, arXiv 2407.14971)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.finetune.methods.fare import FARE
from robustvlm.training import Draws


class SimCLIP(FARE):
    """Negative cosine of the worst case's features to those the original model has of the clean image, symmetric.

    As the authors' program has it (speedlab-git/SimCLIP, train/adversarial_training_simclip.py): the partner is the
    frozen original, so its half of the symmetric loss counts in the value and has no gradient, and the inner attack is
    FARE's, on the squared distance of features that are not scaled. With the student's own features of the clean image
    as the partner, as a Siamese network would have it, nothing ties the features to the texts and they collapse.
    """

    loss = "cosine to the frozen original's features"

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        del labels
        original, adversarial = self.worst_case(pixels, draws)
        student = self.student.embed_image(adversarial).float()
        return {"loss": (_apart(student, original) + _apart(original, student)) / 2}


def _apart(moved: Tensor, held: Tensor) -> Tensor:
    """Return the mean negative cosine of features [B, D], the second of them held constant."""
    return -F.cosine_similarity(moved, held.detach(), dim=-1).mean()
