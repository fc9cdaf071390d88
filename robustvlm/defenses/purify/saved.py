"""A folder of kind `purify` as a model."""

from __future__ import annotations

import torch

from robustvlm.defenses.purify.parts import Parts, read_parts
from robustvlm.defenses.purify.vlm import PurifiedVLM
from robustvlm.defenses.saved import SavedModel


class PurifiedModel(SavedModel):
    """The base model between its purifier and its mapper."""

    def encoder(self, device: torch.device) -> PurifiedVLM:
        base = self.base(device)
        return self.parts(base.image_size, device).around(base)

    def parts(self, image_size: int, device: torch.device) -> Parts:
        """Return purifier and mapper, to be put around another encoder."""
        return read_parts(self.folder, self.card, image_size, device)
