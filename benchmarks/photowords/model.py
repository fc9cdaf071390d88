"""The encoder of both sides: what a photograph shows, as a weighted mean of the texts of ImageNet's classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustvlm.data.classes import wordnet_names
from robustvlm.models.sentences import SentenceEncoder

from .pixels import SIDE, Photographs

TEMPLATE = "a photo of a {}."


class PhotoWords(nn.Module):
    """An open-vocabulary encoder made of a classifier of photographs and an encoder of sentences, neither trained.

    A photograph's feature [B, 384] is the mean of the texts of ImageNet's 1,000 classes, weighted by the classifier's
    probabilities; so it lies among texts and can be compared with any. Its reach is what those classes span.

    Source: ConSE, Norouzi et al. 2014 (arXiv 1312.5650), over all classes instead of the ten likeliest.
    """

    image_size = SIDE
    logit_scale = 100.0
    class_texts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.photographs, self.words = Photographs(), SentenceEncoder()
        names = [name for _, name in sorted(wordnet_names().items())]
        with torch.no_grad():
            self.register_buffer("class_texts", self.words([TEMPLATE.format(name) for name in names]))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return features [B, 384] of pixels [B, 3, 224, 224] in [0, 1]."""
        return self.photographs(pixels).softmax(dim=-1) @ self.class_texts

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return unit features [N, 384]."""
        return self.words(texts)


def load() -> PhotoWords:
    """Return the encoder, frozen and in evaluation mode; about five seconds, most of them for 1,000 class texts.

    Raises:
        UserError: a package is not installed; the message says how to install it.
    """
    return PhotoWords().eval().requires_grad_(False)
