"""Answers over several views of an image: the vote of random crops, and the mean logits of flips and crops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robustvlm.defenses.zoo.base import (
    DEFENCES,
    OWN,
    About,
    AnswerDefence,
    Below,
    Passes,
    Strength,
    generators,
)
from robustvlm.defenses.zoo.gradients import exactly

_ROWS = 128


def in_parts(answer: Below, views: Tensor) -> Tensor:
    """Return logits [B, N, K] of views [B, N, 3, S, S], so many rows at a time that memory does not grow with N.

    With gradients, parts are recomputed in the backward pass.
    """
    images, count = views.shape[:2]
    rows = views.flatten(0, 1)
    parts = rows.split(max(images, _ROWS))
    again = len(parts) > 1 and torch.is_grad_enabled() and rows.requires_grad
    logits = [checkpoint(answer.logits, part, use_reentrant=False) if again else answer.logits(part) for part in parts]
    return torch.cat(logits).view(images, count, -1)


def random_crop(x: Tensor, draws: torch.Generator, *, least: float, most: float = 1.0) -> Tensor:
    """Return one random resized crop [1, 3, S, S] of an image [1, 3, S, S], flipped in half of the cases.

    A share of the area from `least` to `most`, a ratio of the sides from 3/4 to 4/3 (log-uniform); the crop that does
    not fit after ten tries is the whole image. Bilinear with antialiasing, differentiable in the pixels.
    """
    size = x.shape[-1]
    area, ratio = torch.rand(10, generator=draws), torch.rand(10, generator=draws)
    place, flip = torch.rand(2, generator=draws).tolist(), float(torch.rand((), generator=draws)) < 0.5
    height, width = size, size
    for share, turn in zip(area.tolist(), ratio.tolist(), strict=True):
        side = size * math.sqrt(least + (most - least) * share)
        stretch = math.exp((turn - 0.5) * math.log(4 / 3))  # the root of the ratio
        wanted = round(side * stretch), round(side / stretch)
        if 0 < wanted[0] <= size and 0 < wanted[1] <= size:
            width, height = wanted
            break
    top, left = int(place[0] * (size - height + 1)), int(place[1] * (size - width + 1))
    crop = x[..., top : top + height, left : left + width]
    view = F.interpolate(crop, (size, size), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
    return view.flip(-1) if flip else view


@DEFENCES.named("vote")
@dataclass(frozen=True)
class Vote(AnswerDefence):
    """The answer given most often over N random resized crops.

    Returns log (votes + 1/(2N)) / (1 + K/(2N)), whose argmax is the answer; its gradient is that of the log of the mean
    probability over the views.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> voting = load_classifier("tiny+vote:4", ["apple", "dog"], ["{}"], cache=False)
        >>> voting(torch.rand(1, 3, 64, 64)).exp().sum().round(decimals=3)
        tensor(1.)
    """

    about = About(
        title="vote of random crops",
        reference="a control of the same cost for methods that average views",
        summary="the most frequent answer over N random crops (0: off)",
        fidelity=OWN,
    )
    off = "0"
    random = True
    eot = 4

    views: Annotated[int, Strength("random crops; 0 leaves the answer alone", 0, 1024)] = 32
    area: Annotated[float, Strength("least share of the image's area in a crop", 0.05, 1.0)] = 0.5

    def cost(self, *, gate_open: bool = True) -> Passes:
        del gate_open
        return Passes(max(1, self.views))

    def answer(self, pixels: Tensor, below: Below, mode: str) -> Tensor:
        del mode
        if self.views == 0:
            return below.logits(pixels)
        rows = [
            torch.cat([random_crop(x[None], draws, least=self.area) for _ in range(self.views)])
            for x, draws in zip(pixels, generators(pixels), strict=True)
        ]
        logits = in_parts(below, torch.stack(rows))
        classes, half = logits.shape[-1], 1 / (2 * self.views)
        votes = F.one_hot(logits.detach().argmax(2), classes).to(logits.dtype).mean(1)
        shares = ((votes + half) / (1 + classes * half)).log()
        return exactly(shares, logits.log_softmax(2).logsumexp(1))


@DEFENCES.named("tte")
@dataclass(frozen=True)
class TestTimeEnsemble(AnswerDefence):
    """The mean logits over the image, its mirror image, four corner crops and their mirror images... up to N views.

    Example:
        >>> TestTimeEnsemble(3).views_of(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 3, 3, 8, 8])
    """

    __test__ = False  # no test, whatever its name begins with

    about = About(
        title="test-time ensembling",
        reference="Perez, Alfarra, Jeanneret, Rueda, Thabet, Ghanem, Arbelaez, ICCV 2021 workshops, arXiv 2107.14110",
        summary="mean logits over the image, its flip and flipped crops (1: off)",
        fidelity=OWN,
        differs=("The crops are the four corners and the centre at a fixed size, not drawn at random.",),
    )
    off = "1"

    views: Annotated[int, Strength("views, the image among them; 1 is off", 1, 12, origin="K")] = 9
    crop: Annotated[float, Strength("side of a crop over the image's", 0.25, 1.0)] = 0.875

    def cost(self, *, gate_open: bool = True) -> Passes:
        del gate_open
        return Passes(self.views)

    def views_of(self, pixels: Tensor) -> Tensor:
        """Return the views [B, N, 3, S, S]: the image, its mirror, then each crop mirrored, then as it is."""
        size = pixels.shape[-1]
        side = max(1, round(self.crop * size))
        far, mid = size - side, (size - side) // 2
        crops = []
        for top, left in ((mid, mid), (0, 0), (0, far), (far, 0), (far, far)):
            crop = pixels[..., top : top + side, left : left + side]
            crops.append(
                F.interpolate(crop, (size, size), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
            )
        views = [pixels, pixels.flip(-1), *(crop.flip(-1) for crop in crops), *crops]
        return torch.stack(views[: self.views], dim=1)

    def answer(self, pixels: Tensor, below: Below, mode: str) -> Tensor:
        del mode
        if self.views == 1:
            return below.logits(pixels)
        return in_parts(below, self.views_of(pixels)).mean(1)
