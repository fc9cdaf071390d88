"""Encoders that are quick enough to attack hundreds of times, each with one peculiarity, named as a user would."""

from __future__ import annotations

import os
import signal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, WIDTH = 16, 12


class Encoder(nn.Module):
    """A random two-layer convolutional encoder on 16-pixel images; texts become seeded random features."""

    image_size = SIDE
    logit_scale = 20.0

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(7)
        self.first = nn.Parameter(torch.randn(8, 3, 4, 4, generator=draws) * 0.3)
        self.second = nn.Parameter(torch.randn(WIDTH, 8 * 16, generator=draws) * 0.2)

    def encode_image(self, pixels: Tensor) -> Tensor:
        hidden = torch.tanh(F.conv2d(pixels - 0.5, self.first, stride=4))
        return hidden.flatten(1) @ self.second.T

    def encode_text(self, texts: list[str]) -> Tensor:
        rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return torch.stack(rows).to(self.second)


class Coupled(Encoder):
    """Subtracts the batch mean, as batch normalisation in training mode would."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        features = super().encode_image(pixels)
        return features - features.mean(0) if len(features) > 1 else features


class Random(Encoder):
    """Adds fresh noise to every answer."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        features = super().encode_image(pixels)
        return features + 0.3 * torch.randn_like(features)


class Coin(Encoder):
    """Gives the opposite of its answer in 30 % of its draws."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        features = super().encode_image(pixels)
        return torch.where(torch.rand(len(features), 1) < 0.3, -features, features)


class Gated(Encoder):
    """Adds noise to its answer to images of little contrast alone, which it declares."""

    random_draws = 4

    def encode_image(self, pixels: Tensor) -> Tensor:
        features = super().encode_image(pixels)
        plain = pixels.flatten(1).std(1, keepdim=True) < 0.27
        return torch.where(plain, features + 0.3 * torch.randn_like(features), features)


class NaNOnMarked(Encoder):
    """Gives NaN for images whose first pixel is pure red."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        marked = (pixels[:, 0, 0, 0] > 0.9) & (pixels[:, 1, 0, 0] < 0.1) & (pixels[:, 2, 0, 0] < 0.1)
        return torch.where(marked[:, None], torch.nan, super().encode_image(pixels))


class NaNOffGrid(Encoder):
    """Gives NaN for every image that is not 8-bit, which perturbed images are not."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        levels = pixels * 255
        off = (levels - levels.round()).abs().flatten(1).amax(1) > 1e-3
        # The loader tries an encoder on a ramp; only images with texture are broken.
        textured = pixels.flatten(1).diff(dim=1).abs().mean(1) > 0.05
        return torch.where((off & textured)[:, None], torch.nan, super().encode_image(pixels))


class SmallMemory(Encoder):
    """Runs out of memory for more than four images."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        if len(pixels) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return super().encode_image(pixels)


class Detached(Encoder):
    """Cuts the gradient."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return super().encode_image(pixels.detach())


class Failing(Encoder):
    """Cannot take the batches of a run, only the two images of the loader's trial."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        if len(pixels) != 2:
            raise ValueError("expected two images\nof some kind")
        return super().encode_image(pixels)


class FailsOnRank1(Encoder):
    """Loses its disk after some batches, but only in the second of several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 40 and os.environ.get("RANK") == "1":
            self.fail()
        return super().encode_image(pixels)

    def fail(self) -> None:
        raise OSError(5, "the disk of rank 1 is gone")


class KillsRank1(FailsOnRank1):
    """Dies without a word after some batches, but only in the second of several processes."""

    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Blocks(Encoder):
    """Sums rows that are left over from blocks of six in another order, as matrix kernels do: other last digits."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        features = super().encode_image(pixels)
        whole = torch.arange(len(features))[:, None] < len(features) // 6 * 6
        return torch.where(whole, features, features * (1 + 1e-6))
