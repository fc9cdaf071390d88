"""CSR: where a blurred copy has another feature, the image moves towards the copy's and away from its own.

Nie, Zhang, Wang, Shan and Chen, *Contrastive Spectral Rectification*, ICML 2026 (arXiv 2601.19210).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustvlm.attacks.threat import per_image
from robustvlm.defenses.zoo.inner import recomputed, score_gradient, smooth_sign, straight, within


def low_pass(pixels: Tensor, radius: float) -> Tensor:
    """Return images [B, 3, H, H] with frequency k (in waves per side) damped by exp(-|k|^2 / 2 radius^2), in [0, 1].

    Example:
        >>> x = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(low_pass(x, 1e6), x, atol=1e-6), low_pass(x, 1e-3).flatten(2).std(2).amax().item() < 1e-6
        (True, True)
    """
    side = pixels.shape[-1]
    down = torch.fft.fftfreq(side, 1 / side, device=pixels.device, dtype=pixels.dtype)
    across = torch.fft.rfftfreq(side, 1 / side, device=pixels.device, dtype=pixels.dtype)
    damped = torch.exp(-(down[:, None].square() + across.square()) / (2 * radius**2))
    return torch.fft.irfft2(torch.fft.rfft2(pixels) * damped, s=(side, side)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Rectified:
    """What became of images [B, 3, H, H].

    Attributes:
        image: what is answered; similarity: cosine with the blurred copy, [B]: the image moved where it is below the
            threshold.
    """

    image: Tensor
    similarity: Tensor


def rectified(
    feature: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    radius: float,
    threshold: float,
    steps: int,
    size: float,
    eps: float,
    smooth: bool = False,
    gate: bool | None = None,
) -> Rectified:
    """Return images after the gate and, where it is open, after `steps` sign steps; the best point of the way counts.

    Args:
        feature: images to unit features [B, D].
        smooth: gradients pass the steps; otherwise each is a constant (BPDA).
        gate: hold it open (True) or shut (False) for all images; None: as the threshold says.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> unit = lambda v: torch.nn.functional.normalize(v.flatten(1), dim=1)
        >>> found = rectified(unit, x, radius=1e6, threshold=0.85, steps=3, size=0.01, eps=0.02)
        >>> torch.equal(found.image, x), found.similarity.round(decimals=4)
        (True, tensor([1., 1.]))
    """
    own, low = feature(x), feature(low_pass(x, radius))
    similarity = (own * low).sum(1)
    open_ = similarity.detach() < threshold if gate is None else torch.full_like(similarity, gate, dtype=torch.bool)
    rows = open_.nonzero().flatten()
    if not len(rows) or not steps or eps == 0:
        return Rectified(x, similarity)
    moved = _best_of_way(feature, x[rows], low[rows] - own[rows], steps=steps, size=size, eps=eps, smooth=smooth)
    return Rectified(x.index_copy(0, rows, moved), similarity)


def _best_of_way(
    feature: Callable[[Tensor], Tensor], x: Tensor, along: Tensor, *, steps: int, size: float, eps: float, smooth: bool
) -> Tensor:
    """Return, of the image and the points after each step up f(y)·along, the one where that is largest."""
    base, target = (x, along) if smooth else (x.detach(), along.detach())

    def step(y: Tensor, x: Tensor, along: Tensor, *, smooth: bool = False) -> Tensor:
        _, grad = score_gradient(lambda v: (feature(v) * along).sum(1), y, graph=smooth)
        return within(y + size * (smooth_sign(grad) if smooth else grad.sign()), x, eps)

    way = [base]
    for _ in range(steps):
        inputs = (way[-1], base, target)
        way.append(recomputed(step, partial(step, smooth=True), *inputs) if smooth else step(*inputs))
    with torch.no_grad():
        scores = torch.stack([(feature(y) * target).sum(1) for y in way])
    best = scores.argmax(0)
    found = way[0]
    for place, y in enumerate(way[1:], start=1):
        found = torch.where(per_image(best == place, y), y, found)
    return found if smooth else straight(x, found)
