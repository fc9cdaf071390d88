"""Low-rank updates of a vision tower's matrices and filters (LoRA: Hu et al. 2022, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustvlm.core.seeds import generator

_HOLDERS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
_NAMES = ("weight", "in_proj_weight")


class LowRank(nn.Module):
    """W + B A for a weight [O, ...] read as a matrix with O rows; B starts at zero, so the model starts unchanged.

    Example:
        >>> weight = torch.ones(4, 3)
        >>> torch.equal(LowRank(weight, rank=2, name="w")(weight), weight)
        True
    """

    def __init__(self, weight: Tensor, *, rank: int, name: str, seed: int = 0) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        rank = min(rank, rows, columns)
        draws = torch.rand(rank, columns, generator=generator(seed, "lora", name))
        self.down = nn.Parameter(((2 * draws - 1) / math.sqrt(columns)).to(weight))
        self.up = nn.Parameter(torch.zeros(rows, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def add_lora(module: nn.Module, names: set[str], rank: int, *, seed: int = 0) -> int:
    """Give every matrix and filter among `names` a trainable update of at most `rank`; return how many have one."""
    found = [
        (part, attribute, f"{path}.{attribute}")
        for path, part in module.named_modules()
        if isinstance(part, _HOLDERS)
        for attribute in _NAMES
        if f"{path}.{attribute}" in names
    ]
    for part, attribute, name in found:
        weight = getattr(part, attribute)
        parametrize.register_parametrization(part, attribute, LowRank(weight.detach(), rank=rank, name=name, seed=seed))
    return len(found)
