"""Anti-adversary: sign steps that make the model surer of whatever it says, before it is asked again.

Alfarra, Pérez, Thabet, Bibi, Torr and Ghanem, *Combating Adversaries with Anti-Adversaries*, AAAI 2022
(arXiv 2103.14347).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.honesty import exactly
from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.inner import in_full, recomputed, score_gradient, smooth_sign


def surer_step(
    logits: Callable[[Tensor], Tensor], y: Tensor, answer: Tensor, *, size: float, smooth: bool = False
) -> Tensor:
    """Return `y` after a sign step of `size` down the cross-entropy of `answer` [B]; nothing is clipped."""
    _, grad = score_gradient(lambda v: F.cross_entropy(logits(v), answer, reduction="none"), y, graph=smooth)
    return y - size * (smooth_sign(grad) if smooth else grad.sign())


@in_full
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
    return y if smooth else exactly(y, x)


@zoo.DEFENCES.named("antiadv")
@dataclass(frozen=True)
class AntiAdversary(zoo.AnswerDefence):
    """The classifier's answer to the image after sign steps towards the classifier's first answer.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> load_classifier("tiny+antiadv:1:0.1", ["apple", "dog"], ["{}"], cache=False)(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 2])
    """

    about = zoo.About(
        title="anti-adversary layer",
        reference="Alfarra, Pérez, Thabet, Bibi, Torr, Ghanem, AAAI 2022, arXiv 2103.14347",
        summary="K sign steps of A towards the model's own answer, before it is asked again (0: off)",
        fidelity=zoo.CODE,
        differs=("Steps are in pixels of [0, 1]; the release takes them in normalised pixels where it normalises.",),
        licence_note="MIT",
    )
    off = "size=0"
    modes = (zoo.IDENTITY, zoo.SMOOTH)

    steps: Annotated[int, zoo.Strength("steps", 0, 100, origin="C")] = 2
    size: Annotated[float, zoo.Strength("size of a step, in pixels of [0, 1]; 0 is off", 0, 1, origin="C")] = 0.15

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        del gate_open
        return zoo.Passes(2 + self.steps, self.steps) if self.steps and self.size else zoo.Passes(1)

    def answer(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        smooth = mode == zoo.SMOOTH
        return below.logits(strengthened(below.logits, pixels, steps=self.steps, size=self.size, smooth=smooth))
