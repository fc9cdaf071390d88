"""CLIPure-Cos: the unit feature is turned towards the feature of a text without a class, ten large steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.honesty import exactly
from robustvlm.data.classes import DEFAULT
from robustvlm.defenses.zoo import base as zoo


def turned(features: Tensor, text: Tensor, steps: int, size: float) -> Tensor:
    """Return unit features [B, D] after `steps` steps of `size` along the unit tangent towards a unit text [D].

    u <- (u + size m) / |u + size m|, m the tangent of `text` at u at unit length. In the plane of u and the text, each
    step subtracts atan(size) from the signed angle to the text, on whichever side u stands: two steps beyond the text
    undo each other where the angle is below atan(size).

    Example:
        >>> u, t = torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0])
        >>> turned(u, t, 1, 1.0)
        tensor([[0.7071, 0.7071]])
    """
    for _ in range(steps):
        tangent = text - (features @ text)[:, None] * features
        # Not F.normalize: at the text itself there is no direction, and the feature stays.
        moved = features + size * tangent / tangent.norm(dim=1, keepdim=True).clamp_min(1e-20)
        features = moved / moved.norm(dim=1, keepdim=True)
    return features


def turned_at_once(features: Tensor, text: Tensor, steps: int, size: float) -> Tensor:
    """Return what `turned` computes, by its closed form: one turn in the plane of the feature and the text.

    Its gradient is that of the function which the steps are; that of the steps themselves is scaled by `size` to the
    power of their number and drowns in rounding.

    Example:
        >>> u, t = F.normalize(torch.tensor([[1.0, 0.2]]), dim=1), torch.tensor([0.0, 1.0])
        >>> bool(torch.allclose(turned_at_once(u, t, 3, 0.5), turned(u, t, 3, 0.5), atol=1e-6))
        True
    """
    cosine = (features @ text)[:, None]
    across = features - cosine * text
    sine = across.norm(dim=1, keepdim=True)
    theta = torch.atan2(sine, cosine)
    step, angle = torch.atan(torch.tensor(size, dtype=features.dtype, device=features.device)), theta.detach()
    moved = torch.zeros_like(angle)
    for _ in range(steps):
        side = torch.where(angle >= 0, 1.0, -1.0)
        angle, moved = angle - side * step, moved - side * step
    final = theta + moved
    return final.cos() * text + final.sin() * across / sine.clamp_min(1e-20)


@zoo.DEFENCES.named("clipure")
@dataclass(frozen=True)
class CLIPure(zoo.FeatureDefence):
    """CLIPure-Cos, each image by itself.

    Example:
        >>> str(CLIPure())
        'clipure:10:30'
    """

    about = zoo.About(
        title="CLIPure-Cos",
        reference="Zhang, Bi, Chen, Guo, Cheng, ICLR 2025, arXiv 2502.18176",
        summary="the feature turned towards that of a text without a class, K steps of a size (0: off)",
        fidelity=zoo.CODE,
        commit="b4cc6d1",
        licence_note="research and evaluation only",
        claims=(
            zoo.Claim(
                model="ViT-L/14",
                data="ImageNet, 1000 images",
                attack="apgd-ce, apgd-t",
                eps=4,
                robust=72.6,
                adaptive=True,
            ),
            zoo.Claim(model="ViT-L/14", data="CIFAR-10", attack="AutoAttack", eps=None, robust=91.1, adaptive=True),
        ),
        differs=(
            "The step's length is each image's own; the release divides by a norm over the batch.",
            "The text without a class is the default template alone, in place of 80 templates.",
            "Computed in float32; the release's script runs the encoder in float16.",
            "The claimed attacks went through the defence with its steps as constants in the backward pass.",
        ),
        image_local_as_released=False,
    )
    off = "0"
    modes = (zoo.THROUGH, zoo.IDENTITY)

    steps: Annotated[int, zoo.Strength("steps; 0 leaves the feature alone", 0, 1000, origin="C")] = 10
    size: Annotated[float, zoo.Strength("size of a step along the unit tangent", 0.0, 1e6, origin="C")] = 30.0

    @property
    def idle(self) -> bool:
        return self.steps == 0

    def feature(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        features = below.encode(pixels)
        if self.idle:
            return features
        with torch.no_grad():
            empty = below.encode_text([template.replace("{}", "") for template in DEFAULT])
            text = F.normalize(empty.mean(0), dim=0)
            value = turned(features.detach(), text, self.steps, self.size)
        if mode == zoo.IDENTITY:
            return exactly(value, features)
        return exactly(value, turned_at_once(features, text, self.steps, self.size))
