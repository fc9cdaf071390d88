"""A folder of kind `tune-prompts` as a model: the base model's encoder, and class embeddings from learnt prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from robustvlm.data.names import places_of
from robustvlm.defenses.base import Classifier, ZeroShot
from robustvlm.defenses.saved import SavedModel
from robustvlm.errors import UserError
from robustvlm.models import VLM, ZeroShotClassifier
from robustvlm.models.fingerprint import fingerprint
from robustvlm.models.weights import read_weights
from robustvlm.runs.files import replacing

PROMPTS = "prompts.safetensors"


class TunedClassifier(ZeroShot):
    """A zero-shot classifier whose class embeddings were learnt; they are part of its identity."""

    @property
    def fingerprint(self) -> str:
        """Digest of the encoder and of the class embeddings."""
        return fingerprint({"class_embeddings": self.class_embeddings}, (super().fingerprint, *self.class_names))


class PromptTunedModel(SavedModel):
    """The base model with the class embeddings that its tuned prompts give.

    Its detection score is the energy change (`robustvlm.detect.DeltaEnergy`) on its head, as on any zero-shot head.
    """

    def encoder(self, device: torch.device) -> VLM:
        return self.base(device)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.card.settings.get("class_names")
        return tuple(str(name) for name in names) if isinstance(names, list) else None

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        """Return the tuned classifier over `class_names`, which must be among those that prompts were tuned for."""
        del templates, cache  # the prompts are learnt, and kept here
        embeddings = read_weights(self.folder / PROMPTS).get("class_embeddings")
        names = self.card.settings.get("class_names")
        if embeddings is None or not isinstance(names, list) or len(names) != len(embeddings):
            raise UserError(
                f"'{self.folder}' is damaged: its embeddings do not fit its classes; tune the prompts again"
            )
        places = places_of(class_names, [str(name) for name in names])
        unknown = [name for name, place in zip(class_names, places, strict=True) if place is None]
        if unknown:
            raise UserError(
                f"the prompts of '{self.folder}' were tuned for {len(names)} classes, '{unknown[0]}' is none of them: "
                "pass data with those classes, or tune prompts for these"
            )
        rows = embeddings[[place for place in places if place is not None]]
        return TunedClassifier(ZeroShotClassifier(encoder, class_names, rows)).eval()


def save_prompts(folder: Path, context: Tensor, class_embeddings: Tensor) -> None:
    """Write the context vectors [M, W] and the class embeddings [K, D] that they give."""
    tensors = {"context": context, "class_embeddings": class_embeddings}
    with replacing(folder / PROMPTS) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
