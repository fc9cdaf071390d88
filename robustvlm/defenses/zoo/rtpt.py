"""R-TPT without its prompt's step: views of the image weighted by how many others agree with each.

Sheng, Liang, Wang and He, *R-TPT*, CVPR 2025 (arXiv 2504.11195).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.views import CROP_DRAWS, crops, drawn, features_of


def reliability(features: Tensor, neighbours: int) -> Tensor:
    """Return, of unit features [B, V, D], each view's mean cosine to the `neighbours` nearest other views, [B, V].

    Example:
        >>> reliability(torch.eye(3)[None, [0, 0, 1]], 1)
        tensor([[1., 1., 0.]])
    """
    count = features.shape[1]
    if count == 1:
        return torch.ones_like(features[:, :, 0])
    cosines = features @ features.transpose(1, 2)
    others = cosines.masked_fill(torch.eye(count, dtype=torch.bool, device=features.device), -torch.inf)
    return others.topk(min(neighbours, count - 1), dim=2).values.mean(2)


def weighted(logits: Tensor, reliable: Tensor, temperature: float) -> Tensor:
    """Return the mean [B, K] of views' logits [B, V, K] by softmax(reliable / temperature), [B, V].

    Example:
        >>> weighted(torch.tensor([[[1.0], [3.0]]]), torch.zeros(1, 2), 0.01)
        tensor([[2.]])
    """
    return torch.einsum("bv,bvk->bk", (reliable / temperature).softmax(1), logits)


@zoo.DEFENCES.named("rtpt")
@dataclass(frozen=True)
class ReliableViews(zoo.AnswerDefence):
    """Logits of the image and random crops of it, weighted by how many of the others each agrees with.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> model = load_classifier("tiny+rtpt:views=4", ["apple", "dog"], ["{}"], cache=False)
        >>> model(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 2])
    """

    about = zoo.About(
        title="R-TPT, without the prompt's step",
        reference="Sheng, Liang, Wang, He, CVPR 2025, arXiv 2504.11195",
        summary="logits of random crops, weighted by how many others each agrees with (1 view: off)",
        fidelity=zoo.CODE,
        partial="the prompt's step",
        claims=tuple(
            zoo.Claim(f"CLIP ViT-{size}", "eight sets, by TTP's authors", "PGD-100 on the undefended model", 4, robust)
            for size, robust in (("B/32", 35.3), ("B/16", 39.9), ("L/14", 49.6))
        ),
        differs=(
            "The prompt is not tuned (lr=0): a control for the whole method, whose figures are those claimed.",
            "Views are crops and mirrors; for its fine-grained sets the release adds AugMix.",
            "A view is no neighbour of its own; in half precision the release may count it as one.",
        ),
        licence_note="no licence file",
        commit="e085f13",
    )
    off = "views=1"
    modes = (zoo.IDENTITY, zoo.THROUGH)
    random = True
    needs_encoder = True

    lr: Annotated[float, zoo.Strength("rate of the prompt's step; the prompt is not tuned here yet: 0", 0, 0)] = 0.0
    views: Annotated[int, zoo.Strength("views, the image among them; 1 is off", 1, 4096, origin="C")] = 64
    neighbours: Annotated[int, zoo.Strength("views that a view is compared with", 1, 4096, origin="C")] = 20
    temperature: Annotated[float, zoo.Strength("of the weights", 1e-6, 1e6, origin="C")] = 0.01

    @property
    def gradient_draws(self) -> int:
        return zoo.draws_of_views(self.views)

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        del gate_open
        return zoo.Passes(self.views)

    def answer(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        if self.views == 1:
            return below.logits(pixels)
        draws = torch.stack([torch.rand(self.views - 1, CROP_DRAWS, generator=one) for one in zoo.generators(pixels)])
        others = features_of(below.encode, drawn(crops, draws), pixels)
        features = torch.cat([below.encode(pixels)[:, None], others], dim=1)
        logits = below.scores(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        reliable = reliability(features, self.neighbours)
        # The temperature is so low that the weights' slope drowns the logits': a constant in the default mode.
        return weighted(logits, reliable if mode == zoo.THROUGH else reliable.detach(), self.temperature)
