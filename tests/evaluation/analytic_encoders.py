"""Encoders whose smoothed features have a closed form: claims about them can be held to the truth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustvlm.models import VLM

SIDE = 4
PIXELS = 3 * SIDE * SIDE


class Analytic(VLM):
    """Two-dimensional features of 4-pixel images; texts are angles in degrees."""

    def __init__(self, spec: str) -> None:
        super().__init__(spec=spec, image_size=SIDE, logit_scale=10.0)

    def _identity(self) -> list[str]:
        return [self.spec]

    def _text_features(self, texts: list[str]) -> Tensor:
        angles = [math.radians(float(text)) for text in texts]
        return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])


class Circle(Analytic):
    """O2: f = (cos kz, sin kz) along one direction z; the smoothed feature of x turns by exactly k * eps."""

    def __init__(self, k: float = 1.0) -> None:
        super().__init__(f"circle-{k}")
        self.k = k

    def _image_features(self, pixels: Tensor) -> Tensor:
        z = self.k * along(pixels)
        return torch.stack([z.cos(), z.sin()], dim=-1)


class HalfSpace(Analytic):
    """O1: f = +u where z <= b, else -u; its gradient is that of a slope, which may be wide."""

    def __init__(self, b: float = 0.9, slope: float = 50.0) -> None:
        super().__init__(f"half-space-{b}")
        self.b, self.slope = b, slope

    def _image_features(self, pixels: Tensor) -> Tensor:
        z = along(pixels)
        soft = torch.tanh(self.slope * (self.b - z))
        sign = torch.where(z <= self.b, 1.0, -1.0)
        cosine = soft + (sign - soft).detach()
        return torch.stack([cosine, 1e-3 * torch.ones_like(cosine)], dim=-1)


def along(pixels: Tensor) -> Tensor:
    """The coordinate z of images along the unit direction that all pixels share."""
    return pixels.flatten(1).sum(dim=1) / math.sqrt(PIXELS)


def image_at(z: float) -> Tensor:
    """A uniform image [1, 3, 4, 4] with the coordinate z."""
    return torch.full((1, 3, SIDE, SIDE), z / math.sqrt(PIXELS))
