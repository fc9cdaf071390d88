"""Threats to single pixels: any change that is short in l2 (Gaussian noise), or in l1 (uniform noise)."""

import math
from typing import ClassVar

from torch import Tensor

from robustvlm.certify.noise import Kind
from robustvlm.certify.threats.base import Threat


class L2(Threat):
    """Any change of the pixels, by its Euclidean length; noise N(0, sigma^2 I) (Cohen et al. 2019).

    Example:
        >>> import torch
        >>> L2().noisy(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2), 0.5).unique().item()
        0.5
    """

    name, usual, most, of_pixels = "l2", 0.25, 10.0, True
    allows = "has an l2 distance below the radius, pixels in [0, 1]"
    unit, short = "l2, pixels in [0, 1]", "L₂"
    law = (
        "Gaussian with standard deviation {sigma} in the same pixels, added in float32 after the resize and before the "
        "model's own normalisation, not clipped"
    )

    def noisy(self, rows: Tensor, draws: Tensor, sigma: float) -> Tensor:
        return rows + sigma * draws


class L1(Threat):
    """Any change of the pixels, by the sum of its absolute values; noise uniform on [-w, w], w = sqrt(3) sigma.

    The cubes about x and x' that the noise fills overlap in a share of prod(1 - |d_i| / 2w) >= 1 - |d|_1 / 2w of each
    (both sides are 1 at d = 0, and a product of numbers in [0, 1] is at least 1 less the sum of what they lack). So no
    share changes by more than |d|_1 / 2w, and a share p stays above s within 2w (p - s): Yang et al., ICML 2020; Levine
    and Feizi, ICML 2021. The bound is about shares, so only the claims on votes can use it.

    Example:
        >>> round(L1().reach(0.9, 0.5, 0.25), 4), round(L1().least(0.9, 0.1, 0.25), 4)
        (0.3464, 0.7845)
    """

    name, usual, most, gaussian = "l1", 0.25, 10.0, False
    kind: ClassVar[Kind] = "bits"
    allows = "has an l1 distance (sum of absolute differences) below the radius, pixels in [0, 1]"
    unit, short = "l1, pixels in [0, 1]", "L₁"
    law = (
        "Uniform with standard deviation {sigma} in the same pixels (up to its 1.7321 times either way), added in "
        "float32 after the resize and before the model's own normalisation, not clipped"
    )

    def noisy(self, rows: Tensor, draws: Tensor, sigma: float) -> Tensor:
        return rows + draws.to(rows.dtype) * (math.sqrt(3.0) * sigma * 2.0**-63)

    def reach(self, p: float, share: float, sigma: float) -> float:
        # Rounding must not add to the radius.
        return max(0.0, (2.0 * math.sqrt(3.0) * sigma) * (p - share)) * (1.0 - 1e-12)

    def least(self, p: float, eps: float, sigma: float) -> float:
        return max(0.0, p - eps / (2.0 * math.sqrt(3.0) * sigma))

    def needed(self, share: float, eps: float, sigma: float) -> float:
        return share + eps / (2.0 * math.sqrt(3.0) * sigma)
