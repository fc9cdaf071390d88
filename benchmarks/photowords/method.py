"""How the encoder is fine-tuned against attacks: by the probabilities of its 1,000 words, not by its feature.

The feature is a mean of texts whose weights are a softmax, which is flat where the classifier is sure: a loss on
features has next to no gradient there, and neither FARE's nor TeCoA's fell in what was tried.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.finetune.methods import Materials, Method, frozen
from robustvlm.models import VLM
from robustvlm.training import Draws


class ByWords(Method):
    """KL divergence of the words of attacked images from those that the original model reads off the clean ones.

    Option `clean` (0) weighs the same divergence of clean images. No label is read.

    Source: the regulariser of TRADES (Zhang et al. 2019, arXiv 1901.08573), with the frozen original's predictions as
    FARE has them (Schlarmann et al. 2024, arXiv 2402.12336).
    """

    labelled = False
    needs_teacher = True

    def __init__(self, materials: Materials, clean: float = 0.0) -> None:
        super().__init__(materials)
        self.clean = clean

    def settings(self) -> dict[str, object]:
        return {"clean": self.clean}

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        del labels
        with torch.no_grad():
            words = self._words(self.teacher, pixels)
        with frozen(self.student):
            attacked, _ = self.attack(lambda x, _: _apart(self._words(self.student, x), words).sum(), pixels, draws)
        robust = _apart(self._words(self.student, attacked), words).mean()
        if not self.clean:
            return {"loss": robust}
        clean = _apart(self._words(self.student, pixels), words).mean()
        return {"loss": robust + self.clean * clean, "robust": robust.detach(), "clean": clean.detach()}

    def _words(self, vlm: VLM, pixels: Tensor) -> Tensor:
        """Return log-probabilities [B, 1000]; of another encoder, those of the training classes [B, K]."""
        encoder: Any = getattr(vlm, "encoder", None)
        logits = encoder.photographs(pixels) if hasattr(encoder, "photographs") else self.logits(vlm, pixels)
        return F.log_softmax(logits.float(), dim=-1)


def _apart(words: Tensor, goal: Tensor) -> Tensor:
    return F.kl_div(words, goal, reduction="none", log_target=True).sum(-1)
