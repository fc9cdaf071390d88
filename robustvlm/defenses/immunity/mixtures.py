"""Several directions for one class: spherical k-means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.seeds import generator

_ROUNDS = 50


def spherical_kmeans(features: Tensor, count: int, *, seed: int, stream: str = "") -> Tensor:
    """Return `count` unit centres [M, D] of unit features [N, D]; copies of a centre where fewer do.

    The hard limit of a mixture of von Mises-Fisher distributions (Banerjee et al., JMLR 6, 2005; several prototypes a
    class as in PALM, arXiv 2402.02653). Starts are spread as in k-means++; draws come from (seed, stream).

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> spherical_kmeans(rows, 2, seed=0).sum(dim=0)
        tensor([1., 1.])
    """
    centres = _spread(features, count, seed, stream)
    for _ in range(_ROUNDS):
        nearest = (features @ centres.T).argmax(dim=1)
        moved = torch.stack(
            [
                F.normalize(features[nearest == m].mean(dim=0), dim=0) if (nearest == m).any() else centre
                for m, centre in enumerate(centres)
            ]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _spread(features: Tensor, count: int, seed: int, stream: str) -> Tensor:
    """Choose the mean first and then, with odds by distance, features far from all chosen; repeats when none is."""
    draws = generator(seed, "spherical k-means", stream)
    if count == 1:
        return F.normalize(features.mean(dim=0), dim=0)[None]
    chosen = [features[int(torch.randint(len(features), (1,), generator=draws))]]
    while len(chosen) < count:
        far = (1.0 - (features @ torch.stack(chosen).T).amax(dim=1)).clamp_min(0.0).double().cpu()
        if float(far.sum()) < 1e-9:
            chosen.append(chosen[0])
            continue
        chosen.append(features[int(torch.multinomial(far, 1, generator=draws))])
    return torch.stack(chosen)
