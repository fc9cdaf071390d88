"""Noise levels: which of them parts are trained for, and how a part is told the present one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from robustvlm.errors import BadSetting, UserError

# Which noise levels a purifier and a mapper are trained for

LARGEST = 10.0


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
            if not 0 < sigma <= LARGEST:
                raise BadSetting("sigma", f"must be above 0 and at most {LARGEST:g} in [0, 1] pixels", got=f"{sigma:g}")

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
