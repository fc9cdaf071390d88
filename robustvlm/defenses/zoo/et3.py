"""ET3: the image moves to lower energy, minus the log-sum-exp of its logits, before it is answered.

Mirza, D'Orazio, Melamed and Masi, CVPR 2026 (arXiv 2603.26984).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from torch import Tensor

from robustvlm.attacks.honesty import exactly
from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.inner import in_full, recomputed, score_gradient, unit_rows, within


def energy(logits: Tensor) -> Tensor:
    """Return -log sum exp of logits [B, K] -> [B].

    Example:
        >>> import torch
        >>> energy(torch.zeros(1, 4)).exp()
        tensor([0.2500])
    """
    return -logits.logsumexp(1)


def energy_step(
    logits: Callable[[Tensor], Tensor], y: Tensor, x: Tensor, *, step: float, reach: float, graph: bool = False
) -> Tensor:
    """Return `y` moved by an L2 length `step` down the energy, clipped to x +- `reach` and [0, 1].

    Args:
        logits: images [B, 3, H, H] to [B, K]; y: where the image is by now; x: where it began.
        graph: leave the result differentiable in `y` and `x`.
    """
    _, grad = score_gradient(lambda v: energy(logits(v)), y, graph=graph)
    return within(y - step * unit_rows(grad), x, reach)


@in_full
def descended(
    logits: Callable[[Tensor], Tensor], x: Tensor, *, steps: int, step: float, reach: float, through: bool = False
) -> Tensor:
    """Return images after `steps` steps of `energy_step`.

    Args:
        through: gradients pass the steps themselves; otherwise each is a constant (BPDA).

    Example:
        >>> import torch
        >>> x, flat = torch.full((1, 3, 1, 1), 0.5), lambda v: v.flatten(1)[:, :2]
        >>> (descended(flat, x, steps=1, step=0.1, reach=1.0) - x).flatten().round(decimals=4)
        tensor([0.0707, 0.0707, 0.0000])
    """
    if step == 0 or reach == 0:
        return x
    move = partial(energy_step, logits, step=step, reach=reach)
    y = x if through else x.detach()
    for _ in range(steps):
        y = recomputed(move, partial(move, graph=True), y, x) if through else move(y, x.detach())
    return y if through else exactly(y, x)


@zoo.DEFENCES.named("et3")
@dataclass(frozen=True)
class EnergyDescent(zoo.AnswerDefence):
    """The classifier's answer to the image moved down its own energy.

    Example:
        >>> import torch
        >>> from robustvlm.defenses import load_classifier
        >>> load_classifier("tiny+et3", ["apple", "dog"], ["{}"], cache=False)(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 2])
    """

    about = zoo.About(
        title="ET3",
        reference="Mirza, D'Orazio, Melamed, Masi, CVPR 2026, arXiv 2603.26984",
        summary="the image moved to lower energy, -logsumexp of the logits, before it is answered (step 0: off)",
        fidelity=zoo.CODE,
        claims=(
            zoo.Claim("TeCoA-4 ViT-L/14", "14 sets, mean", "AutoAttack on the undefended model", 4, 40.93),
            zoo.Claim("FARE-4 ViT-L/14", "14 sets, mean", "AutoAttack on the undefended model", 4, 40.60),
        ),
        differs=(
            "The energy is that of the run's own classes; the paper's default is a list of 21,000 names.",
            "The step is scaled with the image's side: 2.5 is for 224 pixels.",
            "The authors attack it through the loop as well, on a ResNet-50, and report that gains remain there.",
        ),
        licence_note="no licence of its own",
        commit="010cfd2",
    )
    off = "step=0"
    modes = (zoo.IDENTITY, zoo.THROUGH)

    steps: Annotated[int, zoo.Strength("steps down the energy", 0, 100, origin="C")] = 2
    step: Annotated[float, zoo.Strength("L2 length of a step at 224 pixels; 0 is off", 0, 1000, origin="C")] = 2.5
    reach: Annotated[float, zoo.Strength("most change of a value, in 255ths", 0, 255, origin="C")] = 5.0

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        del gate_open
        steps = self.steps if self.step and self.reach else 0
        return zoo.Passes(1 + steps, steps)

    def answer(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        step = self.step * zoo.side_of(pixels) / 224
        through = mode == zoo.THROUGH
        return below.logits(
            descended(below.logits, pixels, steps=self.steps, step=step, reach=self.reach / 255, through=through)
        )
