"""Scaling and shifting of a vision tower's layers (SSF: Lian et al. 2022, arXiv 2210.08823)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_HOLDERS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_WEIGHTS, _BIASES = ("weight", "in_proj_weight"), ("bias", "in_proj_bias")


class Scale(nn.Module):
    """One trainable factor for every output of a layer, on its weight [O, ...]; 1 at the start."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(len(weight)).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor.view(-1, *([1] * (weight.dim() - 1)))


class Shift(nn.Module):
    """One trainable offset for every output of a layer, on its bias [O]; 0 at the start."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(bias))

    def forward(self, bias: Tensor) -> Tensor:
        return bias + self.offset


def add_ssf(module: nn.Module, names: set[str]) -> int:
    """Let every layer whose parameters are among `names` scale and shift its outputs; return how many do.

    The published y = s * (W x + b) + t is the layer with weight s * W and bias s * b + t, which is reached by a factor
    on W and a free offset on b. Layers without a bias are scaled only.
    """
    count = 0
    for path, part in list(module.named_modules()):
        if not isinstance(part, _HOLDERS):
            continue
        for attribute in (*_WEIGHTS, *_BIASES):
            if f"{path}.{attribute}" in names:
                value = getattr(part, attribute).detach()
                change = Scale(value) if attribute in _WEIGHTS else Shift(value)
                parametrize.register_parametrization(part, attribute, change)
        count += parametrize.is_parametrized(part)
    return count
