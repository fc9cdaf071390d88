"""AGC: the feature moves along the great circle towards the mean feature of random perspectives, and beyond it.

Li, Xue, Wang et al., *Adaptive Geometric Correction*, 2026 (arXiv 2605.15584).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SAME = 1e-6
"""Below this angle to the mean there is no way to go."""


def correction(
    own: Tensor, views: Tensor, *, least: float = 0.45, gain: float = 1.8, power: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Return how far to go, in angles to the mean, [B], and the unit mean [B, D] of the views' features.

    It is least + gain attack^power trust: attack is the mean of 1 - cos(view, own) in [0, 1], trust the mean of
    (1 + cos) / 2 over pairs of views.

    Args:
        own: unit features [B, D]; views: unit features [B, V, D], V >= 2.

    Example:
        >>> own = torch.tensor([[1.0, 0.0]])
        >>> beta, mean = correction(own, torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
        >>> beta.item(), mean.tolist()
        (2.25, [[0.0, 1.0]])
    """
    count = views.shape[1]
    attack = (1 - torch.einsum("bvd,bd->bv", views, own)).mean(1).clamp(0.0, 1.0)
    # |sum|^2 holds every pair twice and each view once with itself.
    pairs = (views.sum(1).square().sum(1) - views.square().sum((1, 2))) / (count * (count - 1))
    # A power below one has no finite slope at zero.
    strength = torch.where(attack > 0, attack.clamp_min(_SAME).pow(power), torch.zeros_like(attack))
    return least + gain * strength * (1 + pairs) / 2, F.normalize(views.mean(1), dim=1)


def along_circle(own: Tensor, mean: Tensor, beta: Tensor) -> Tensor:
    """Return unit features [B, D] at `beta` [B] times the angle from `own` to `mean`; `own` where these agree.

    Example:
        >>> along_circle(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0.5]))
        tensor([[0.7071, 0.7071]])
    """
    cosine = (own * mean).sum(1, keepdim=True)
    tangent = mean - cosine * own
    apart = tangent.norm(dim=1, keepdim=True) >= _SAME
    # The norm's slope at zero and that of a quotient by zero are no numbers, even behind `where`.
    safe = torch.where(apart, tangent, torch.ones_like(tangent))
    sine = safe.norm(dim=1, keepdim=True)
    angle = beta[:, None] * torch.atan2(sine, cosine)
    return torch.where(apart, angle.cos() * own + angle.sin() * safe / sine, own)
