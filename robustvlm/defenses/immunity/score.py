"""The open-set score S_DIS: nearness to the best prototype less nearness to the nearest antibody."""

from __future__ import annotations

import torch
from torch import Tensor


def class_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine of each feature [B, D] to the nearest prototype of each class [K, M, D]: [B, K].

    Example:
        >>> class_scores(torch.tensor([[0.6, 0.8]]), torch.eye(2)[:, None])
        tensor([[0.6000, 0.8000]])
    """
    return torch.einsum("bd,kmd->bkm", features, prototypes).amax(dim=2)


def antibody_score(features: Tensor, antibodies: Tensor) -> Tensor:
    """Return the cosine of each feature [B, D] to its nearest antibody [A, D]: [B]; 0 where there is none.

    Example:
        >>> antibody_score(torch.tensor([[0.6, 0.8]]), torch.zeros(0, 2))
        tensor([0.])
    """
    if not len(antibodies):
        return features.new_zeros(len(features))
    return (features @ antibodies.T).amax(dim=1)


def open_set_score(features: Tensor, prototypes: Tensor, antibodies: Tensor, weight: float) -> Tensor:
    """Return S_DIS(z) = max_k <z, mu_k> - weight max_a <z, a> of features [B, D]: [B]; higher = more like a class.

    Source: Immuno-VLM, arXiv 2605.30745, the inference score with lambda_inf = weight; features are those behind the
    adapter.

    Example:
        >>> open_set_score(torch.tensor([[0.6, 0.8]]), torch.eye(2)[:1, None], torch.eye(2)[1:], 0.5)
        tensor([0.2000])
    """
    return class_scores(features, prototypes).amax(dim=1) - weight * antibody_score(features, antibodies)
