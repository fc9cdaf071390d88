"""AGC: the feature moves along the great circle towards the mean feature of random perspectives, and beyond it.

Li, Xue, Wang et al., *Adaptive Geometric Correction*, 2026 (arXiv 2605.15584).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.views import CORNER_DRAWS, drawn, features_of, perspectives

_SAME = 1e-6
"""Below this angle to the mean there is no way to go."""


def correction(
    own: Tensor, views: Tensor, *, least: float = 0.45, gain: float = 1.8, power: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Return how far to go, in angles to the mean, [B], and the unit mean [B, D] of the views' features.

    It is least + gain attack^power trust: attack is the mean of 1 - cos(view, own) in [0, 1], trust the mean of
    (1 + cos) / 2 over pairs of views, 1 for a single view.

    Args:
        own: unit features [B, D]; views: unit features [B, V, D].

    Example:
        >>> own = torch.tensor([[1.0, 0.0]])
        >>> beta, mean = correction(own, torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
        >>> beta.item(), mean.tolist()
        (2.25, [[0.0, 1.0]])
    """
    count = views.shape[1]
    attack = (1 - torch.einsum("bvd,bd->bv", views, own)).mean(1).clamp(0.0, 1.0)
    # |sum|^2 holds every pair twice and each view once with itself.
    pairs = (views.sum(1).square().sum(1) - views.square().sum((1, 2))) / max(1, count * (count - 1))
    pairs = pairs if count > 1 else torch.ones_like(pairs)
    # A power below one has no finite slope at zero.
    strength = torch.where(attack > 0, attack.clamp_min(_SAME).pow(power), torch.zeros_like(attack))
    return least + gain * strength * (1 + pairs) / 2, F.normalize(views.mean(1), dim=1)


def along_circle(own: Tensor, mean: Tensor, beta: Tensor) -> Tensor:
    """Return unit features [B, D] at `beta` [B] times the angle from `own` to `mean`; `own` where these agree.

    Example:
        >>> along_circle(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0.5]))
        tensor([[0.7071, 0.7071]])
    """
    cosine = (own * mean).sum(1, keepdim=True)
    tangent = mean - cosine * own
    apart = tangent.norm(dim=1, keepdim=True) >= _SAME
    # The norm's slope at zero and that of a quotient by zero are no numbers, even behind `where`.
    safe = torch.where(apart, tangent, torch.ones_like(tangent))
    sine = safe.norm(dim=1, keepdim=True)
    angle = beta[:, None] * torch.atan2(sine, cosine)
    return torch.where(apart, angle.cos() * own + angle.sin() * safe / sine, own)


@zoo.DEFENCES.named("agc")
@dataclass(frozen=True)
class GeodesicCorrection(zoo.FeatureDefence):
    """The image's feature, moved towards the mean of its perspectives' and beyond, the further the more they differ.

    Example:
        >>> from robustvlm.defenses import load_pipeline
        >>> load_pipeline("tiny+agc:2").encode_image(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 192])
    """

    about = zoo.About(
        title="AGC, adaptive geodesic correction",
        reference="Li, Xue, Wang et al., 2026, arXiv 2605.15584",
        summary="the feature moved towards the mean of random perspectives and beyond (0 views: off)",
        fidelity=zoo.CODE,
        differs=(
            "Perspectives are of the image at the model's size; the release takes them at full size and then crops.",
            "The release lets no gradient through the size of the correction, which is fixed in its attack's files.",
            "Its paper gives the gain over other defences, 44.4 points over eight sets, not the figure itself.",
        ),
        licence_note="MIT, by its README",
        commit="02bcf94",
    )
    off = "0"
    modes = (zoo.THROUGH,)
    random = True

    views: Annotated[int, zoo.Strength("perspectives; 0 is off", 0, 4096, origin="C")] = 32
    least: Annotated[float, zoo.Strength("least correction, in angles to the mean", 0, 100, origin="C")] = 0.45
    gain: Annotated[float, zoo.Strength("most that is added to it", 0, 100, origin="C")] = 1.8
    power: Annotated[float, zoo.Strength("of the mean distance of the views", 1e-3, 100, origin="C")] = 0.9
    distortion: Annotated[float, zoo.Strength("of the perspectives", 0, 0.99, origin="C")] = 0.5

    @property
    def gradient_draws(self) -> int:
        return zoo.draws_of_views(self.views)

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        del gate_open
        return zoo.Passes(1 + self.views)

    @property
    def idle(self) -> bool:
        return not self.views

    def feature(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        del mode
        own = below.encode(pixels)
        if self.idle:
            return own
        draws = torch.stack([torch.rand(self.views, CORNER_DRAWS, generator=one) for one in zoo.generators(pixels)])
        features = features_of(below.encode, drawn(partial(perspectives, distortion=self.distortion), draws), pixels)
        beta, mean = correction(own, features, least=self.least, gain=self.gain, power=self.power)
        return along_circle(own, mean, beta)
