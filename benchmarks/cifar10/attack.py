"""A plain L-infinity PGD on cross-entropy: for adversarial training, and for the figures in the README.

Small on purpose and independent of `robustvlm.attacks`, so that it can serve as a second implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .model import CifarCLIP


def pgd(
    model: CifarCLIP, pixels: Tensor, labels: Tensor, class_embeddings: Tensor, *, eps: float, alpha: float, steps: int
) -> Tensor:
    """Sign-gradient ascent from a random start inside the eps ball; returns the last iterate, in [0, 1]."""
    delta = torch.empty_like(pixels).uniform_(-eps, eps)
    for _ in range(steps):
        adversarial = (pixels + delta).clamp_(0, 1).requires_grad_(True)
        loss = nn.functional.cross_entropy(model.logits(adversarial, class_embeddings), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        delta = (adversarial.detach() + alpha * gradient.sign() - pixels).clamp_(-eps, eps)
    return (pixels + delta).clamp_(0, 1)
