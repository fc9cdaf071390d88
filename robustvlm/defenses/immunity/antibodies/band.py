"""The band of similarity that an antibody must lie in: near enough to its class to matter, not so near as to be it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.errors import UserError

SAFE_QUANTILE = 0.5
RISK_QUANTILE = 0.99
OWN_QUANTILE = 0.1


@dataclass(frozen=True)
class Band:
    """Bounds on the cosine between an antibody and the prototype of its class (Immuno-VLM, arXiv 2605.30745).

    Raises:
        UserError: not -1 <= safe < risk <= 1.

    Example:
        >>> Band(0.4, 0.8).holds(0.5), Band(0.4, 0.8).holds(0.9)
        (True, False)
    """

    safe: float
    risk: float

    def __post_init__(self) -> None:
        if not -1.0 <= self.safe < self.risk <= 1.0:
            raise UserError(
                f"the band of antibodies needs -1 <= safe < risk <= 1 (cosines), got {self.safe:g} and {self.risk:g}"
            )

    def holds(self, cosine: float) -> bool:
        """Whether a cosine lies strictly inside."""
        return self.safe < cosine < self.risk

    def __str__(self) -> str:
        return f"{self.safe:.3f} to {self.risk:.3f}"


def class_cosines(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine of every row to every class, [A, K]: of several prototypes of a class, the largest.

    Args:
        embeddings: unit rows [A, D].
        prototypes: unit vectors [K, D], or [K, M, D] with M prototypes a class.
    """
    if prototypes.ndim == 2:
        return embeddings @ prototypes.T
    return torch.einsum("ad,kmd->akm", embeddings, prototypes).amax(dim=-1)


def automatic_band(
    prototypes: Tensor, text_embeddings: Tensor, *, safe: float | None = None, risk: float | None = None
) -> Band:
    """Return the band from the similarities between known classes, what is given taken as it is.

    Our reading; the paper leaves the choice open. A class's name is the best-known text that is *not* another class, so
    cosines between text t_j and prototype k != j say what "another thing" looks like in this space. `safe` is their
    median: below it, an antibody is no closer to its class than a random other class is, and teaches nothing. `risk` is
    the 0.99 quantile, over the classes, of the cosine to their nearest other class: above it, a text is closer than
    two known classes ever are (names that come twice aside), and is more likely a synonym. Where the texts of the
    classes lie lower than that at their own prototypes (images and texts apart), `risk` is the lower decile of those.

    Args:
        prototypes: unit vectors [K, D] or [K, M, D], K >= 2.
        text_embeddings: unit text embeddings of the class names [K, D].

    Example:
        >>> axes = torch.eye(3)
        >>> nearby = torch.nn.functional.normalize(axes + 0.3, dim=-1)
        >>> print(automatic_band(axes, nearby, risk=0.9))
        0.219 to 0.900
    """
    cosines = class_cosines(text_embeddings, prototypes).double()
    same = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    others = cosines[~same]
    nearest = cosines.masked_fill(same, -2.0).amax(dim=0)
    own = torch.quantile(cosines.diagonal(), OWN_QUANTILE).item()
    low = torch.quantile(others, SAFE_QUANTILE).item() if safe is None else safe
    high = min(torch.quantile(nearest, RISK_QUANTILE).item(), own) if risk is None else risk
    if low >= high and (safe is None or risk is None):
        raise UserError(
            f"no band of antibodies between {low:.3f} and {high:.3f}: the texts of the classes are as near to other "
            "classes as to their own; pass both bounds yourself (--band SAFE,RISK)"
        )
    return Band(low, high)
