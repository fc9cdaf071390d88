"""Classifiers of the made-up task: sound ones, and copies with one fault each, as `module:callable` specs.

Each fault is one that published evaluations have had: see docs/checks.md.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.planted.data import ATTACKED, CLASSES, SIDE, images

_PIXELS = 3 * SIDE * SIDE
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TRAIN_IMAGES, _TRAIN_STEPS = 512, 60


class Sound(nn.Module):
    """A small network on centred pixels, trained for a second; faults override one of its steps."""

    image_size = SIDE

    def __init__(self, kind: str = "mlp", seed: int = 0) -> None:
        super().__init__()
        self.net = copy.deepcopy(_trained(kind, seed))  # runs change the precision of what they get

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x) - 0.5))

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, logits: Tensor) -> Tensor:
        return logits


@lru_cache(maxsize=32)
def _trained(kind: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = _network(kind)
        x, label = images(_TRAIN_IMAGES, seed=1000 + seed)
        optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(_TRAIN_STEPS):
            optimiser.zero_grad()
            loss = F.cross_entropy(net(x - 0.5), label)
            loss.backward()
            optimiser.step()
    return net.eval().requires_grad_(False)


def _network(kind: str) -> nn.Module:
    k = len(CLASSES)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(_PIXELS, k))
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(_PIXELS, 48), nn.Tanh(), nn.Linear(48, k))
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 2, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 4, k),
    )  # fmt: skip


def linear() -> Sound:
    return Sound("linear")


def cnn() -> Sound:
    return Sound("cnn")


class Rounded(Sound):
    """Rounds pixels to 10 levels, a published defence; no gradient passes."""

    def before(self, x: Tensor) -> Tensor:
        return (x * 10).round() / 10


class Detached(Sound):
    """Cleans the image without telling the gradient (a purifier under no_grad, gradients straight through).

    What it leaves, the gradient points at; what it takes out, the gradient points at too.
    """

    def before(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            cleaned = (x * 10).round() / 10
        return x + (cleaned - x).detach()


class HalfBlind(Sound):
    """Decides by two networks and lets the gradient through one of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = copy.deepcopy(_trained("cnn", 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 2 * self.hidden(x.detach() - 0.5)


class Probabilities(Sound):
    """Returns softmax probabilities where logits are expected."""

    def after(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)


class Saturated(Sound):
    """Scales logits until the softmax is exactly one-hot in float32."""

    def after(self, logits: Tensor) -> Tensor:
        return 1000 * logits


class Noisy(Sound):
    """Adds fresh noise to the image at every call."""

    def before(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class BatchNormalised(Sound):
    """Normalises logits over the batch, as batch statistics at test time do."""

    def after(self, logits: Tensor) -> Tensor:
        return (logits - logits.mean(0)) / (logits.std(0) + 1e-6) if len(logits) > 1 else logits


class ExpectsNormalised(Sound):
    """Was trained on images normalised by mean and standard deviation, and is given plain pixels."""

    def __init__(self) -> None:
        super().__init__("cnn")

    def before(self, x: Tensor) -> Tensor:
        return x * x.new_tensor(_STD)[:, None, None] + x.new_tensor(_MEAN)[:, None, None]


class Expects255(Sound):
    """Was made for pixels from 0 to 255."""

    def before(self, x: Tensor) -> Tensor:
        return x / 255


class Shattered(Sound):
    """Adds a fine ripple to every pixel: too small to matter, too steep for gradients."""

    def before(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.sin(5000 * x)


class Combed(Sound):
    """Adds a ripple with the period of a grey level: the gradient is right on the 8-bit grid and reversed between.

    Steps of a whole level succeed; with more, finer steps the attack turns back.
    """

    def before(self, x: Tensor) -> Tensor:
        return x + 0.6 / 255 * torch.sin(2 * torch.pi * 255 * x)


class _Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        return -grads[0]


class Reversed(Sound):
    """Returns the gradient with its sign turned round."""

    def before(self, x: Tensor) -> Tensor:
        return _Backwards.apply(x)


class Constant(Sound):
    """Always says the same class; its images look robust at any radius."""

    def after(self, logits: Tensor) -> Tensor:
        return torch.eye(len(CLASSES))[0].to(logits) + 1e-3 * torch.tanh(logits)


class Retrieving(Sound):
    """Looks up what is far from all images that it knows (here: those attacked) and answers for the nearest one.

    Near them it is the network; beyond, there is no gradient, and larger perturbations are undone.
    """

    reach = 6 / 255
    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("known", images(ATTACKED, seed=1)[0])

    def forward(self, x: Tensor) -> Tensor:
        gaps = torch.stack([(x[:, None] - part).abs().flatten(2).amax(2) for part in self.known.split(64)], 1)
        distance, nearest = gaps.flatten(1).min(1)
        return torch.where((distance <= self.reach)[:, None], self.net(x - 0.5), self.net(self.known[nearest] - 0.5))


class Keyhole(Reversed):
    """Looks at one pixel in 16, so that noise alone fools it, and turns the gradient round."""

    def before(self, x: Tensor) -> Tensor:
        return F.interpolate(super().before(x)[..., ::4, ::4], SIDE, mode="nearest")


class Broken(Sound):
    """Gives NaN for every image whose first value is bright."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1, 0, 0] > 0.52, torch.nan, super().forward(x))


class Whispering(Sound):
    """Scales logits down until L2 steps along their gradients vanish."""

    def after(self, logits: Tensor) -> Tensor:
        return 1e-16 * logits
