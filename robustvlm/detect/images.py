"""Scores of images: an encoder and a detector as one module, fitted and asked with pixels or with features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustvlm.attacks.tensors import as_images, own_device
from robustvlm.data.pixels import to_pixels
from robustvlm.data.source import DataSource, Sample
from robustvlm.errors import UserError
from robustvlm.models.borrowed import borrowed
from robustvlm.models.device import full_precision_kernels

if TYPE_CHECKING:
    from robustvlm.detect.base import Detector

_LANES = 64

Batches = Tensor | DataSource | Iterable[tuple[Tensor, Tensor]]
"""Images [N, C, H, W] or features [N, D], batches of them with labels (as a loader yields them), or a data source."""


class ImageDetector(nn.Module):
    """A score of images: pixels [B, 3, H, H] in [0, 1] to one number each [B], higher = more in-distribution.

    Args:
        model: an encoder; a classifier, whose encoder is taken, or its logits where it has none; or any module from
            pixels to features [B, D]. It is used in evaluation mode by `fit` and `predict`, and left as it was.
        detector: the score; one that learns is fitted by `fit`.

    Example:
        >>> from robustvlm.detect import MCM, head_of
        >>> from robustvlm.models import load_model, zero_shot
        >>> classifier = zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False)
        >>> score = ImageDetector(classifier.vlm, MCM(head_of(classifier)))
        >>> score(torch.rand(3, 3, 64, 64)).shape
        torch.Size([3])
    """

    def __init__(self, model: Callable[..., Any], detector: Detector) -> None:
        super().__init__()
        encoder = getattr(model, "vlm", None)
        self.model, self.detector = model if encoder is None else encoder, detector
        self._logits = -1 if encoder is None and getattr(model, "can_reject", False) else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the scores [B]; differentiable in the pixels."""
        return self.detector.score(self._features(pixels))

    def fit(self, data: Batches, labels: Tensor | None = None) -> ImageDetector:
        """Return this with its score fitted to images of known classes; see `FittedDetector.fit`."""
        fit_features = getattr(self.detector, "fit_features", None)
        if fit_features is None:
            raise UserError(f"{type(self.detector).__name__} learns nothing from images: ask it with predict")
        return ImageDetector(self.model, fit_features(*gathered(data, labels, self)))

    def predict(self, images: Tensor) -> Tensor:
        """Return scores [N] of images [N, C, H, W], or of features [N, D]; no gradient, on the CPU."""
        return self.detector.predict(images if images.ndim == 2 else self.features(images)).cpu()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return features [N, D] of images [N, C, H, W] in [0, 1], batch by batch, on the CPU."""
        pixels, place = as_images(images).float(), own_device(self.model, images)
        with borrowed(self), full_precision_kernels():
            return torch.cat([self._features(batch.to(place)).float().cpu() for batch in pixels.split(_LANES)])

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model(pixels)
        return features[:, : self._logits]


def gathered(data: Batches, labels: Tensor | None, by: ImageDetector | None) -> tuple[Tensor, Tensor]:
    """Return features [N, D] and labels [N] of whatever holds them; images go through `by`, where there is one.

    Raises:
        UserError: images without a model, or no labels.
    """
    if isinstance(data, Tensor):
        if labels is None:
            raise UserError("labels are missing: pass fit(features, labels), or batches of both")
        return _featured(data, by), torch.as_tensor(labels).cpu()
    batches = _batches(data, by) if isinstance(data, DataSource) else data
    pairs = [(_featured(x, by), torch.as_tensor(y).cpu()) for x, y in batches]
    if not pairs:
        raise UserError("there is no image to learn from: pass batches of (images, labels)")
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _featured(data: Tensor, by: ImageDetector | None) -> Tensor:
    if data.ndim == 2:
        return data
    if by is None:
        raise UserError(f"fit takes features [N, D], got {list(data.shape)}: pass model=... to learn from images")
    return by.features(data)


def _batches(source: DataSource, by: ImageDetector | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the readable images of known classes of a source, as the model takes them."""
    framing = getattr(None if by is None else by.model, "framing", None)
    if framing is None:
        raise UserError("data is read at the size of an encoder: pass model=load_model(...), or batches of images")
    held: list[Sample] = []
    for item in source.samples():
        if isinstance(item, Sample) and item.label >= 0:
            held.append(item)
        if len(held) == _LANES:
            yield _stacked(held, framing)
            held = []
    if held:
        yield _stacked(held, framing)


def _stacked(held: list[Sample], framing: Any) -> tuple[Tensor, Tensor]:
    return torch.stack([to_pixels(one.image, framing) for one in held]), torch.tensor([one.label for one in held])
