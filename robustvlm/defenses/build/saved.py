"""A folder of kind `build` as a model: the last of its parts, smoothed as its card says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robustvlm.certify import OpensetRule
from robustvlm.defenses.base import Classifier
from robustvlm.defenses.build.recipe import smoothing_of
from robustvlm.defenses.pipeline import Operation, apply_operations, check_operations, split_spec
from robustvlm.defenses.saved import SavedModel, saved_model
from robustvlm.errors import UserError
from robustvlm.models import VLM


class BuiltModel(SavedModel):
    """A whole pipeline; smoothing, if it has one, is part of its encoder, and the head is that of its last part."""

    @property
    def smoothing(self) -> tuple[Operation, ...]:
        """The smoothing that the card names, checked.

        Raises:
            UserError: the card is damaged.
        """
        said = self.card.settings.get("smooth")
        wrong = f"the card of '{self.folder}' names no smoothing SIGMA[:N0]"
        if not isinstance(said, str | None):
            raise UserError(f'{wrong}, as the text "0.25:64", but {said!r}: build it again')
        operations = smoothing_of(said)
        try:
            check_operations(str(self.folder), operations)
        except UserError as error:
            raise UserError(f"{wrong} ({error}): build it again") from None
        return operations

    @property
    def sigma(self) -> float | None:
        return float(self.smoothing[0].arguments[0]) if self.smoothing else None

    def encoder(self, device: torch.device) -> VLM:
        smoothing = self.smoothing  # a damaged card should not wait for a large model
        return apply_operations(self.base(device), smoothing)

    @property
    def _top(self) -> SavedModel | None:
        """The last of the parts, whose head the pipeline has."""
        return saved_model(split_spec(self.card.base or "")[0])

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return None if self._top is None else self._top.class_names

    @property
    def refuses(self) -> bool:
        return self._top is not None and self._top.refuses

    @property
    def noise_levels(self) -> tuple[float, ...]:
        return () if self._top is None else self._top.noise_levels

    def class_vectors(self, class_names: Sequence[str]) -> torch.Tensor | None:
        return None if self._top is None else self._top.class_vectors(class_names)

    def openset_rule(self, class_names: Sequence[str], sigma: float, tau: float | None = None) -> OpensetRule | None:
        return None if self._top is None else self._top.openset_rule(class_names, sigma, tau)

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        top = self._top
        if top is None:
            return super().classifier(encoder, class_names, templates, cache=cache)
        return top.classifier(encoder, class_names, templates, cache=cache)
