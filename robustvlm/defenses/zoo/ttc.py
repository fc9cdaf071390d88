"""TTC: noise, then steps that drive the feature away from where it is; kept where the noise alone hardly moved it.

Xing, Zhao and Sebe, *CLIP is Strong Enough to Fight Back*, CVPR 2025 (arXiv 2503.03613).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from robustvlm.attacks.honesty import exactly
from robustvlm.attacks.threat import per_image
from robustvlm.core.seeds import row_sums
from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.gradients import Steering
from robustvlm.defenses.zoo.inner import gate_hinge, in_full, length_of, lengths, recomputed, sign_step


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
    found: list[float] = torch.softmax(beta * torch.arange(steps + 1, dtype=torch.float64), 0).tolist()
    return found


@in_full
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
    lean: bool = False,
) -> Countered:
    """Return images [B, 3, H, H] after `steps` sign steps of `size` up |g(y) - g(x)|^2 from a noisy start.

    Args:
        feature: images to raw features [B, D]; noise: uniform in [-1, 1], of the images' shape: d_0 is `eps` times
            this, clipped so that x + d_0 is an image. Steps stay within x +- `eps`.
        smooth: gradients pass the steps, with a smooth sign; otherwise each is a constant (BPDA).
        lean: leave the ratio differentiable, which takes a pass more.

    Example:
        >>> x = torch.full((1, 3, 2, 2), 0.5)
        >>> found = countered(lambda v: v.flatten(1), x, torch.ones_like(x), eps=0.03, size=0.01, steps=1, beta=0.0)
        >>> torch.allclose(found.moved, x + 0.03), round(found.ratio.item(), 4)
        (True, 0.06)
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and (smooth or lean)):
        anchor = feature(x)
        noisy = (x + eps * noise).clamp(0.0, 1.0)
        distance = lengths(feature(noisy) - anchor) if lean or not steps else None
    base, held = (x, anchor) if smooth else (x.detach(), anchor.detach())
    squares: list[Tensor] = []

    def step(y: Tensor, x: Tensor, anchor: Tensor, *, smooth: bool = False) -> Tensor:
        square, moved = sign_step(
            lambda v: row_sums((feature(v) - anchor).square()), y, x, size=size, reach=eps, smooth=smooth
        )
        squares.append(square)
        return moved

    y = noisy if smooth else noisy.detach()
    weights = step_weights(steps, beta)
    mixed = weights[0] * y
    for weight in weights[1:]:
        inputs = (y, base, held)
        y = recomputed(step, partial(step, smooth=True), *inputs) if smooth else step(*inputs)
        mixed = mixed + weight * y
    mixed = mixed.clamp(0.0, 1.0)
    # The first step's score is the gate's distance, squared, to the bit.
    ratio = (length_of(squares[0]) if distance is None else distance) / lengths(anchor)
    if smooth:
        return Countered(noisy, mixed, ratio)
    return Countered(exactly(noisy, x), exactly(mixed, x), ratio if lean else ratio.detach())


@zoo.DEFENCES.named("ttc")
@dataclass(frozen=True)
class Counterattack(zoo.PixelDefence):
    """The image with noise on it, and with the counterattack where noise moves its feature less than tau.

    Example:
        >>> from robustvlm.defenses import load_pipeline
        >>> load_pipeline("tiny+ttc").encode_image(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 192])
    """

    about = zoo.About(
        title="TTC, test-time counterattack",
        reference="Xing, Zhao, Sebe, CVPR 2025, arXiv 2503.03613",
        summary="noise, and steps that drive the feature away where noise hardly does (eps 0: off)",
        fidelity=zoo.CODE,
        claims=(
            zoo.Claim("CLIP ViT-B/32", "eight sets, by TTP's authors", "PGD-100 on the undefended model", 4, 6.8),
            zoo.Claim("CLIP ViT-B/32", "ten sets, by DBD's authors", "PGD-100 on the undefended model", 4, 27.2),
        ),
        differs=(
            "On an adversarially trained base the release asks the original CLIP for the gate; this asks the base.",
            "The paper reports gains at 1/255 over 16 sets; the figures shown are others' at 4/255.",
        ),
        licence_note="no licence file",
        commit="793fbff",
    )
    off = "eps=0"
    modes = (zoo.IDENTITY, zoo.SMOOTH, zoo.GATE_ON, zoo.GATE_OFF)
    random = True
    eot = 20
    gates = ("how far noise moves the feature, relative to its length, against tau",)
    needs_encoder = True

    eps: Annotated[float, zoo.Strength("most change of a value, in 255ths; 0 is off", 0, 255, origin="C")] = 4.0
    size: Annotated[float, zoo.Strength("size of a step, in 255ths", 0, 255, origin="C")] = 1.0
    steps: Annotated[int, zoo.Strength("steps", 0, 100, origin="C")] = 2
    tau: Annotated[float, zoo.Strength("ratio below which the steps are kept", 0, 1e6, origin="C")] = 0.2
    beta: Annotated[float, zoo.Strength("how much more later steps count", 0, 100, origin="C")] = 2.0

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        del gate_open  # the steps are taken before it is known
        return zoo.Passes(2 + max(self.steps, 1), self.steps) if self.eps else zoo.Passes(1)

    def move(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        return self.seen(pixels, below, mode)[0]

    def seen(self, pixels: Tensor, below: zoo.Below, mode: str) -> tuple[Tensor, Tensor]:
        if self.eps == 0:
            return pixels, pixels
        gated = mode in (zoo.GATE_ON, zoo.GATE_OFF)
        steering = Steering(pixels)
        shape = pixels.shape[1:]
        noise = torch.stack([2 * torch.rand(shape, generator=draws) - 1 for draws in zoo.generators(pixels)])
        found = countered(
            below.embed,
            steering.pixels,
            noise.to(pixels),
            eps=self.eps / 255,
            size=self.size / 255,
            steps=self.steps,
            beta=self.beta,
            smooth=mode == zoo.SMOOTH,
            lean=gated,
        )
        if gated:
            steering.lower(gate_hinge(found.ratio, self.tau, mode))
        image = found.image(self.tau)
        return image, found.noisy if mode == zoo.GATE_OFF else image
