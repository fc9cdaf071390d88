"""`distill`: a student tower that answers attacked images as a teacher, robust or large, answers clean ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.finetune.guided import asked, divergences
from robustvlm.defenses.finetune.methods import Materials, Method, frozen
from robustvlm.errors import UserError, setting
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.training import Draws


class Distill(Method):
    """Divergence from the teacher's class distribution, cross-entropy, and nearness to the teacher's features.

    L = KL(p || q) + labels CE(q, y) + features |f' - g|², where the teacher sees the clean image x and the student the
    attacked one x': p and q are their class distributions, each by its own texts and temperature, f' and g their unit
    features. The inner attack raises KL(p || q). The term of features needs towers of one width; with its weight at 0
    any two do.

    Without another teacher it is the model itself before training, and with both weights at 0 then `agft` at scale and
    ratio 1.

    Source: terms of texts and features Li et al. 2023, arXiv 2307.03135, whose contrast to the other images of a batch
    is left out, as a loss has to be a mean over images for parts and ranks; the teacher's clean answer as the target of
    adversarial images Zi et al. 2021, arXiv 2108.07969 (RSLAD, whose teacher is robust too).
    """

    needs_teacher = True
    other_teacher = True

    def __init__(self, materials: Materials, *, labels: float = 1.0, features: float = 1.0) -> None:
        super().__init__(materials)
        asked("distill", labels=labels, features=features)
        self.weights = {"labels": labels, "features": features}
        self.texts = class_embeddings(self.teacher, materials.class_names, materials.templates, distinct=True)
        width, other = self.class_embeddings.shape[1], self.texts.shape[1]
        if features and width != other:
            raise UserError(
                f"the features of '{self.teacher.spec}' have {other} numbers, those of '{self.student.spec}' {width}, "
                f"and distill compares them: pass {setting('option', 'features=0')}, or a teacher of the same width"
            )

    def settings(self) -> dict[str, object]:
        return {**self.weights, "teacher": self.teacher.spec}

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        with torch.no_grad():
            goal = self.teacher.encode_image(pixels).float()
            target = (self.teacher.logit_scale * goal @ self.texts.to(goal).T).log_softmax(-1)
        with frozen(self.student):
            adversarial, _ = self.attack(lambda x, _: divergences(self._told(x)[1], target).sum(), pixels, draws)
        found, logits = self._told(adversarial)
        terms = {"soft": divergences(logits, target).mean()}
        loss = terms["soft"]
        if self.weights["labels"]:
            terms["labels"] = F.cross_entropy(logits, labels)
        if self.weights["features"]:
            terms["features"] = (found - goal).square().sum(-1).mean()
        for name, weight in self.weights.items():
            loss = loss + weight * terms[name] if weight else loss
        return {"loss": loss, **terms}

    def _told(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit features [B, D] and logits [B, K] of the student."""
        features = self.student.encode_image(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            wide = features.float()
            return wide, self.student.logit_scale * wide @ self.class_embeddings.to(wide).T
