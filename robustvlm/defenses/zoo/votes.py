"""Answers over several views of an image: the vote of random crops, and the mean logits of flips and crops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.honesty import exactly
from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.views import CROP_DRAWS, View, crops, drawn, features_of


@zoo.DEFENCES.named("vote")
@dataclass(frozen=True)
class Vote(zoo.AnswerDefence):
    """The answer given most often over N random resized crops.

    Returns the log of (votes + p/(2N)) / (1 + 1/(2N)), with p the mean probability over the views: half a vote shared
    out by it decides between classes with as many votes and changes nothing else. Its gradient is that of log p. Where
    all views agree, an attack on cross-entropy so climbs along that of the mean probability, and the margin's rival is
    the likeliest class; with half a vote for every class both would be blind.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> voting = load_classifier("tiny+vote:4", ["apple", "dog"], ["{}"], cache=False)
        >>> voting(torch.rand(1, 3, 64, 64)).exp().sum().round(decimals=3)
        tensor(1.)
    """

    about = zoo.About(
        title="vote of random crops",
        reference="a control of the same cost for methods that average views",
        summary="the most frequent answer over N random crops (0: off)",
        fidelity=zoo.OWN,
        differs=("Crops have half of the image's area at least, where views of R-TPT have 8 %.",),
    )
    off = "0"
    random = True

    views: Annotated[int, zoo.Strength("random crops; 0 leaves the answer alone", 0, 1024)] = 32
    area: Annotated[float, zoo.Strength("least share of the image's area in a crop", 0.05, 1.0)] = 0.5

    @property
    def gradient_draws(self) -> int:
        return zoo.draws_of_views(self.views)

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        del gate_open
        return zoo.Passes(max(1, self.views))

    def answer(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        del mode
        if self.views == 0:
            return below.logits(pixels)
        draws = torch.stack([torch.rand(self.views, CROP_DRAWS, generator=one) for one in zoo.generators(pixels)])
        logits = features_of(below.logits, drawn(partial(crops, least=self.area), draws), pixels)
        half = math.log(2 * self.views)
        votes = F.one_hot(logits.detach().argmax(2), logits.shape[-1]).to(logits.dtype).mean(1)
        mean = logits.log_softmax(2).logsumexp(1) - math.log(self.views)
        shares = torch.logaddexp(votes.log(), mean.detach() - half) - math.log1p(1 / (2 * self.views))
        return exactly(shares, mean)


@zoo.DEFENCES.named("tte")
@dataclass(frozen=True)
class TestTimeEnsemble(zoo.AnswerDefence):
    """The mean logits over the image, its mirror image, four corner crops and their mirror images... up to N views.

    Example:
        >>> TestTimeEnsemble(3).views_of(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 3, 3, 8, 8])
    """

    __test__ = False  # no test, whatever its name begins with

    about = zoo.About(
        title="test-time ensembling",
        reference="Perez, Alfarra, Jeanneret, Rueda, Thabet, Ghanem, Arbelaez, ICCV 2021 workshops, arXiv 2107.14110",
        summary="mean logits over the image, its flip and flipped crops (1: off)",
        fidelity=zoo.OWN,
        differs=("The crops are the four corners and the centre at a fixed size, not drawn at random.",),
    )
    off = "1"

    views: Annotated[int, zoo.Strength("views, the image among them; 1 is off", 1, 12, origin="K")] = 9
    crop: Annotated[float, zoo.Strength("side of a crop over the image's", 0.25, 1.0)] = 0.875

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        del gate_open
        return zoo.Passes(self.views)

    def _ways(self, pixels: Tensor) -> list[View]:
        """Return the views: the image, its mirror, then each crop mirrored, then as it is."""
        height, width = (max(1, round(self.crop * side)) for side in pixels.shape[-2:])
        low, far = pixels.shape[-2] - height, pixels.shape[-1] - width
        places = [(low // 2, far // 2), (0, 0), (0, far), (low, 0), (low, far)]
        parts: list[View] = [partial(_corner, top=top, left=left, size=(height, width)) for top, left in places]
        turned = [partial(_mirrored, part) for part in parts]
        views: list[View] = [_itself, partial(_mirrored, _itself), *turned, *parts]
        return views[: self.views]

    def views_of(self, pixels: Tensor) -> Tensor:
        """Return the views [B, N, 3, H, W] of images."""
        return torch.stack([view(pixels) for view in self._ways(pixels)], dim=1)

    def answer(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        del mode
        if self.views == 1:
            return below.logits(pixels)
        return features_of(below.logits, self._ways(pixels), pixels).mean(1)


def _itself(pixels: Tensor) -> Tensor:
    return pixels


def _mirrored(view: View, pixels: Tensor) -> Tensor:
    return view(pixels).flip(-1)


def _corner(pixels: Tensor, *, top: int, left: int, size: tuple[int, int]) -> Tensor:
    crop, whole = pixels[..., top : top + size[0], left : left + size[1]], list(pixels.shape[-2:])
    return F.interpolate(crop, whole, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
