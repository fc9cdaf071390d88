"""A classifier that accepts an image when a detection score is above a threshold: what attacks on scores attack."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.defenses import Classifier
from robustvlm.detect import Detector, Head
from robustvlm.models import VLM
from robustvlm.models.fingerprint import fingerprint


class ScoreGate(Classifier):
    """Logits of the zero-shot head, and score minus threshold as acceptance, differentiable down to the pixels.

    One encoder pass gives both.

    Args:
        inner: the model below; without an encoder its logits take the place of features.
        head, detector: of the score; threshold: accepted are images whose score is above it.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> from robustvlm.detect import MCM
        >>> inner = load_classifier("tiny", ["apple", "dog"], ["{}"], cache=False)
        >>> head = Head(inner.class_embeddings, inner.logit_scale)
        >>> ScoreGate(inner, head, MCM(head), threshold=0.1)(torch.rand(4, 3, 64, 64)).shape
        torch.Size([4, 3])
    """

    def __init__(self, inner: Classifier, head: Head, detector: Detector, threshold: float) -> None:
        super().__init__(
            spec=f"{inner.spec} gated by {type(detector).__name__}",
            class_names=inner.class_names,
            logit_scale=inner.logit_scale,
            can_reject=True,
            **inner.framing.options(),
        )
        self.inner, self.head, self.detector, self.threshold = inner, head, detector, threshold

    @property
    def vlm(self) -> VLM | None:
        return self.inner.vlm

    @property
    def class_embeddings(self) -> Tensor | None:
        return self.inner.class_embeddings

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.detector.state(), (self.inner.fingerprint, repr(self.threshold)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and acceptance [B, K + 1]."""
        vlm, n_classes = self.inner.vlm, len(self.class_names)
        features = self.inner(pixels)[:, :n_classes] if vlm is None else vlm.encode_image(pixels)
        # Under autocast the encoder may run in bfloat16; products in it would lose the margins attacks turn on.
        with torch.autocast(pixels.device.type, enabled=False):
            wide = features if features.dtype == torch.float64 else features.float()
            acceptance = self.detector.score(wide) - self.threshold
            return torch.cat([self.head.logits(wide), acceptance[:, None]], dim=1)
