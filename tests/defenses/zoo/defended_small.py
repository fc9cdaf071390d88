"""A small encoder, quick enough to be asked thousands of times, with what a defence may look at."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from robustvlm.defenses import Classifier
from robustvlm.defenses.classifier import ZeroShot
from robustvlm.defenses.pipeline import apply_operations
from robustvlm.defenses.specs import Operation
from robustvlm.defenses.zoo.base import DEFENCES, AnswerDefence, read_defence
from robustvlm.defenses.zoo.wrap import DefendedClassifier
from robustvlm.models import VLM, zero_shot

SIDE, DIM = 16, 12
NAMES = ("apple", "dog", "house")


class Small(VLM):
    """Two smooth layers from pixels to features; a text's feature follows from its letters."""

    def __init__(self) -> None:
        super().__init__(spec="small", image_size=SIDE, logit_scale=20.0)
        draws = torch.Generator().manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8 * (SIDE // 4) ** 2, DIM)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draws) * 0.3
        self.eval().requires_grad_(False)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.head(self.patches(pixels).tanh().flatten(1))

    def _text_features(self, texts: list[str]) -> Tensor:
        seeds = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") for text in texts]
        return torch.stack([torch.randn(DIM, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def classifier(*written: str) -> Classifier:
    """Return the small classifier behind defences, as `bits:3`, the last one outermost."""
    operations = [Operation(text.split(":")[0], tuple(text.split(":")[1:])) for text in written]
    answers = [one for one in operations if issubclass(DEFENCES[one.name], AnswerDefence)]
    vlm = apply_operations(Small(), [one for one in operations if one not in answers])
    found: Classifier = ZeroShot(zero_shot(vlm, NAMES, ["a photo of a {}."], cache=False)).eval()
    for one in answers:
        found = DefendedClassifier(found, read_defence(one.name, one.arguments))
    return found.requires_grad_(False)


def images(count: int = 5) -> Tensor:
    """Return images [N, 3, 16, 16] in [0, 1], smooth ones beside noisy ones."""
    draws = torch.Generator().manual_seed(1)
    noisy = torch.rand(count, 3, SIDE, SIDE, generator=draws)
    smooth = torch.nn.functional.interpolate(noisy[..., :4, :4], SIDE, mode="bilinear")
    return torch.where(torch.arange(count)[:, None, None, None] % 2 == 0, smooth, noisy)
