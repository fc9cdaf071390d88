"""Measures of a classifier as pure functions; those with state are sums, so parts of a data set add up."""

from __future__ import annotations

import torch

N_BINS = 15


def correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return for each row of logits [N, K] whether its largest entry is the label's: bool [N].

    Example:
        >>> correct(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor([ True, False])
    """
    return logits.argmax(dim=-1) == labels


def superclass_correct(predictions: torch.Tensor, labels: torch.Tensor, superclass_of: torch.Tensor) -> torch.Tensor:
    """Return whether prediction and label [N] fall into one superclass: bool [N].

    `superclass_of` [K] maps each class to its superclass at one level of a class tree.

    Example:
        >>> superclass_correct(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([0, 0, 1]))
        tensor([ True, False])
    """
    return superclass_of[predictions] == superclass_of[labels]


def calibration_bins(confidences: torch.Tensor, right: torch.Tensor, *, n_bins: int = N_BINS) -> torch.Tensor:
    """Return float64 sums [3, n_bins] over equal-width bins: images, confidence, correct predictions.

    Bin m holds the confidences in ((m-1)/n_bins, m/n_bins], the first one 0 as well. Sums of parts are the whole's.

    Example:
        >>> calibration_bins(torch.tensor([0.5, 0.6, 1.0]), torch.tensor([True, False, True]), n_bins=2)
        tensor([[1.0000, 2.0000],
                [0.5000, 1.6000],
                [1.0000, 1.0000]], dtype=torch.float64)
    """
    confidences = confidences.double()
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidences.device)
    index = (torch.bucketize(confidences, edges) - 1).clamp(0, n_bins - 1)
    rows = torch.stack([torch.ones_like(confidences), confidences, right.double()])
    return torch.zeros(3, n_bins, dtype=torch.float64, device=confidences.device).index_add_(1, index, rows)


def calibration_error(bins: torch.Tensor) -> float:
    """Return the expected calibration error of sums from `calibration_bins`: sum |correct - confidence| / images.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3. Raises ValueError when the bins are empty.

    Example:
        >>> round(calibration_error(torch.tensor([[2.0], [1.8], [1.0]])), 6)
        0.4
    """
    images, confidence, right = bins
    if images.sum() == 0:
        raise ValueError("the calibration error of no images is not defined")
    return float((right - confidence).abs().sum() / images.sum())


def expected_calibration_error(confidences: torch.Tensor, right: torch.Tensor, *, n_bins: int = N_BINS) -> float:
    """Return how far confidence is from accuracy, in [0, 1]; confidences float [N] in [0, 1], right bool [N].

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3, with 15 bins of equal width unless told otherwise.

    Example:
        >>> round(expected_calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([True, False])), 6)
        0.4
    """
    return calibration_error(calibration_bins(confidences, right, n_bins=n_bins))
