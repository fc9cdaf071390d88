"""Features of known classes and of others: clouds on the unit sphere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.detect import Head, Supplies

CLASSES, DIM = 5, 16


@dataclass(frozen=True)
class Clouds:
    """Unit features in float64: to learn from (with labels), known and unknown ones to judge, words, and the head.

    The stream are other images of both kinds, without labels.
    """

    fit: Tensor
    labels: Tensor
    known: Tensor
    unknown: Tensor
    words: Tensor
    head: Head
    stream: Tensor

    @property
    def supplies(self) -> Supplies:
        found = Supplies(self.head, features=self.fit, labels=self.labels, words=self.words, stream=self.stream)
        return replace(found, negatives=self.words[::2])


def draw_clouds() -> Clouds:
    """Draw five known classes and eight others."""
    draws = torch.Generator().manual_seed(11)

    def around(centres: Tensor, each: int, spread: float) -> Tensor:
        noise = torch.randn(each * len(centres), DIM, generator=draws, dtype=torch.float64)
        return F.normalize(centres.repeat(each, 1) + spread * noise, dim=1)

    centres = F.normalize(torch.randn(CLASSES, DIM, generator=draws, dtype=torch.float64), dim=1)
    others = F.normalize(torch.randn(8, DIM, generator=draws, dtype=torch.float64), dim=1)
    return Clouds(
        fit=around(centres, 40, 0.15),
        labels=torch.arange(CLASSES).repeat(40),
        known=around(centres, 12, 0.15),
        unknown=around(others, 8, 0.15),
        words=F.normalize(torch.randn(30, DIM, generator=draws, dtype=torch.float64), dim=1),
        head=Head(around(centres, 1, 0.05), 20.0),
        stream=torch.cat([around(centres, 10, 0.15), around(others, 6, 0.15)]),
    )
