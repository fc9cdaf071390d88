"""The smoothness mapper: a noise-conditioned correction of features towards those of the clean image."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.defenses.purify.conditioning import FiLM, SigmaEmbedding, as_levels, dtype_of, zeroed


@dataclass(frozen=True)
class MapperShape:
    """Sizes of a mapper.

    Args:
        dim: length D of the features.
        hidden: width of the hidden layers, as a multiple of D.
        blocks: residual blocks.
        embedding: length of the noise embedding.
    """

    dim: int
    hidden: float = 2.0
    blocks: int = 2
    embedding: int = 64


class Mapper(nn.Module):
    """Unit features [B, D] of noisy images and their noise level to features [B, D] nearer to those of clean images.

    M(z, s) = z + g(s) f(z, s), g(s) = s / sqrt(s^2 + 1/16): residual blocks with FiLM on s whose last layers start at
    zero, so that training starts at the identity. At s = 0 it is the identity exactly, whatever its weights; in FS-PSM
    (arXiv 2601.16200) that is a penalty, here it is built in (our reading). Row by row; no batch statistics.

    Example:
        >>> import torch
        >>> mapper, z = Mapper(MapperShape(dim=8)), torch.rand(3, 8)
        >>> torch.equal(mapper(z, 0.25), z), torch.equal(mapper(z, 0.0), z)
        (True, True)
    """

    def __init__(self, shape: MapperShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = SigmaEmbedding(shape.embedding)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.blocks))

    def forward(self, features: Tensor, sigma: Tensor | float) -> Tensor:
        """Return features for noise levels [B], or one for all; not normalised."""
        levels = as_levels(sigma, features)
        embedding = self.embed(levels)
        z = features
        for block in self.blocks:
            z = z + block(z, embedding).to(z.dtype)
        gate = levels / (levels**2 + 1 / 16).sqrt()
        return features + gate[:, None].to(z.dtype) * (z - features)


class _Block(nn.Module):
    """Norm, widen, FiLM, narrow; the last layer starts at zero."""

    def __init__(self, shape: MapperShape) -> None:
        super().__init__()
        hidden = round(shape.hidden * shape.dim)
        self.norm, self.first = nn.LayerNorm(shape.dim), nn.Linear(shape.dim, hidden)
        self.film, self.second = FiLM(shape.embedding, hidden), zeroed(nn.Linear(hidden, shape.dim))

    def forward(self, z: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.first(self.norm(z.to(dtype_of(self.first))))
        return self.second(F.gelu(self.film(hidden, embedding)))
