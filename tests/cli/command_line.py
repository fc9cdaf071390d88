"""The program as a test calls it, and what it leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# A module with an encoder: the mean colour of an image, against red and blue.
MEAN = """
import torch

class Mean:
    image_size, logit_scale = 8, 10.0

    def encode_image(self, pixels):
        return pixels.mean((2, 3)) + 0.01

    def encode_text(self, texts):
        return torch.eye(3)[[0 if "red" in text else 2 for text in texts]]
"""


class Ended(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Call = Callable[..., Ended]

# An attack on the encoder and the pictures that the fixture `place` writes.
OWN = ["attack", "own_encoders:Mean", "--data", "imagefolder:photos", "--attack", "pgd:steps=2"]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
