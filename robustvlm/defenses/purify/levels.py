"""Which noise levels a purifier and a mapper are trained for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.errors import UserError

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
                raise UserError(f"sigma must be above 0 and at most {LARGEST:g} in [0, 1] pixels, got {sigma:g}")

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
