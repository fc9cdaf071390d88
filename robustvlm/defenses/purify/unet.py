"""The purifier: a small noise-conditioned U-Net that estimates the clean image, and how it is told the noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.core import MAX_SIGMA
from robustvlm.core.size import Size, sides
from robustvlm.errors import BadSetting, UserError, nearest

CENTRE, SPREAD = 0.5, 0.25
"""Mean and standard deviation of pixels in [0, 1] that the preconditioning assumes."""


@dataclass(frozen=True)
class PurifierShape:
    """Sizes of a purifier.

    Args:
        widths: channels of the levels, from fine to coarse; each level halves the resolution of the one before.
        blocks: residual blocks per level on the way down, and again on the way up.
        stride: squares of stride x stride pixels that are folded into channels first, so that cost falls by stride^2.
        embedding: length of the noise embedding.
    """

    widths: tuple[int, ...] = (32, 48, 64)
    blocks: int = 1
    stride: int = 1
    embedding: int = 64

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this many pixels."""
        return int(self.stride * 2 ** (len(self.widths) - 1))


SIZES = {
    "tiny": PurifierShape(),
    "small": PurifierShape(widths=(48, 96, 160), blocks=2),
    "base": PurifierShape(widths=(64, 128, 192, 256), blocks=2, embedding=128),
}
"""Presets: tiny for 32 to 64 pixels on a CPU, small and base for 224 pixels and more."""


def purifier_shape(size: str, image_size: Size) -> PurifierShape:
    """Return the preset `size` with the stride that keeps its finest level at 32 to 63 pixels a side (84 for 336).

    Where the sides differ the shorter one counts.

    Raises UserError for an unknown preset.

    Example:
        >>> [purifier_shape("tiny", side).stride for side in (32, 64, 224, 336)]
        [1, 2, 4, 4]
    """
    if size not in SIZES:
        raise UserError(f"unknown purifier size '{size}': {nearest(size, SIZES)}")
    # The largest power of two up to 4 that leaves 32 pixels or more.
    stride = 2 ** min(2, max(0, (min(sides(image_size)) // 32).bit_length() - 1))
    return replace(SIZES[size], stride=stride)


class Purifier(nn.Module):
    """Noisy pixels [B, 3, H, W] and their noise level to an estimate of the clean pixels, any H and W.

    P(x, s) = 1/2 + c_skip(s) (x - 1/2) + c_out(s) N(c_in(s) (x - 1/2), s), with a U-Net N whose last layer starts at
    zero and c_skip = d^2 / (s^2 + d^2), c_out = s d / sqrt(s^2 + d^2), c_in = 1 / sqrt(s^2 + d^2), d = SPREAD (Karras
    et al. 2022, arXiv 2206.00364, equation 7 and table 1). Before training it is the best estimate for independent
    Gaussian pixels; at s = 0 it is the identity exactly, whatever its weights. GroupNorm sees one image at a time, so
    the output is a function of one image.

    Example:
        >>> purifier, pixels = Purifier(PurifierShape(widths=(8, 16))), torch.rand(2, 3, 7, 10)
        >>> purifier(pixels, 0.25).shape, torch.equal(purifier(pixels, 0.0), pixels)
        (torch.Size([2, 3, 7, 10]), True)
    """

    def __init__(self, shape: PurifierShape = SIZES["tiny"]) -> None:
        super().__init__()
        self.shape = shape
        widths, folded = shape.widths, 3 * shape.stride**2
        self.embed = SigmaEmbedding(shape.embedding)
        self.stem = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.down = nn.ModuleList(_blocks(width, shape) for width in widths)
        self.fold = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_blocks(width, shape) for width in widths[:-1])
        self.unfold = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for a, b in pairwise(widths))
        self.head_norm = _norm(widths[0])
        self.head = zeroed(nn.Conv2d(widths[0], folded, 3, padding=1))

    def forward(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the estimate for noise levels [B], or one for all."""
        levels = as_levels(sigma, noisy)
        skip, out, into = (c.view(-1, 1, 1, 1) for c in coefficients(levels))
        centred = noisy - CENTRE
        # The network may compute in half precision; its output is added to pixels in theirs.
        guess = self.network(into * centred, levels).to(levels.dtype)
        estimate = CENTRE + skip * centred + out * guess
        return torch.where(levels.view(-1, 1, 1, 1) == 0, noisy.to(estimate.dtype), estimate)

    def network(self, scaled: Tensor, levels: Tensor) -> Tensor:
        """Return N of scaled pixels [B, 3, H, W] and noise levels [B]."""
        height, width = scaled.shape[-2:]
        multiple = self.shape.multiple
        scaled = F.pad(scaled, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        embedding = self.embed(levels)
        x = self.stem(F.pixel_unshuffle(scaled.to(dtype_of(self.stem)), self.shape.stride))
        kept: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            if level:
                kept.append(x)
                x = self.fold[level - 1](F.pixel_unshuffle(x, 2))
            x = _through(blocks, x, embedding)
        for level in reversed(range(len(self.up))):
            x = kept[level] + F.pixel_shuffle(self.unfold[level](x), 2)
            x = _through(self.up[level], x, embedding)
        x = F.pixel_shuffle(self.head(F.silu(self.head_norm(x))), self.shape.stride)
        return x[..., :height, :width]


def coefficients(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return c_skip, c_out and c_in of noise levels [B].

    Example:
        >>> [round(c.item(), 3) for c in coefficients(torch.tensor([0.25]))]
        [0.5, 0.177, 2.828]
    """
    total = (sigma**2 + SPREAD**2).sqrt()
    return SPREAD**2 / total**2, sigma * SPREAD / total, 1 / total


class Block(nn.Module):
    """A residual block of two convolutions, told the noise level between them; starts as the identity."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm, self.film = _norm(width), FiLM(embedding, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = zeroed(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return features [B, C, H, W] of the same shape."""
        hidden = self.film(self.first(F.silu(self.norm(x))), embedding)
        return x + self.second(F.silu(hidden))


def _blocks(width: int, shape: PurifierShape) -> nn.ModuleList:
    return nn.ModuleList(Block(width, shape.embedding) for _ in range(shape.blocks))


def _through(blocks: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        x = block(x, embedding)
    return x


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, width // 16), width)


# Which noise levels a purifier and a mapper are trained for


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels to be served: those given, and everything from half the smallest to the largest.

    Half of the draws are one of the levels given, which are what will be deployed; the others are log-uniform over the
    whole range, so that one module serves all of it.

    Args:
        given: noise levels in [0, 1] pixels.

    Raises:
        UserError: no level, or one that is not above 0 and at most 10.

    Example:
        >>> levels = NoiseLevels((0.25, 0.5))
        >>> levels.at(torch.tensor([[0.1, 0.0], [0.1, 0.9], [0.9, 0.0], [0.9, 0.5]])).tolist()
        [0.25, 0.5, 0.125, 0.25]
    """

    given: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.given:
            raise UserError("say which noise to train for: pass --sigma 0.25, more than once for several levels")
        for sigma in self.given:
            if not 0 < sigma <= MAX_SIGMA:
                raise BadSetting(
                    "sigma", f"must be above 0 and at most {MAX_SIGMA:g} in [0, 1] pixels", got=f"{sigma:g}"
                )

    @classmethod
    def of(cls, levels: Sequence[float]) -> NoiseLevels:
        """Return the levels in order, each once."""
        return cls(tuple(sorted(set(levels))))

    def at(self, uniform: Tensor) -> Tensor:
        """Return noise levels [B] for uniform draws [B, 2] in [0, 1): the first chooses how, the second which."""
        given = torch.tensor(self.given, dtype=uniform.dtype, device=uniform.device)
        exact = given[(uniform[:, 1] * len(given)).long().clamp_max(len(given) - 1)]
        low, high = 0.5 * min(self.given), max(self.given)
        between = low * torch.exp(uniform[:, 1] * math.log(high / low))
        return torch.where(uniform[:, 0] < 0.5, exact, between)


# How a network is told the noise level: an embedding of log sigma, and FiLM, which scales and shifts features

SMALLEST = 1e-3
"""Noise below this looks to a network like this much; at exactly 0 purifier and mapper are the identity anyway."""

_FREQUENCIES = 8

Layer = TypeVar("Layer", bound=nn.Module)


class SigmaEmbedding(nn.Module):
    """Noise levels [B] to vectors [B, width]: Fourier features of log sigma and a small network.

    Example:
        >>> SigmaEmbedding(16)(torch.tensor([0.0, 0.25])).shape
        torch.Size([2, 16])
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # log sigma spans about [-7, 2]: from one slow wave over all of it to one that tells 0.25 from 0.3.
        waves = torch.logspace(math.log10(0.2), math.log10(8.0), _FREQUENCIES)
        self.register_buffer("frequencies", waves, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * _FREQUENCIES + 1, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma: Tensor) -> Tensor:
        """Return the embedding of noise levels [B]."""
        level = sigma.clamp_min(SMALLEST).log()[:, None]
        phase = level * self.frequencies.to(level)
        features = torch.cat([0.25 * level, phase.sin(), phase.cos()], dim=1)
        return self.layers(features.to(dtype_of(self.layers)))


class FiLM(nn.Module):
    """Feature-wise linear modulation, zero-initialised: features * (1 + scale(e)) + shift(e) (Perez et al. 1709.07871).

    Example:
        >>> film, x = FiLM(4, 8), torch.rand(2, 8, 3, 3)
        >>> torch.equal(film(x, torch.rand(2, 4)), x)
        True
    """

    def __init__(self, embedding: int, channels: int) -> None:
        super().__init__()
        self.layer = zeroed(nn.Linear(embedding, 2 * channels))

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Return features [B, C, ...] modulated by embeddings [B, E]."""
        scale, shift = self.layer(embedding).chunk(2, dim=1)
        ends = (1,) * (features.ndim - 2)
        return features * (1 + scale.view(*scale.shape, *ends)) + shift.view(*shift.shape, *ends)


def as_levels(sigma: Tensor | float, like: Tensor) -> Tensor:
    """Return noise levels as a tensor [B] for a batch, whether one is given for all or one for each.

    Example:
        >>> as_levels(0.25, torch.zeros(2, 3, 4, 4))
        tensor([0.2500, 0.2500])
    """
    levels = torch.as_tensor(sigma, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return levels.expand(len(like)) if levels.ndim == 0 else levels


def zeroed(layer: Layer) -> Layer:
    """Return a layer with all its parameters set to zero: whatever it is added to starts as the identity.

    Example:
        >>> zeroed(nn.Linear(2, 3))(torch.rand(1, 2))
        tensor([[0., 0., 0.]], grad_fn=<...>)
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the type of a module's weights."""
    return next(module.parameters()).dtype
