"""TTC: noise, then steps that drive the feature away from where it is; kept where the noise alone hardly moved it.

Xing, Zhao and Sebe, *CLIP is Strong Enough to Fight Back*, CVPR 2025 (arXiv 2503.03613).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustvlm.attacks.threat import per_image
from robustvlm.defenses.zoo.inner import lengths, recomputed, score_gradient, smooth_sign, straight, within


@dataclass(frozen=True)
class Countered:
    """What became of images [B, 3, H, H].

    Attributes:
        noisy: x + d_0, the answer's image where the gate is shut; moved: where it is open.
        ratio: |g(x + d_0) - g(x)| / |g(x)|, [B]: the gate is open below tau.
    """

    noisy: Tensor
    moved: Tensor
    ratio: Tensor

    def image(self, tau: float) -> Tensor:
        """Return the image that is answered."""
        return torch.where(per_image(self.ratio < tau, self.moved), self.moved, self.noisy)


def step_weights(steps: int, beta: float) -> list[float]:
    """Return softmax(beta (0, 1, ..., steps)), how much each point of the way counts.

    Example:
        >>> [round(weight, 4) for weight in step_weights(2, 2.0)]
        [0.0159, 0.1173, 0.8668]
    """
    return torch.softmax(beta * torch.arange(steps + 1, dtype=torch.float64), 0).tolist()


def away_step(
    feature: Callable[[Tensor], Tensor],
    y: Tensor,
    x: Tensor,
    anchor: Tensor,
    *,
    size: float,
    eps: float,
    smooth: bool = False,
) -> Tensor:
    """Return `y` after a sign step of `size` up |g(y) - anchor|^2, within x +- `eps` and [0, 1].

    Args:
        feature: images to raw features [B, D]; anchor: features [B, D] to move away from.
        smooth: leave the result differentiable, with a smooth sign.
    """
    _, grad = score_gradient(lambda v: (feature(v) - anchor).square().sum(1), y, graph=smooth)
    return within(y + size * (smooth_sign(grad) if smooth else grad.sign()), x, eps)


def countered(
    feature: Callable[[Tensor], Tensor],
    x: Tensor,
    noise: Tensor,
    *,
    eps: float,
    size: float,
    steps: int,
    beta: float,
    smooth: bool = False,
) -> Countered:
    """Return images [B, 3, H, H] after the counterattack, and what the gate looks at.

    Args:
        noise: uniform in [-1, 1], of the images' shape: d_0 is eps times this, clipped so that x + d_0 is an image.
        smooth: gradients pass the steps; otherwise each is a constant (BPDA). The ratio's gradient is always exact.

    Example:
        >>> x = torch.full((1, 3, 2, 2), 0.5)
        >>> found = countered(lambda v: v.flatten(1), x, torch.ones_like(x), eps=0.03, size=0.01, steps=1, beta=0.0)
        >>> torch.allclose(found.moved, x + 0.03), round(found.ratio.item(), 4)
        (True, 0.06)
    """
    anchor = feature(x)
    noisy = (x + eps * noise).clamp(0.0, 1.0)
    ratio = lengths(feature(noisy) - anchor) / lengths(anchor)
    if eps == 0:
        return Countered(x, x, ratio)
    base, held = (x, anchor) if smooth else (x.detach(), anchor.detach())
    move = partial(away_step, feature, size=size, eps=eps)
    y = noisy if smooth else noisy.detach()
    weights = step_weights(steps, beta)
    mixed = weights[0] * y
    for weight in weights[1:]:
        y = recomputed(move, partial(move, smooth=True), y, base, held) if smooth else move(y, base, held)
        mixed = mixed + weight * y
    mixed = mixed.clamp(0.0, 1.0)
    return Countered(noisy, mixed, ratio) if smooth else Countered(straight(x, noisy), straight(x, mixed), ratio)
