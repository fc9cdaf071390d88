"""The feature claim: the smoothed features of image and attacked image keep a cosine (T4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from robustvlm.certify.claims.base import Asked, Claim, Materials, Plan
from robustvlm.certify.claims.quantity import Quantity, mean_cosine, upper_mean
from robustvlm.certify.deployed_feature import deployed_feature_radius
from robustvlm.certify.direction import PredictableDirection, norm_lower_bound
from robustvlm.certify.feature_claim import FeatureRadius, FeatureTest, feature_radius
from robustvlm.certify.limits import best_mean
from robustvlm.certify.normal import Array
from robustvlm.certify.rounding import format_exact
from robustvlm.certify.sampling import Certifier, Finding
from robustvlm.certify.scores import mean_feature, unit_rows
from robustvlm.certify.vector_table import vector_table


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureQuantity(Quantity):
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

    words = "cosine between the smoothed features of image and attacked image"

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
class DirectionQuantity(Quantity):
    """`cos(m(x'), u) >= cos0` for a published direction u (T5, T3)."""

    cos0: float
    radius: float
    direction: Array

    words = "cosine between the attacked image's smoothed feature and the published direction"

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


@dataclass(frozen=True, kw_only=True)
class _Feature(Claim):
    def plan(self, asked: Asked, materials: Materials) -> Plan:
        assert asked.min_cos is not None
        cos0, alpha, sigma = asked.min_cos, asked.alpha, asked.sigma
        common: dict[str, Any] = {"cos0": cos0, "sigma": sigma, "alpha": alpha, "n": asked.samples}
        certifier: Callable[[], Certifier]
        if asked.radius is None:
            certifier = partial(FeatureRadius, **common, n_pilot=asked.n_pilot, baselines=materials.baselines)
        else:
            certifier = partial(FeatureTest, **common, radius=asked.radius)
        return Plan(
            statement="the smoothed features of image and attacked image have a cosine of at least "
            + format_exact(cos0),
            rule=self.rule,
            theorem="T4",
            bound="betting",
            stop_rule="fixed" if asked.radius is None else "anytime",
            alpha_split={"norm of the smoothed feature (betting)": alpha},
            # The first sample only sets the direction.
            best=lambda n: feature_radius(max(0.0, 2.0 * best_mean(max(1, n - 1), alpha) - 1.0), cos0, sigma),
            certifier=certifier,
            direction_source="predictable",
        )

    def deployed_columns(self, found: Finding, asked: Asked, *, sigma: float) -> dict[str, float]:
        if asked.deployed is None:
            return {}
        assert asked.min_cos is not None
        radius = deployed_feature_radius(found.r or 0.0, asked.min_cos, sigma, asked.deployed, asked.alpha)
        # Where one radius was asked about, nothing is certified beyond it.
        return {"deployed_radius": radius if asked.radius is None else min(radius, found.radius)}

    def audited(
        self, row: Mapping[str, Any], asked: Asked, materials: Materials, *, steering: Array, evidence: Array
    ) -> Quantity:
        del materials
        assert asked.min_cos is not None
        mean = np.nan_to_num(steering).mean(axis=0)
        return FeatureQuantity(
            sigma=asked.sigma,
            cos0=asked.min_cos,
            radius=row["radius"],
            r=row["r"],
            direction=mean / max(float(np.linalg.norm(mean)), 1e-12),
            clean=evidence,
        )


FEATURE = _Feature(
    name="feature",
    kept="the smoothed feature is certified to keep a cosine of at least {min_cos} to its value at the image",
    needs_classes=False,
    columns=(
        "radius",
        "deployed_radius",
        "cone_radius",
        "paper_radius",
        "fcsb_radius",
        "cdf_radius",
        "direction_radius",
    ),
    curve=True,
    rule="the mean feature m over the noise, of infinitely many copies",
    deployed="the mean of {n0:,} fresh copies keeps this cosine to m(x)",
    deployed_at_radius=True,
    options=("min_cos",),
    head=None,
    known_best=True,
    tests_radius=True,
    early_pilot=False,
    pilot_counts=True,  # its scores look back only
    needs_clean=True,
    quantity=FeatureQuantity.words,
)
