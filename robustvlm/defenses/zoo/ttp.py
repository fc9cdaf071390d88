"""TTP: a black frame tells attacked images by how their feature moves; those are answered behind a tuned frame.

Li, Pang, Wang, Sun and Li, *Test-time Padding*, CVPR 2026 (arXiv 2512.16523).
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
from robustvlm.attacks.threat import per_image
from robustvlm.core.size import Size, sides
from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.gradients import Steering
from robustvlm.defenses.zoo.inner import gate_hinge, recomputed, score_gradient
from robustvlm.defenses.zoo.views import CROP_DRAWS, crops, drawn, entropies, features_of
from robustvlm.models import resize

WHITE = 10.0
"""The frame's value, in its own units, that is a pixel of 1."""


def framed(pixels: Tensor, frame: Tensor | None, width: Size) -> Tensor:
    """Return images [B, 3, H, W] within a frame, brought back to their size.

    Args:
        frame: [B, 3, H + 2 width, W + 2 width], of which the border is taken, white at `WHITE`; None: black.
        width: of the frame in pixels, or (above and below, left and right).

    Example:
        >>> framed(torch.ones(1, 3, 8, 8), None, 2).mean().item() < 0.5
        True
    """
    down, across = sides(width)
    if down == across == 0:
        return pixels
    border = (across, across, down, down)
    inside = F.pad(pixels, border)
    if frame is not None:
        inside = inside + F.pad(torch.zeros_like(pixels[:1, :1]), border, value=1.0) * (frame / WHITE)
    return resize(inside, (pixels.shape[-2], pixels.shape[-1]))


def tuned_frame(
    logits: Callable[[Tensor], Tensor], views: Tensor, frame: Tensor, *, width: Size, rate: float, graph: bool = False
) -> Tensor:
    """Return frames [B, 3, H', W'] after one gradient step of `rate` down the mean entropy of the framed views.

    Args:
        logits: images [R, 3, H, W] to [R, K]; views: [B, V, 3, H, W].
        graph: leave the result differentiable in views and frame.
    """
    if rate == 0 or not any(sides(width)):
        return frame
    count = views.shape[1]

    def uncertainty(border: Tensor) -> Tensor:
        rows = framed(views.flatten(0, 1), border.repeat_interleave(count, dim=0), width)
        return entropies(logits(rows)).view(-1, count).mean(1)

    return (frame - rate * score_gradient(uncertainty, frame, graph=graph)[1]).clamp(0.0, WHITE)


def trusted(features: Tensor, own: Tensor, padded: Tensor) -> Tensor:
    """Return the weights [B, V] of views' unit features [B, V, D]: softmax of cos to `padded` less cos to `own` [B, D].

    Example:
        >>> trusted(torch.eye(2)[None], torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([[0.1192, 0.8808]])
    """
    return torch.einsum("bvd,bd->bv", features, padded - own).softmax(1)


@zoo.DEFENCES.named("ttp")
@dataclass(frozen=True)
class TunedPadding(zoo.AnswerDefence):
    """The plain answer where a black frame hardly moves the feature, else that of views behind a tuned frame.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> load_classifier("tiny+ttp:views=4", ["apple", "dog"], ["{}"], cache=False)(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 2])
    """

    about = zoo.About(
        title="TTP, test-time padding",
        reference="Li, Pang, Wang, Sun, Li, CVPR 2026, arXiv 2512.16523",
        summary="views behind a tuned frame, where a black frame moves the feature (border 0: off)",
        fidelity=zoo.TEXT,
        claims=tuple(
            zoo.Claim(f"CLIP ViT-{size}", "eight sets, mean", "PGD-100 on the undefended model", 4, robust, clean=clean)
            for size, robust, clean in (("B/32", 39.7, 57.1), ("B/16", 42.9, 61.2), ("L/14", 51.6, 68.9))
        ),
        differs=(
            "Assumed: the image within its frame is brought back to its own size, so that all pixels are kept.",
            "Assumed: views are crops and mirrors as in R-TPT, and the six of lowest entropy are used.",
            "The frame's width is scaled with the image's side: 32 is for 224 pixels.",
            "Assumed: the frame's pixels stay between 0 and 10 as they are tuned.",
        ),
        licence_note="its code could not be had",
    )
    off = "border=0"
    modes = (zoo.IDENTITY, zoo.THROUGH, zoo.GATE_ON, zoo.GATE_OFF)
    random = True
    gates = ("cosine of the image's feature with that of the image in a black frame, against tau",)
    needs_encoder = True

    border: Annotated[float, zoo.Strength("width of the frame at 224 pixels; 0 is off", 0, 224, origin="T")] = 32.0
    tau: Annotated[float, zoo.Strength("cosine above which the plain answer stands", -1.1, 1.1, origin="T")] = 0.8
    views: Annotated[int, zoo.Strength("views, the image among them; the surest are used", 1, 4096, origin="T")] = 64
    kept: Annotated[int, zoo.Strength("views that are used", 1, 4096, origin="A")] = 6
    rate: Annotated[float, zoo.Strength("of the step on the frame", 0, 1e6, origin="T")] = 5.0

    @property
    def gradient_draws(self) -> int:
        return zoo.draws_of_views(min(self.kept, self.views))

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        if not self.border:
            return zoo.Passes(1)
        kept = min(self.kept, self.views)
        tuned = kept if self.rate else 0
        return zoo.Passes(1 + self.views + tuned + kept, tuned) if gate_open else zoo.Passes(2)

    def answer(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        # In proportion to each side, so that a picture that is not square keeps its ratio.
        width = (round(self.border * pixels.shape[-2] / 224), round(self.border * pixels.shape[-1] / 224))
        if not any(width):
            return below.logits(pixels)
        draws, gated = zoo.generators(pixels), mode in (zoo.GATE_ON, zoo.GATE_OFF)
        steering = Steering(pixels)
        pixels = steering.pixels
        own, padded = below.encode(pixels), below.encode(framed(pixels, None, width))
        similarity = (own * padded).sum(1)
        plain = below.scores(own)
        rows = (similarity.detach() <= self.tau).nonzero().flatten()
        found = plain
        if len(rows):
            drawn = [draws[row] for row in rows.tolist()]
            open_ = self._open(pixels[rows], own[rows], padded[rows], below, drawn, width, mode == zoo.THROUGH)
            found = plain.index_copy(0, rows, open_)
        if mode == zoo.GATE_OFF:  # the plain answer's gradient, whichever was given
            found = exactly(found, plain)
        if gated:
            steering.lower(gate_hinge(similarity, self.tau, mode))
        return found

    def _open(
        self,
        x: Tensor,
        own: Tensor,
        padded: Tensor,
        below: zoo.Below,
        draws: list[torch.Generator],
        width: tuple[int, int],
        through: bool,
    ) -> Tensor:
        """Return logits [B, K] of images behind their tuned frames: logarithms of the weighted mean probability."""
        numbers = torch.stack([torch.rand(self.views - 1, CROP_DRAWS, generator=one) for one in draws])
        shape = (3, *(side + 2 * border for side, border in zip(x.shape[-2:], width, strict=True)))
        frame = torch.stack([WHITE * torch.rand(shape, generator=one) for one in draws]).to(x)
        with torch.no_grad():
            features = own[:, None]
            if self.views > 1:
                features = torch.cat([features, features_of(below.encode, drawn(crops, numbers), x)], dim=1)
            sure = entropies(self._logits(below, features))
        kept = sure.topk(min(self.kept, self.views), dim=1, largest=False).indices
        views = torch.stack([self._view(x, numbers, place) for place in kept.unbind(1)], dim=1)
        count = views.shape[1]
        tune = partial(tuned_frame, below.logits, width=width, rate=self.rate)
        if through:
            frame = recomputed(tune, partial(tune, graph=True), views, frame)
        else:
            frame = tune(views.detach(), frame)
        rows = framed(views.flatten(0, 1), frame.repeat_interleave(count, dim=0), width)
        features = below.encode(rows).view(len(x), count, -1)
        shares = trusted(features, own, padded)[:, :, None] * self._logits(below, features).softmax(2)
        return shares.sum(1).clamp_min(1e-30).log()

    @staticmethod
    def _view(x: Tensor, numbers: Tensor, place: Tensor) -> Tensor:
        """Return the view of each image at `place` [B], the image itself being the first."""
        if not numbers.shape[1]:
            return x
        row = torch.arange(len(numbers))
        return torch.where(per_image(place == 0, x), x, crops(x, numbers[row, (place.cpu() - 1).clamp_min(0)]))

    @staticmethod
    def _logits(below: zoo.Below, features: Tensor) -> Tensor:
        return below.scores(features.flatten(0, 1)).unflatten(0, features.shape[:2])
