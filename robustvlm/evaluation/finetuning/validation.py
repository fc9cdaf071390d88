"""What is measured of a model while it is fine-tuned: clean and robust zero-shot accuracy on images held out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.core.framing import Framing
from robustvlm.data import DataSource
from robustvlm.data.source import select
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.training import LabelledImages, Measure, RobustValidation

_SPREAD_IMAGES = 256
_SHARE = 0.1


@dataclass
class ZeroShotValidation:
    """Accuracy of the zero-shot classifier of a model on fixed images, and how far its features lie apart.

    Args:
        vlm: the model in training.
        class_names, templates: of the validation images.
        robust: images and attack.
        texts_change: whether texts have to be embedded anew every time.
    """

    vlm: VLM
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    robust: RobustValidation
    texts_change: bool = False
    _embeddings: Tensor | None = None

    def __call__(self) -> Mapping[str, Measure]:
        """Return clean, noise, FGSM and robust accuracy, and the feature spread, of the present weights."""
        if self._embeddings is None or self.texts_change:
            self._embeddings = class_embeddings(self.vlm, self.class_names, self.templates)
        measures = self.robust.measure(self._logits, device=self.vlm.device)
        return {**measures, "feature spread": self._spread()}

    def _logits(self, pixels: Tensor) -> Tensor:
        assert self._embeddings is not None
        return self.vlm.logit_scale * self.vlm.encode_image(pixels) @ self._embeddings.T

    def _spread(self) -> float:
        """Return 1 - |mean unit feature|²; 0 if all images have one feature."""
        total, images = torch.zeros((), device=self.vlm.device), self.robust.images.pixels[:_SPREAD_IMAGES]
        with torch.no_grad():
            for rows in images.split(self.robust.batch_size):
                total = total + self.vlm.encode_image(rows.to(self.vlm.device).float() / 255).sum(dim=0)
        return float(1 - (total / len(images)).square().sum())


def validation_images(
    source: DataSource, *, size: int | Framing, limit: int, only: Collection[str] | None = None
) -> LabelledImages:
    """Return up to `limit` images of known classes, of those named by `only` if it is given."""
    if only is None:
        return LabelledImages.read(source, size=size, limit=limit)
    return LabelledImages.read(source, size=size, keep=only.__contains__)


def held_out(source: DataSource, ids: list[str], limit: int) -> set[str]:
    """Return the ids to validate on: a tenth of the images, `limit` at most, chosen by a hash of their groups.

    Images of one group (copies of one drawing) stay together, so that none is trained on beside its twin.

    Example:
        >>> from robustvlm.data import open_data
        >>> source = open_data("emoji?split=train&copies=2")
        >>> chosen = held_out(source, source.ids(), limit=10)
        >>> len(chosen), len({source.group(name) for name in chosen})
        (10, 5)
    """
    members: dict[str, list[str]] = {}
    for name in ids:
        members.setdefault(source.group(name), []).append(name)
    room = min(limit, int(_SHARE * len(ids)))
    chosen: set[str] = set()
    for group in select(members, None):
        if len(chosen) + len(members[group]) > room:
            break
        chosen.update(members[group])
    return chosen
