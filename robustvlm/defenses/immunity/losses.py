"""What the vaccine is trained on: near the right prototype, away from antibodies."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_likelihoods(features: Tensor, prototypes: Tensor, kappa: Tensor, log_c: Tensor) -> Tensor:
    """Return log p_k(z) = log mean_m C_D(kappa_k) exp(kappa_k <mu_km, z>) of features [B, D]: [B, K].

    Immuno-VLM (arXiv 2605.30745), phase 3: log C_D(kappa_k) + kappa_k <mu_k, z>; of several prototypes an even mixture
    (as PALM, arXiv 2402.02653).

    Args:
        prototypes: [K, M, D]. kappa, log_c: [K], constants.

    Example:
        >>> axes = torch.eye(2)[:, None]
        >>> log_likelihoods(torch.eye(2)[:1], axes, torch.tensor([2.0, 2.0]), torch.zeros(2))
        tensor([[2., 0.]])
    """
    cosines = torch.einsum("bd,kmd->bkm", features, prototypes)
    mixed = torch.logsumexp(kappa[:, None] * cosines, dim=2) - math.log(prototypes.shape[1])
    return log_c + mixed


def pull(features: Tensor, labels: Tensor, prototypes: Tensor, kappa: Tensor, log_c: Tensor) -> Tensor:
    """Return the cross-entropy of the likelihoods, a scalar: L_pull.

    Example:
        >>> axes, even = torch.eye(2)[:, None], torch.zeros(2)
        >>> pull(torch.eye(2), torch.tensor([0, 1]), axes, even, even).exp()
        tensor(2.)
    """
    return F.cross_entropy(log_likelihoods(features, prototypes, kappa, log_c), labels)


def push(features: Tensor, antibodies: Tensor, margin: float) -> Tensor:
    """Return the mean over images and antibodies of max(0, <f(z), a> - m)^2, a scalar: L_push; 0 without antibodies.

    Example:
        >>> push(torch.tensor([[1.0, 0.0]]), torch.eye(2), 0.2)
        tensor(0.3200)
    """
    if not len(antibodies):
        return features.new_zeros(())
    return F.relu(features @ antibodies.T - margin).square().mean()


def pushed_share(features: Tensor, antibodies: Tensor, margin: float) -> float:
    """Return the share of pairs of image and antibody that the margin pushes apart at all.

    Example:
        >>> pushed_share(torch.tensor([[1.0, 0.0]]), torch.eye(2), 0.2)
        0.5
    """
    if not len(antibodies) or not len(features):
        return 0.0
    return float((features @ antibodies.T > margin).double().mean())


def automatic_margin(features: Tensor, antibodies: Tensor, quantile: float = 0.9) -> float:
    """Return the cosine that only a tenth of the pairs of image and antibody exceed: these are pushed apart.

    Our reading, for models whose cosines between images and texts all lie above or all below the usual 0.2. 0.2
    without antibodies.

    Example:
        >>> automatic_margin(torch.tensor([[1.0, 0.0]]), torch.eye(2), 0.5)
        0.5
    """
    if not len(antibodies):
        return 0.2
    # An antibody at a time: the quantile of all pairs would need them in memory at once.
    return float(torch.stack([(features @ a).quantile(quantile) for a in antibodies]).mean())
