"""Geometry of the features of a class: in how many directions its images spread (participation ratio)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from robustvlm.errors import UserError

LEAST_IMAGES = 4
"""Of a class: with fewer the unbiased estimates are mostly noise, and the ratio with them."""


def participation_ratio(features: Tensor) -> float:
    """Return (tr Σ)² / tr Σ² of features [N, D] around their mean: D for a ball, 1 for a line; NaN where it is unknown.

    Plug-in estimates are at most N - 1 and so compare numbers of images rather than classes. Here numerator and
    denominator are estimated without bias for normal features (Bai and Saranadasa 1996, Statistica Sinica 6): with S
    the sample covariance and m = N - 1, tr Σ² by m² / ((m - 1)(m + 2)) (tr S² - (tr S)² / m), and (tr Σ)² by
    (tr S)² - 2 tr Σ² / m. The ratio is not unbiased, and may be unknown: few images can leave nothing for tr Σ².

    Raises:
        UserError: fewer than `LEAST_IMAGES` images.

    Source: the dimension that Chou et al. 2026 (arXiv 2603.01879) find to forecast how a model does on other data is
    that of the directions that matter for the task; this is its plain form, without a task (our reading).

    Example:
        >>> import torch
        >>> z = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
        >>> round(participation_ratio(z)), round(participation_ratio(z * torch.tensor([1.0, 0, 0, 0, 0, 0])))
        (6, 1)
    """
    count = len(features)
    if count < LEAST_IMAGES:
        raise UserError(f"a participation ratio needs at least {LEAST_IMAGES} images of a class, got {count}")
    rows, m = features.detach().double() - features.detach().double().mean(dim=0), count - 1
    # The products of images have the eigenvalues of the covariance, but for zeros: whichever is smaller.
    products = (rows @ rows.T if count < rows.shape[1] else rows.T @ rows) / m
    trace, square = float(products.trace()), float(products.square().sum())
    squares = m**2 / ((m - 1) * (m + 2)) * (square - trace**2 / m)
    total = trace**2 - 2 * squares / m
    return total / squares if squares > 1e-12 * trace**2 and trace > 0 else float("nan")


def class_dimensions(features: Tensor, labels: Tensor, classes: int) -> npt.NDArray[np.float64]:
    """Return the participation ratio of each class [K] of features [N, D] with labels [N]; NaN for too few images.

    Example:
        >>> import torch
        >>> class_dimensions(torch.randn(20, 3), torch.zeros(20, dtype=torch.int64), 2).shape
        (2,)
    """
    found = np.full(classes, np.nan)
    for k in range(classes):
        own = features[labels == k]
        if len(own) >= LEAST_IMAGES:
            found[k] = participation_ratio(own)
    return found
