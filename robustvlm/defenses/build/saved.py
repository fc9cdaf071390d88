"""A folder of kind `build` as a model: the last of its parts, smoothed as its card says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robustvlm.defenses.base import Classifier
from robustvlm.defenses.build.recipe import smoothing_of
from robustvlm.defenses.pipeline import apply_operations, split_spec
from robustvlm.defenses.saved import SavedModel, saved_model
from robustvlm.models import VLM


class BuiltModel(SavedModel):
    """A whole pipeline; smoothing, if it has one, is part of its encoder, and the head is that of its last part."""

    @property
    def sigma(self) -> float | None:
        smoothing = smoothing_of(self.card.settings.get("smooth"))
        return float(smoothing[0].arguments[0]) if smoothing else None

    def encoder(self, device: torch.device) -> VLM:
        return apply_operations(self.base(device), smoothing_of(self.card.settings.get("smooth")))

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        top = saved_model(split_spec(self.card.base or "")[0])
        if top is None:
            return super().classifier(encoder, class_names, templates, cache=cache)
        return top.classifier(encoder, class_names, templates, cache=cache)
