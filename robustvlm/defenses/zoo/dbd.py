"""DBD: the features of many views say where an attack pushed the image's own, and the answer goes back that way.

Liu et al., *Directional Bias*, ICLR 2026 (arXiv 2606.06186).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.honesty import exactly
from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.gradients import Steering
from robustvlm.defenses.zoo.inner import gate_hinge
from robustvlm.defenses.zoo.jpeg import Jpeg
from robustvlm.defenses.zoo.pixels import Blur, Median, reflected
from robustvlm.defenses.zoo.views import CROP_DRAWS, View, crops, drawn, entropies, features_of

QUALITIES = (50, 60, 75)
"""Of the views by JPEG."""
ROUNDINGS = (torch.floor, torch.round, torch.ceil)
"""How the views of few bits are rounded."""
_LEVELS = 256 // 2**3
"""Levels of 8 bits to one of three."""
_WINDOW = 5
# Levels of 8 bits divided in floats lie beside a whole number at times.
_TIE = 1e-5


def drift(own: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """Return how well the views agree on where the feature lies wrong, in [-1, 1], [B], and that direction, [B, D].

    The direction is D = mean f_i - f_0, and the score the mean cosine of f_i - f_0 with it; 0 where D is zero.

    Args:
        own: unit features f_0 of the images, [B, D]; views: unit features f_i of their views, [B, V, D].

    Example:
        >>> score, direction = drift(torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
        >>> round(score.item(), 3), direction.tolist()
        (1.0, [[-1.0, 1.0]])
    """
    apart = views - own[:, None]
    direction = apart.mean(1)
    return torch.einsum("bvd,bd->bv", F.normalize(apart, dim=2), F.normalize(direction, dim=1)).mean(1), direction


def surest(features: Tensor, logits: Tensor, kept: int) -> Tensor:
    """Return the features [B, kept, D] of those views [B, V, D] whose logits [B, V, K] have the least entropy.

    Example:
        >>> surest(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0, 0.0], [5.0, 0.0]]]), 1).item()
        2.0
    """
    places = entropies(logits.detach()).topk(kept, dim=1, largest=False).indices
    return features.gather(1, places[:, :, None].expand(-1, -1, features.shape[2]))


def in_three_bits(pixels: Tensor, rounding: View, *, wrap: bool = False) -> Tensor:
    """Return pixels at multiples of 32 of 255, rounded as said, with the gradient of the image itself.

    What is rounded up to 256 becomes 255, or 0 with `wrap`, as where it is cast to 8 bits: white becomes black.

    Example:
        >>> x = torch.tensor([1.0, 0.5])
        >>> (255 * in_three_bits(x, torch.ceil)).tolist(), (255 * in_three_bits(x, torch.ceil, wrap=True)).tolist()
        ([255.0, 128.0], [0.0, 128.0])
    """
    nudge = _TIE if rounding is torch.floor else -_TIE if rounding is torch.ceil else 0.0
    levels = rounding(255 * pixels.detach() / _LEVELS + nudge) * _LEVELS
    return exactly((levels % 256 if wrap else levels.clamp_max(255)) / 255, pixels)


def noisy(pixels: Tensor, noise: Tensor) -> Tensor:
    """Return pixels [B, 3, H, H] with noise [B, 3 H H] on them, clipped and cut off to 8 bits, whose gradient passes.

    Example:
        >>> 255 * noisy(torch.full((1, 1, 1, 2), 0.5), torch.tensor([[0.0, 9.0]]))
        tensor([[[[127., 255.]]]])
    """
    clipped = (pixels + noise.to(pixels).view_as(pixels)).clamp(0.0, 1.0)
    return exactly((255 * clipped.detach()).floor() / 255, clipped)


def averaged(pixels: Tensor) -> Tensor:
    """Return the mean over windows of 5 x 5 pixels [B, 3, H, H], the border reflected."""
    return F.avg_pool2d(reflected(pixels, _WINDOW // 2), _WINDOW, stride=1)


@zoo.DEFENCES.named("dbd")
@dataclass(frozen=True)
class DirectionalBias(zoo.AnswerDefence):
    """The mean feature of views, or where these agree on a direction, as far beyond it as that is said.

    With f the image's unit feature and m the mean of its surest views: m where the score is at most the threshold, so
    that f has no say, and gain m - (gain - 1) f above it.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> model = load_classifier("tiny+dbd:crops=2:noises=1", ["apple", "dog"], ["{}"], cache=False)
        >>> model(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 2])
    """

    about = zoo.About(
        title="DBD, directional bias",
        reference="Liu et al., ICLR 2026, arXiv 2606.06186",
        summary="the mean feature of 31 views, or beyond it where they agree on a direction (0 views kept: off)",
        fidelity=zoo.CODE,
        claims=(
            zoo.Claim("CLIP ViT-B/32", "ten sets, mean", "PGD-100 on the undefended model", 4, 91.3, clean=64.1),
            zoo.Claim("CLIP ViT-B/16", "ten sets, mean", "PGD-100 on the undefended model", 4, 93.8),
            zoo.Claim("CLIP", "ten sets, mean", "AutoAttack on the undefended model", None, 69.8),
            zoo.Claim(
                "CLIP", "ten sets, mean", "the undefended model's own prediction in the label's place", None, 66.8
            ),
        ),
        differs=(
            "Views are of the image at the model's size; the release takes them of clean images at full size, and of "
            "attacked ones at 224 pixels after they were cut off to 8 bits.",
            "Crops, and what filters make, keep their fractions of a level.",
            "Of three bits rounded to 256 the release makes 0; here 255, unless wrap=on.",
            "The release's classes have descriptions by a language model, here the run's templates.",
        ),
        licence_note="no licence file",
        commit="36110cf",
    )
    off = "kept=0"
    modes = (zoo.SMOOTH, zoo.IDENTITY, zoo.GATE_ON, zoo.GATE_OFF)
    random = True
    gates = ("mean cosine of the views' directions with their mean, against the threshold",)
    needs_encoder = True

    kept: Annotated[int, zoo.Strength("surest views that are used; 0 is off", 0, 4096, origin="C")] = 16
    gain: Annotated[float, zoo.Strength("how far the answer goes where they agree", 0, 100, origin="C")] = 2.5
    threshold: Annotated[float, zoo.Strength("score above which they agree", -1.1, 1.1, origin="C")] = 0.8
    crops: Annotated[int, zoo.Strength("views by crops", 0, 4096, origin="C")] = 16
    area: Annotated[float, zoo.Strength("least share of the image in a crop", 0.05, 1, origin="C")] = 0.5
    noises: Annotated[int, zoo.Strength("views with noise", 0, 4096, origin="C")] = 6
    sigma: Annotated[float, zoo.Strength("standard deviation of the noise", 0, 10, origin="C")] = 0.1
    wrap: Annotated[str, zoo.Strength("whether what is rounded to 256 becomes 0, as released", words=("off", "on"))] = (
        "off"
    )

    @property
    def views(self) -> int:
        """How many views there are, the image not among them."""
        return self.crops + self.noises + len(ROUNDINGS) + len(QUALITIES) + 3

    @property
    def gradient_draws(self) -> int:
        return zoo.draws_of_views(min(self.kept, self.views) or self.views)

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        del gate_open  # it decides after all passes
        return zoo.Passes(1 + self.views if self.kept else 1)

    def answer(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        if not self.kept:
            return below.logits(pixels)
        steering = Steering(pixels)
        pixels = steering.pixels
        own = below.encode(pixels)
        features = features_of(below.encode, self.views_of(pixels, below, mode), pixels)
        kept = surest(features, below.scores(features), min(self.kept, self.views))
        score, direction = drift(own, kept)
        mean = kept.mean(1)  # not f + D, so that f leaves no trace
        shut, open_ = below.scores(mean), below.scores(mean + (self.gain - 1) * direction)
        found = torch.where((score > self.threshold)[:, None], open_, shut)
        if mode not in (zoo.GATE_ON, zoo.GATE_OFF):
            return found
        steering.lower(gate_hinge(-score, -self.threshold, mode))  # it opens above the threshold
        return exactly(found, open_ if mode == zoo.GATE_ON else shut)

    def views_of(self, pixels: Tensor, below: zoo.Below, mode: str) -> list[View]:
        """Return the views of images [B, 3, S, S], drawn afresh: crops, few bits, JPEG, noise, three filters."""
        numbers, noise = [], []
        for draws in zoo.generators(pixels):
            numbers.append(torch.rand(self.crops, CROP_DRAWS, generator=draws))
            noise.append(self.sigma * torch.randn(self.noises, pixels[0].numel(), generator=draws))
        codec = zoo.IDENTITY if mode == zoo.IDENTITY else zoo.SMOOTH
        filters = (Median(_WINDOW), Blur(_WINDOW))
        return [
            *drawn(partial(crops, least=self.area), torch.stack(numbers)),
            *(partial(in_three_bits, rounding=rounding, wrap=self.wrap == "on") for rounding in ROUNDINGS),
            *(partial(Jpeg(quality).move, below=below, mode=codec) for quality in QUALITIES),
            *drawn(noisy, torch.stack(noise)),
            averaged,
            *(partial(one.move, below=below, mode=zoo.THROUGH) for one in filters),
        ]
