"""CSR: where a blurred copy has another feature, the image moves towards the copy's and away from its own.

Nie, Zhang, Wang, Shan and Chen, *Contrastive Spectral Rectification*, ICML 2026 (arXiv 2601.19210).
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
from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.gradients import Steering
from robustvlm.defenses.zoo.inner import gate_hinge, in_full, recomputed, sign_step


def low_pass(pixels: Tensor, radius: float) -> Tensor:
    """Return images [B, 3, H, W] with frequency k (in waves per side) damped by exp(-|k|^2 / 2 radius^2), in [0, 1].

    Where the sides differ, a frequency is counted in waves per side of a square of as many pixels.

    Example:
        >>> x = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(low_pass(x, 1e6), x, atol=1e-6), low_pass(x, 1e-3).flatten(2).std(2).amax().item() < 1e-6
        (True, True)
    """
    (height, width), side = pixels.shape[-2:], zoo.side_of(pixels)
    down = torch.fft.fftfreq(height, 1 / side, device=pixels.device, dtype=pixels.dtype)
    across = torch.fft.rfftfreq(width, 1 / side, device=pixels.device, dtype=pixels.dtype)
    damped = torch.exp(-(down[:, None].square() + across.square()) / (2 * radius**2))
    return torch.fft.irfft2(torch.fft.rfft2(pixels) * damped, s=(height, width)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Rectified:
    """What became of images [B, 3, H, H].

    Attributes:
        image: what is answered; similarity: cosine with the blurred copy, [B]: the image moved where it is below the
            threshold.
    """

    image: Tensor
    similarity: Tensor


@in_full
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
    lean: bool = False,
) -> Rectified:
    """Return images after the gate and, where it is open, after `steps` sign steps; the best point of the way counts.

    Args:
        feature: images to unit features [B, D]; radius: of the blur, see `low_pass`.
        size, eps: a step and the most change of a value, in pixels of [0, 1].
        smooth: gradients pass the steps, with a smooth sign; otherwise each is a constant (BPDA).
        lean: leave the similarity differentiable.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> unit = lambda v: torch.nn.functional.normalize(v.flatten(1), dim=1)
        >>> found = rectified(unit, x, radius=1e6, threshold=0.85, steps=3, size=0.01, eps=0.02)
        >>> torch.equal(found.image, x), found.similarity.round(decimals=4)
        (True, tensor([1., 1.]))
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and (smooth or lean)):
        own, low = feature(x), feature(low_pass(x, radius))
        similarity = (own * low).sum(1)
    rows = (similarity.detach() < threshold).nonzero().flatten()
    if not len(rows) or not steps or eps == 0:
        return Rectified(x, similarity)
    moved = best_of_way(feature, x[rows], low[rows] - own[rows], steps=steps, size=size, eps=eps, smooth=smooth)
    return Rectified(x.index_copy(0, rows, moved), similarity)


def best_of_way(
    feature: Callable[[Tensor], Tensor], x: Tensor, along: Tensor, *, steps: int, size: float, eps: float, smooth: bool
) -> Tensor:
    """Return, of images and their points after each sign step up f(y)·along, the one where that is largest.

    Args:
        along: [B, D]; the others as for `rectified`.

    Example:
        >>> x = torch.full((1, 3, 1, 1), 0.5)
        >>> best_of_way(lambda v: v.flatten(1), x, torch.eye(1, 3), steps=2, size=0.1, eps=1.0, smooth=False).flatten()
        tensor([0.7000, 0.5000, 0.5000])
    """
    base, target = (x, along) if smooth else (x.detach(), along.detach())
    scores: list[Tensor] = []

    def step(y: Tensor, x: Tensor, along: Tensor, *, smooth: bool = False) -> Tensor:
        score, moved = sign_step(lambda v: (feature(v) * along).sum(1), y, x, size=size, reach=eps, smooth=smooth)
        scores.append(score)
        return moved

    way = [base]
    for _ in range(steps):
        inputs = (way[-1], base, target)
        way.append(recomputed(step, partial(step, smooth=True), *inputs) if smooth else step(*inputs))
    with torch.no_grad():
        scores.append((feature(way[-1]) * target).sum(1))
    best = torch.stack(scores).argmax(0)
    found = base
    for place, y in enumerate(way[1:], start=1):
        found = torch.where(per_image(best == place, y), y, found)
    return found if smooth else exactly(found, x)


@zoo.DEFENCES.named("csr")
@dataclass(frozen=True)
class SpectralRectification(zoo.PixelDefence):
    """The image, moved towards the feature of its blurred copy where that differs from its own.

    Example:
        >>> from robustvlm.defenses import load_pipeline
        >>> load_pipeline("tiny+csr").encode_image(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 192])
    """

    about = zoo.About(
        title="CSR, contrastive spectral rectification",
        reference="Nie, Zhang, Wang, Shan, Chen, ICML 2026, arXiv 2601.19210",
        summary="steps towards the feature of a blurred copy, where that differs (eps 0: off)",
        fidelity=zoo.CODE,
        claims=(zoo.Claim("CLIP", "ImageNet", "PGD-10 on the undefended model", 1, 58.9, clean=62.5),),
        differs=("The blur's radius is scaled with the image's side: 40 is for 224 pixels.",),
        licence_note="MIT, by its README",
        commit="a5009cc",
    )
    off = "eps=0"
    modes = (zoo.IDENTITY, zoo.SMOOTH, zoo.GATE_ON, zoo.GATE_OFF)
    gates = ("cosine of the image's feature with its blurred copy's, against the threshold",)
    needs_encoder = True

    radius: Annotated[float, zoo.Strength("of the blur, in waves per 224 pixels", 1e-3, 1e9, origin="C")] = 40.0
    threshold: Annotated[float, zoo.Strength("cosine below which the image moves", -1.1, 1.1, origin="C")] = 0.85
    steps: Annotated[int, zoo.Strength("steps", 0, 100, origin="C")] = 3
    size: Annotated[float, zoo.Strength("size of a step, in 255ths", 0, 255, origin="C")] = 2.0
    eps: Annotated[float, zoo.Strength("most change of a value, in 255ths; 0 is off", 0, 255, origin="C")] = 4.0

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        if not self.eps or not self.steps:
            return zoo.Passes(1)
        return zoo.Passes(4 + self.steps, self.steps) if gate_open else zoo.Passes(3)

    def move(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        return self.seen(pixels, below, mode)[0]

    def seen(self, pixels: Tensor, below: zoo.Below, mode: str) -> tuple[Tensor, Tensor]:
        if not self.eps or not self.steps:
            return pixels, pixels
        gated = mode in (zoo.GATE_ON, zoo.GATE_OFF)
        steering = Steering(pixels)
        x = steering.pixels
        found = rectified(
            below.encode,
            x,
            radius=self.radius * zoo.side_of(pixels) / 224,
            threshold=self.threshold,
            steps=self.steps,
            size=self.size / 255,
            eps=self.eps / 255,
            smooth=mode == zoo.SMOOTH,
            lean=gated,
        )
        if gated:
            steering.lower(gate_hinge(found.similarity, self.threshold, mode))
        return found.image, x if mode == zoo.GATE_OFF else found.image
