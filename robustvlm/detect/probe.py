"""A linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor

from robustvlm.detect.base import check_known
from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of features: weights [K, D] and biases [K].

    Example:
        >>> LinearProbe(torch.eye(2), torch.zeros(2)).logits(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.]])
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [N, K] of features [N, D]."""
        return features @ self.weight.to(features).T + self.bias.to(features)


def fit_probe(
    features: Tensor, labels: Tensor, n_classes: int, *, strength: float = 10.0, n_iter: int = 500
) -> LinearProbe:
    """Return the probe that minimises |W|^2 / 2 + strength * (sum of cross-entropies); biases are not penalised.

    The problem is convex: L-BFGS (SciPy) from zero, in float64, always ends at the same probe. A class without images
    gets a bias that keeps its probability low.

    Args:
        features, labels: unit features [N, D] and labels [N] below `n_classes`.
        strength: inverse of the penalty, the C of scikit-learn's LogisticRegression.
        n_iter: iterations at most.

    Example:
        >>> features = torch.eye(2).repeat(10, 1)
        >>> fit_probe(features, torch.arange(20) % 2, 2).logits(torch.eye(2)).argmax(1)
        tensor([0, 1])
    """
    check_known(features, labels)
    if int(labels.max()) >= n_classes:
        raise UserError(f"label {int(labels.max())} has no class among {n_classes}")
    if not strength > 0:
        raise UserError(f"the strength of the fit must be positive, got {strength}")
    x = features.detach().cpu().double().numpy()
    wanted = np.eye(n_classes)[labels.cpu().numpy()]
    dim, count = x.shape[1], len(x)

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        theta = flat.reshape(n_classes, dim + 1)
        weight, bias = theta[:, :dim], theta[:, dim]
        logs = log_softmax(x @ weight.T + bias, axis=1)
        # Over the strength and the count, so that the solver's tolerances mean the same for any data.
        value = -(logs * wanted).sum() / count + np.square(weight).sum() / (2 * strength * count)
        surplus = (np.exp(logs) - wanted) / count
        slope = np.column_stack([surplus.T @ x + weight / (strength * count), surplus.sum(axis=0)])
        return float(value), slope.ravel()

    start, settings = np.zeros(n_classes * (dim + 1)), {"maxiter": n_iter, "ftol": 1e-14, "gtol": 1e-8}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=settings)
    theta = torch.from_numpy(found.x.reshape(n_classes, dim + 1))
    return LinearProbe(theta[:, :dim].to(features), theta[:, dim].to(features))
