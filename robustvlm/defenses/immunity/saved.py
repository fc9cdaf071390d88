"""A folder of kind `immunize` as a model: the base model's encoder, its adapter, and a head that may refuse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from robustvlm.defenses.base import Classifier
from robustvlm.defenses.immunity.adapter import AdaptedVLM
from robustvlm.defenses.immunity.classifier import ImmunisedClassifier
from robustvlm.defenses.immunity.files import load_immunity
from robustvlm.defenses.immunity.state import Immunity
from robustvlm.defenses.saved import SavedModel
from robustvlm.models import VLM


class ImmunisedModel(SavedModel):
    """The adapted encoder; smoothing, where there is one, goes between it and the head."""

    @cached_property
    def immunity(self) -> Immunity:
        """Prototypes, antibodies, thresholds and adapter."""
        return load_immunity(self.folder, self.card.settings)

    def encoder(self, device: torch.device) -> VLM:
        base = self.base(device)
        return AdaptedVLM(base, self.immunity.adapter)

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        """Return the immunised classifier; `class_names` are its classes, in any order."""
        del templates, cache  # the prototypes are kept here
        return ImmunisedClassifier(encoder, self.immunity.ordered(class_names, str(self.folder)))
