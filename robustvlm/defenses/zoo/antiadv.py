"""Anti-adversary: sign steps that make the model surer of whatever it says, before it is asked again.

Alfarra, Pérez, Thabet, Bibi, Torr and Ghanem, *Combating Adversaries with Anti-Adversaries*, AAAI 2022
(arXiv 2103.14347).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.zoo.inner import recomputed, score_gradient, smooth_sign, straight


def surer_step(
    logits: Callable[[Tensor], Tensor], y: Tensor, answer: Tensor, *, size: float, smooth: bool = False
) -> Tensor:
    """Return `y` after a sign step of `size` down the cross-entropy of `answer` [B]; nothing is clipped."""
    _, grad = score_gradient(lambda v: F.cross_entropy(logits(v), answer, reduction="none"), y, graph=smooth)
    return y - size * (smooth_sign(grad) if smooth else grad.sign())


def strengthened(
    logits: Callable[[Tensor], Tensor], x: Tensor, *, steps: int, size: float, smooth: bool = False
) -> Tensor:
    """Return images after `steps` steps towards the model's own answer; they may leave [0, 1], as published.

    Args:
        smooth: gradients pass the steps, the answer being a constant; otherwise each step is one (BPDA).

    Example:
        >>> x = torch.full((1, 3, 1, 1), 0.5)
        >>> score = lambda v: torch.stack([v[:, 0, 0, 0], v[:, 1, 0, 0] - 0.1], 1)
        >>> strengthened(score, x, steps=2, size=0.1).flatten()
        tensor([0.7000, 0.3000, 0.5000])
    """
    if steps == 0 or size == 0:
        return x
    with torch.no_grad():
        answer = logits(x).argmax(1)
    move = partial(surer_step, logits, size=size)
    y = x if smooth else x.detach()
    for _ in range(steps):
        y = recomputed(move, partial(move, smooth=True), y, answer) if smooth else move(y, answer)
    return y if smooth else straight(x, y)
