"""What an audit attacks: a quantity of the smoothed model that a certificate bounds from below inside its radius."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify.bounds import betting_lower
from robustvlm.certify.normal import Array


class Quantity(ABC):
    """A quantity of the smoothed model that a certificate bounds from below inside a radius."""

    words: ClassVar[str]
    """As in "cosine between the smoothed features"."""

    @abstractmethod
    def bound(self, eps: float) -> float:
        """Return what is certified at distance `eps`; -1 where nothing is."""

    @abstractmethod
    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        """Return a smooth stand-in [R] for the quantity from noisy features [R, n, D]; rows may differ in `aim` [R]."""

    @abstractmethod
    def value(self, features: Array) -> float:
        """Return the plug-in estimate of the quantity from features [n, D] of fresh noise."""

    @abstractmethod
    def upper(self, features: Array, alpha: float) -> float:
        """Return an upper confidence bound of the quantity, from fresh features [n, D] that chose nothing."""


def mean_cosine(features: Tensor, direction: Array, aim: Tensor) -> Tensor:
    """Return cosines [R] between the means of features [R, n, D] and `direction` [D]; every row has the same aim."""
    del aim
    u = torch.as_tensor(direction, dtype=features.dtype, device=features.device)[None]
    return torch.nn.functional.cosine_similarity(features.mean(dim=1), u, dim=-1)


def upper_mean(values: Array, alpha: float) -> float:
    """Return an upper confidence bound of the mean of independent values in [-1, 1].

    A value that is NaN (a failed pass) counts as 1: failures must not look like a broken bound.

    Example:
        >>> round(upper_mean(np.zeros(4096), 0.001), 3)
        0.002
    """
    scores = 0.5 * (1.0 - np.nan_to_num(values, nan=1.0))
    return 1.0 - 2.0 * float(betting_lower(scores, alpha))
