"""The losses of energy-based prompt tuning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked(features: Tensor, texts: Tensor) -> Tensor:
    """Return features [N, D] with only those entries that speak for each one's nearest class [K, D]; others are 0.

    z~ = z * 1[z * h > 0], h the text embedding of the top-1 class (arXiv 2510.11296); not scaled back to unit norm (our
    reading).

    Example:
        >>> masked(torch.tensor([[0.8, -0.6]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        tensor([[0.8000, -0.0000]])
    """
    nearest = texts[(features @ texts.T).argmax(dim=1)]
    return features * (features * nearest > 0)


def bounded_energy_change(logits: Tensor, masked_logits: Tensor, scale: float) -> Tensor:
    """Return tanh((E(s~) - E(s)) / scale) for logits [N, K] of the whole and of the masked features, [N].

    E(s) = -log sum_k exp(s_k / tau), scale = 1 / tau. Over the scale, an energy change is one of cosines, and the
    hyperbolic tangent keeps the term from outgrowing the cross-entropies (our reading of "lower bound of the energy
    change"). Masking takes away what speaks against the nearest class, so the change is negative as a rule; the larger
    it is, the less there is to take away.

    Example:
        >>> bounded_energy_change(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]), 2.0)
        tensor([0.])
    """
    return torch.tanh((logits.logsumexp(dim=1) - masked_logits.logsumexp(dim=1)) / scale)


def tuning_loss(
    features: Tensor, labels: Tensor, texts: Tensor, *, scale: float, weight: float | None
) -> dict[str, Tensor]:
    """Return the terms of the loss by name, `loss` their sum: CE(s) + CE(s~) - weight * mean bounded energy change.

    Args:
        features: unit image features [N, D]; labels [N]; texts: unit class embeddings [K, D].
        scale: factor on cosines, 1 / tau.
        weight: lambda of the energy term; None is CoOp: the first cross-entropy alone.

    Source: arXiv 2510.11296 (EBM), arXiv 2109.01134 (CoOp).

    Example:
        >>> terms = tuning_loss(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), scale=10.0, weight=None)
        >>> list(terms), bool(terms["loss"] < 1e-4)
        (['cross_entropy', 'loss'], True)
    """
    logits = scale * features @ texts.T
    plain = F.cross_entropy(logits, labels)
    if weight is None:
        return {"cross_entropy": plain, "loss": plain}
    masked_logits = scale * masked(features, texts) @ texts.T
    other = F.cross_entropy(masked_logits, labels)
    change = bounded_energy_change(logits, masked_logits, scale).mean()
    return {
        "cross_entropy": plain,
        "masked_cross_entropy": other,
        "energy_change": change,
        "loss": plain + other - weight * change,
    }
