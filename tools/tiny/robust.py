"""Adversarial training of the bundled model's vision tower: its data and its loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.data.emoji import TEMPLATES, EmojiSource
from robustvlm.defenses.finetune import InnerAttack
from robustvlm.defenses.finetune.methods import frozen
from robustvlm.defenses.finetune.trainable import vision_module
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.training import Draws, LabelledImages, Measure, RobustValidation, Task, TrainingData
from robustvlm.training.images import Batch
from tools.tiny.sprites import Batches, Sprites, Taxonomy


class SpriteData(TrainingData):
    """One drawing of every class an epoch, in a random style, strongly augmented, on a random background."""

    def __init__(self, taxonomy: Taxonomy, *, seed: int) -> None:
        self.batches_of = Batches(Sprites.load(taxonomy), taxonomy, seed=seed)
        self.count = len(taxonomy.names)

    def __len__(self) -> int:
        return self.count

    def batches(self, spans: Iterable[range]) -> Iterator[Batch]:
        for span in spans:
            found = self.batches_of.at(span.start // self.count)
            rows = [position % self.count for position in span]
            ids = tuple(f"{position // self.count}/{row}" for position, row in zip(span, rows, strict=True))
            yield Batch(found.pixels[rows], found.labels[rows], ids)


@dataclass(frozen=True)
class Weights:
    """Shares of the loss beside the adversarial cross-entropy.

    Attributes:
        clean: cross-entropy of clean images. hierarchy: of adversarial ones, for the levels above the classes.
        guided: divergence from what the model before training says of the clean image (AGFT's loss).
    """

    clean: float
    hierarchy: float
    guided: float = 0.0


class RobustTiny(Task):
    """Cross-entropy of adversarial images against frozen prompts of the classes and of the nodes above them.

    Batch normalisation takes its statistics from the batch in the step, and keeps them during the attack.
    """

    best_by = "robust accuracy"

    def __init__(
        self,
        vlm: VLM,
        taxonomy: Taxonomy,
        *,
        attack: InnerAttack,
        weights: Weights,
        validation: RobustValidation,
        teacher: VLM | None = None,
    ) -> None:
        super().__init__(vlm)
        self.teacher = teacher
        self.vlm, self.taxonomy, self.attack, self.weights = vlm, taxonomy, attack, weights
        self.validation = validation
        self.heads = [
            class_embeddings(vlm, names, TEMPLATES)
            for names in (taxonomy.names, taxonomy.superclasses, taxonomy.domains)
        ]
        self.levels = [torch.arange(len(taxonomy.names)), taxonomy.superclass_of, taxonomy.domain_of]

    def train_mode(self) -> None:
        self.module.train()

    def costly(self) -> nn.Module:
        return vision_module(self.vlm)

    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        del step
        with frozen(self.vlm):
            adversarial, _ = self.attack(lambda x, _: self._terms(x, labels)[0], pixels, draws)
        leaf, above = self._terms(adversarial, labels)
        loss = leaf + self.weights.hierarchy * above
        terms = {"adversarial": leaf, "levels above": above}
        if self.weights.clean:
            terms["clean"] = self._terms(pixels, labels)[0]
            loss = loss + self.weights.clean * terms["clean"]
        if self.weights.guided:
            terms["guided"] = self._divergence(adversarial, pixels)
            loss = loss + self.weights.guided * terms["guided"]
        return {"loss": loss, **terms}

    def _terms(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropy of the classes, and the sum of those of the levels above."""
        features = self.vlm.encode_image(pixels.contiguous(memory_format=torch.channels_last)).float()
        with torch.autocast("cpu", enabled=False):
            found = [
                F.cross_entropy(self.vlm.logit_scale * features @ head.T, of[labels])
                for head, of in zip(self.heads, self.levels, strict=True)
            ]
        return found[0], found[1] + found[2]

    def _divergence(self, adversarial: Tensor, pixels: Tensor) -> Tensor:
        """Return the mean KL of the student's class distribution, attacked, from the teacher's of the clean images."""
        assert self.teacher is not None, "a guided loss has a teacher"
        with torch.no_grad():
            target = self._logits(self.teacher, pixels).log_softmax(-1)
        found = self._logits(self.vlm, adversarial).log_softmax(-1)
        return F.kl_div(found, target, reduction="batchmean", log_target=True)

    def _logits(self, vlm: VLM, pixels: Tensor) -> Tensor:
        features = vlm.encode_image(pixels.contiguous(memory_format=torch.channels_last)).float()
        with torch.autocast("cpu", enabled=False):
            return vlm.logit_scale * features @ self.heads[0].T

    def validate(self) -> dict[str, Measure]:
        head = self.heads[0]
        return dict(self.validation.measure(lambda x: self.vlm.logit_scale * self.vlm.encode_image(x) @ head.T))


def validation_images(copies: int) -> LabelledImages:
    """Return the drawings of the validation style; the test style is never read in training."""
    return LabelledImages.read(EmojiSource(split="val", labels="all", copies=copies), size=64, limit=None)
