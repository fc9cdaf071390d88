"""What attacks and evaluations need of a model: pixels in, logits out, perhaps with the right to refuse."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustvlm.models import VLM, ZeroShotClassifier
from robustvlm.models.vlm import framing_of_model


class Classifier(nn.Module, ABC):
    """A model of known classes: pixels [B, 3, H, H] in [0, 1] to logits [B, K].

    With `can_reject` there is one column more, the acceptance score: an image is accepted exactly when it is positive.
    `framing` says how an image of any shape becomes such a square.
    `vlm` and `class_embeddings` are there for classifiers on top of an encoder, None otherwise; `logit_scale` is the
    factor on cosine similarities, None where the logits are none.
    """

    def __init__(
        self,
        *,
        spec: str,
        class_names: Sequence[str],
        image_size: int,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        fill_color: int = 0,
        logit_scale: float | None = None,
        can_reject: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.class_names = spec, tuple(class_names)
        self.framing = framing_of_model(spec, image_size, interpolation, resize_mode, fill_color)
        self.logit_scale, self.can_reject = logit_scale, can_reject

    @property
    def image_size(self) -> int:
        """Side of the square that the model sees."""
        return self.framing.image_size

    @property
    def interpolation(self) -> str:
        """Filter of every resize."""
        return self.framing.interpolation

    @property
    def vlm(self) -> VLM | None:
        """The encoder below, if there is one."""
        return None

    @property
    def class_embeddings(self) -> Tensor | None:
        """Unit text embeddings of the classes [K, D], if there are any."""
        return None

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        if self.vlm is not None:
            return self.vlm.device
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of all that decides the output."""


class ZeroShot(Classifier):
    """The zero-shot classifier of an encoder, seen as any other classifier.

    Example:
        >>> from robustvlm.models import load_model, zero_shot
        >>> classifier = ZeroShot(zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False))
        >>> classifier(torch.rand(1, 3, 64, 64)).shape, classifier.can_reject
        (torch.Size([1, 2]), False)
    """

    def __init__(self, head: ZeroShotClassifier) -> None:
        encoder = head.vlm
        super().__init__(
            spec=encoder.spec,
            class_names=head.class_names,
            logit_scale=encoder.logit_scale,
            **encoder.framing.options(),
        )
        self.head = head

    @property
    def vlm(self) -> VLM:
        return self.head.vlm

    @property
    def class_embeddings(self) -> Tensor:
        return self.head.class_embeddings

    @property
    def fingerprint(self) -> str:
        return self.head.vlm.fingerprint

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, K]."""
        return self.head(pixels)
