"""What a certificate claims, as something to be attacked and judged: cosines, the class, the vote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robustvlm.certify import (
    PredictableDirection,
    betting_lower,
    clopper_pearson_lower,
    mean_feature,
    norm_lower_bound,
    rival_normals,
    unit_rows,
    vector_table,
)

Array = npt.NDArray[np.float64]


class Claim(ABC):
    """A quantity of the smoothed model that a certificate bounds from below inside a radius."""

    quantity: str
    """In words, as in "cosine between the smoothed features"."""

    @abstractmethod
    def bound(self, eps: float) -> float:
        """Return what is certified at distance `eps`; -1 where nothing is."""

    @abstractmethod
    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        """Return a smooth stand-in [R] for the quantity from noisy features [R, n, D]; rows may differ in `aim` [R]."""

    @abstractmethod
    def value(self, features: Array) -> float:
        """Return the plug-in estimate of the quantity from features [n, D] of fresh noise."""

    @abstractmethod
    def upper(self, features: Array, alpha: float) -> float:
        """Return an upper confidence bound of the quantity, from fresh features [n, D] that chose nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureClaim(Claim):
    """`cos(m(x'), m(x)) >= bound(eps)` (T4).

    Args:
        sigma: noise level.
        cos0, radius: what the certificate states.
        r: the lower bound of ||m(x)|| behind it, for the whole curve; None if only the one radius was decided.
        direction: [D] estimate of m(x)'s direction from noise of its own, which steers the search.
        clean: [n, D] features of the clean image under fresh noise, the evidence.
    """

    sigma: float
    cos0: float
    radius: float
    r: float | None
    direction: Array
    clean: Array

    quantity = "cosine between the smoothed features of image and attacked image"

    def bound(self, eps: float) -> float:
        curve = -1.0 if self.r is None else float(vector_table().cos(self.r, eps / self.sigma))
        return max(curve, self.cos0) if eps <= self.radius else curve

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        return mean_cosine(features, self.direction, aim)

    def value(self, features: Array) -> float:
        m, there = mean_feature(self.clean)[0], mean_feature(features)[0]
        return float(m @ there / (np.linalg.norm(m) * np.linalg.norm(there)))

    def upper(self, features: Array, alpha: float) -> float:
        """Divide an upper bound of <m', m> (independent pairs) by lower bounds of both norms, alpha / 3 each."""
        pairs = np.einsum("nd,nd->n", unit_rows(features), unit_rows(self.clean))
        inner = upper_mean(pairs, alpha / 3.0)
        if inner <= 0.0:
            return inner  # norms are at most one, so dividing could only make it smaller
        norms = self._norm(self.clean, alpha / 3.0) * self._norm(features, alpha / 3.0)
        return min(1.0, inner / norms) if norms > 0.0 else 1.0

    def _norm(self, features: Array, alpha: float) -> float:
        direction = PredictableDirection(features.shape[1], start=self.direction)
        return norm_lower_bound(direction.scores(features), alpha)


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectionClaim(Claim):
    """`cos(m(x'), u) >= cos0` for a published direction u (T5, T3)."""

    cos0: float
    radius: float
    direction: Array

    quantity = "cosine between the attacked image's smoothed feature and the published direction"

    def bound(self, eps: float) -> float:
        return self.cos0 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        return mean_cosine(features, self.direction, aim)

    def value(self, features: Array) -> float:
        there = mean_feature(features)[0]
        return float(there @ self.direction / (np.linalg.norm(there) * np.linalg.norm(self.direction)))

    def upper(self, features: Array, alpha: float) -> float:
        inner = upper_mean(unit_rows(features) @ (self.direction / np.linalg.norm(self.direction)), alpha / 2.0)
        if inner <= 0.0:
            return inner
        direction = PredictableDirection(features.shape[1], start=self.direction)
        norm = norm_lower_bound(direction.scores(features), alpha / 2.0)
        return min(1.0, inner / norm) if norm > 0.0 else 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassClaim(Claim):
    """The smoothed feature is closer to the text of `label` than to any other: the least margin is above zero (P1)."""

    text: Array
    label: int
    radius: float

    quantity = "least margin of the certified class, <m(x'), v> over unit directions v to its rivals"

    @cached_property
    def normals(self) -> Array:
        """Unit directions [K-1, D] from rivals to the label."""
        found = rival_normals(self.text, self.label)
        assert found is not None  # such a certificate would have abstained
        return found

    @cached_property
    def _nearest(self) -> npt.NDArray[np.int64]:
        """Rivals in order of nearness to the label's text: where an attack is likeliest to end."""
        return np.argsort(self.normals @ self.text[self.label]).astype(np.int64)

    def bound(self, eps: float) -> float:
        return 0.0 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        normals = torch.as_tensor(self.normals, dtype=features.dtype, device=features.device)
        margins = features.mean(dim=1) @ normals.T
        # Aim 0 follows the smallest margin wherever it is; the others pursue one of the nearest rivals each.
        pursued = torch.as_tensor(self._nearest, device=features.device)[(aim - 1).clamp_min(0) % len(normals)]
        return torch.where(aim == 0, margins.amin(dim=1), margins.gather(1, pursued[:, None])[:, 0])

    def value(self, features: Array) -> float:
        return float((self.normals @ mean_feature(features)[0]).min())

    def upper(self, features: Array, alpha: float) -> float:
        """Half the features choose the rival, the other half bound its margin."""
        half = len(features) // 2
        rival = int((self.normals @ mean_feature(features[:half])[0]).argmin())
        return upper_mean(unit_rows(features[half:]) @ self.normals[rival], alpha)


@dataclass(frozen=True, kw_only=True, eq=False)
class VoteClaim(Claim):
    """More than half of the noisy copies are classified as `label` (Cohen et al. 2019)."""

    text: Array
    label: int
    radius: float
    logit_scale: float

    quantity = "share of noisy copies classified as the certified class"

    def bound(self, eps: float) -> float:
        return 0.5 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        text = torch.as_tensor(self.text, dtype=features.dtype, device=features.device)
        logits = self.logit_scale * features @ text.T
        rivals = logits.clone()
        rivals[..., self.label] = -torch.inf
        nearest = rivals.mean(dim=1, keepdim=True).argsort(dim=-1, descending=True)
        # Aim 0 lowers the label's share; the others raise the margin of one of the leading rivals each.
        pursued = nearest.gather(2, ((aim - 1).clamp_min(0) % (logits.shape[2] - 1))[:, None, None])
        margin = logits[..., self.label] - logits.gather(2, pursued.expand(-1, logits.shape[1], 1))[..., 0]
        share = logits.softmax(dim=-1)[..., self.label].mean(dim=1)
        return torch.where(aim == 0, share, torch.sigmoid(margin).mean(dim=1))

    def value(self, features: Array) -> float:
        return float(self._votes(features).mean())

    def upper(self, features: Array, alpha: float) -> float:
        against = len(features) - int(self._votes(features).sum())
        return 1.0 - float(clopper_pearson_lower(against, len(features), alpha))

    def _votes(self, features: Array) -> npt.NDArray[np.bool_]:
        said = (features @ self.text.T).argmax(axis=1) == self.label
        return said | np.isnan(features).any(axis=1)  # a failed pass must not look like a broken claim


def mean_cosine(features: Tensor, direction: Array, aim: Tensor) -> Tensor:
    """Return cosines [R] between the means of features [R, n, D] and `direction` [D]; every row has the same aim."""
    del aim
    u = torch.as_tensor(direction, dtype=features.dtype, device=features.device)[None]
    return torch.nn.functional.cosine_similarity(features.mean(dim=1), u, dim=-1)


def upper_mean(values: Array, alpha: float) -> float:
    """Return an upper confidence bound of the mean of independent values in [-1, 1].

    A value that is NaN (a failed pass) counts as 1: failures must not look like a broken bound.

    Example:
        >>> round(upper_mean(np.zeros(4096), 0.001), 3)
        0.002
    """
    scores = 0.5 * (1.0 - np.nan_to_num(values, nan=1.0))
    return 1.0 - 2.0 * float(betting_lower(scores, alpha))
