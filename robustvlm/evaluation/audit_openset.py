"""An open-set certificate as something to be attacked: the score stays on its side of the threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify import OpensetRule, mean_feature, openset_score, unit_rows
from robustvlm.evaluation.audit_claims import Array, Claim, upper_mean


@dataclass(frozen=True, kw_only=True, eq=False)
class OpensetClaim(Claim):
    """`max_k min_a <m(x'), v_ka>` stays at least tau (accepted), or below it (rejected; signs are turned).

    Args:
        vectors: [K, A, D]. tau: threshold. accepts: the side that is certified.
    """

    vectors: Array
    tau: float
    accepts: bool
    radius: float

    quantity = "open-set score of the smoothed feature on its certified side (for rejected images, its negative)"

    @property
    def _sign(self) -> float:
        return 1.0 if self.accepts else -1.0

    def bound(self, eps: float) -> float:
        return self._sign * self.tau if eps <= self.radius else -np.inf

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        vectors = torch.as_tensor(self.vectors, dtype=features.dtype, device=features.device)
        scores = torch.einsum("rd,kad->rka", features.mean(dim=1), vectors).amin(dim=2)
        # Aim 0 moves the score itself; the others pursue one of the leading classes each.
        leading = scores.argsort(dim=1, descending=True)
        pursued = leading.gather(1, ((aim - 1).clamp_min(0) % scores.shape[1])[:, None])
        return self._sign * torch.where(aim == 0, scores.amax(dim=1), scores.gather(1, pursued)[:, 0])

    def value(self, features: Array) -> float:
        return self._sign * openset_score(mean_feature(features)[0], self.vectors)

    def upper(self, features: Array, alpha: float) -> float:
        """Half the features choose classes and antibodies, the other half bound their scores.

        No correction for their number: above, the maximum over classes of upper bounds; below, the minimum over one
        class's antibodies of lower bounds.
        """
        half = len(features) // 2
        scores = np.einsum("d,kad->ka", mean_feature(features[:half])[0], self.vectors)
        rows = unit_rows(features[half:])
        if self.accepts:
            chosen = self.vectors[np.arange(len(scores)), scores.argmin(axis=1)]
            return max(_upper(rows, vector, alpha) for vector in chosen)
        leading = self.vectors[int(scores.min(axis=1).argmax())]
        return max(_upper(rows, -vector, alpha) for vector in leading)


@dataclass(frozen=True, kw_only=True, eq=False)
class RuleClaim(Claim):
    """A model with a threshold for each class keeps accepting, or rejecting (`robustvlm.certify.openset_rule`)."""

    rule: OpensetRule
    accepts: bool
    radius: float

    quantity = "open-set score less the threshold of the predicted class (for rejected images, its negative)"

    @property
    def _sign(self) -> float:
        return 1.0 if self.accepts else -1.0

    def bound(self, eps: float) -> float:
        return 0.0 if eps <= self.radius else -np.inf

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        rule, mean = self.rule, features.mean(dim=1)

        def like(values: Array) -> Tensor:
            return torch.as_tensor(values, dtype=features.dtype, device=features.device)

        cosines = mean @ like(rule.prototypes).T
        against = rule.weight * (mean @ like(rule.antibodies).T).amax(dim=1) if len(rule.antibodies) else 0.0
        each = cosines - like(rule.thresholds[rule.classes])
        # Aim 0 moves the margin of the predicted class; the others pursue that of one of the leading prototypes each.
        leading = cosines.argsort(dim=1, descending=True)
        place = torch.where(aim == 0, 0, aim % cosines.shape[1])
        return self._sign * (each.gather(1, leading.gather(1, place[:, None]))[:, 0] - against)

    def value(self, features: Array) -> float:
        return self._sign * self.rule.margin(mean_feature(features)[0])

    def upper(self, features: Array, alpha: float) -> float:
        """Half the features choose, the other half bound; no correction, as for `OpensetClaim`.

        Accepted: the margin is at most the largest of S_q - tau over all prototypes q. Rejected: tau of the predicted
        class less S is at most the largest threshold less S_p for the leading prototype p.
        """
        rule, half = self.rule, len(features) // 2
        centre, rows = mean_feature(features[:half])[0], unit_rows(features[half:])
        limits = rule.thresholds[rule.classes]
        if self.accepts:
            nearest = rule.weight * rule.antibodies[(rule.antibodies @ centre).argmax()] if len(rule.antibodies) else 0
            pairs = zip(rule.prototypes - nearest, limits, strict=True)
            return max(_upper(rows, vector, alpha) - float(limit) for vector, limit in pairs)
        leading = rule.prototypes[(rule.prototypes @ centre).argmax()]
        vectors = leading - rule.weight * rule.antibodies if len(rule.antibodies) else leading[None]
        return max(_upper(rows, -vector, alpha) for vector in vectors) + float(limits.max())


def _upper(rows: Array, vector: Array, alpha: float) -> float:
    length = float(np.linalg.norm(vector))
    return length * upper_mean(rows @ (vector / length), alpha) if length > 1e-12 else 0.0
