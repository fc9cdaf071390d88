"""What a fine-tuning method is: the loss terms of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustvlm.data.taxonomy import Forest
from robustvlm.defenses.finetune.inner_attack import InnerAttack, frozen
from robustvlm.models import VLM
from robustvlm.training import Draws


@dataclass(frozen=True)
class Materials:
    """What a method may build on.

    Attributes:
        student: the model that is trained, in evaluation mode.
        attack: makes the adversarial images.
        class_embeddings: unit text embeddings of the classes before training, [K, D].
        class_names, templates: of the training data.
        forest: class trees over the same classes, None if there are none.
        teacher: the student as it was before training, frozen; there if the method asks for it (`needs_teacher`).
        calibration: some training images [B, 3, S, S] that constants may be fitted to.
        adapters: whether the tower is trained through added parameters, at the high learning rate that these want.
    """

    student: VLM
    attack: InnerAttack
    class_embeddings: Tensor
    class_names: Sequence[str]
    templates: Sequence[str]
    calibration: Tensor
    forest: Forest | None = None
    teacher: VLM | None = None
    adapters: bool = False


class Method(ABC):
    """A fine-tuning method; a subclass implements `terms` and says in class attributes what it needs.

    Attributes:
        labelled: whether labels are read.
        attacked: whether the inner attack is used.
        needs_teacher: whether a frozen copy of the model is wanted.
        loss: what is minimised, in words, of a method whose loss once was another: it goes into the manifest, so that
            a run under the other loss is not gone on with under this one.
    """

    labelled = True
    attacked = True
    needs_teacher = False
    loss = ""

    def __init__(self, materials: Materials) -> None:
        self.student, self.attack = materials.student, materials.attack
        self.class_embeddings = materials.class_embeddings
        self._teacher = materials.teacher

    @abstractmethod
    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Return scalars by name: "loss" is minimised, the others are recorded; means over the batch.

        Args:
            pixels: augmented images [B, 3, S, S] in [0, 1].
            labels: int64 [B].
            draws: random numbers of the step.
        """

    def also_trained(self) -> list[nn.Parameter]:
        """Return parameters that the method trains beside the vision tower."""
        return []

    def settings(self) -> dict[str, object]:
        """Return every choice and fitted constant as plain JSON, for the record and the model's card."""
        return {}

    def measures(self) -> dict[str, float]:
        """Return what a validation should show of the method itself."""
        return {}

    @property
    def teacher(self) -> VLM:
        """The frozen copy of the model before training."""
        assert self._teacher is not None, "a method that uses its teacher sets needs_teacher"
        return self._teacher

    def logits(self, vlm: VLM, pixels: Tensor) -> Tensor:
        """Return zero-shot logits [B, K] of the training classes, under the text embeddings before training."""
        features = vlm.encode_image(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            return vlm.logit_scale * features @ self.class_embeddings.to(features.dtype).T

    def fooling(self, pixels: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Return images [B, 3, S, S] that raise the cross-entropy of the student's logits."""
        with frozen(self.student):
            return self.attack(
                lambda x, _: nn.functional.cross_entropy(self.logits(self.student, x), labels, reduction="sum"),
                pixels,
                draws,
            )[0]
