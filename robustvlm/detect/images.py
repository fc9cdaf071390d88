"""From pixels to a score: an encoder and a detector as one module, differentiable in the pixels."""

from __future__ import annotations

from torch import Tensor, nn

from robustvlm.detect.base import Detector, Head
from robustvlm.models import VLM, ZeroShotClassifier


class ImageDetector(nn.Module):
    """A score of images: pixels [B, 3, H, H] in [0, 1] to one number each [B], higher = more in-distribution.

    Example:
        >>> import torch
        >>> from robustvlm.detect import MCM
        >>> from robustvlm.models import load_model, zero_shot
        >>> classifier = zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False)
        >>> score = ImageDetector(classifier.vlm, MCM(head_of(classifier)))
        >>> score(torch.rand(3, 3, 64, 64)).shape
        torch.Size([3])
    """

    def __init__(self, vlm: VLM, detector: Detector) -> None:
        super().__init__()
        self.vlm, self.detector = vlm, detector

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the scores [B]."""
        return self.detector.score(self.vlm.encode_image(pixels))


def head_of(classifier: ZeroShotClassifier) -> Head:
    """Return the head of a zero-shot classifier, as scores want it."""
    return Head(classifier.class_embeddings, classifier.vlm.logit_scale)
