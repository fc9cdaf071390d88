"""The feature claim: the smoothed features of image and attacked image keep a cosine (T4); and its certifiers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from robustvlm.certify import feature
from robustvlm.certify.bands import ell_band
from robustvlm.certify.certifier import Certifier, Finding, Stage, direction_scores, mean_feature, unit_rows
from robustvlm.certify.claims.base import Asked, Claim, Materials, Plan, Quantity, mean_cosine, upper_mean
from robustvlm.certify.deployed import deployed_feature_radius
from robustvlm.certify.limits import best_mean
from robustvlm.certify.means import SequentialTest, betting_lower, hoeffding_lower
from robustvlm.certify.normal import Array, check_cos0, check_radius, check_sigma, largest_true
from robustvlm.certify.shapes import cdf_radius, direction_radius, sideways
from robustvlm.text import format_exact

# Certifiers for features: the cosine between the smoothed features of image and attacked image (T4), and baselines.
#
# The claim `cos(m(x'), m(x)) >= cos0` rests on scores along a direction that only looks back, so that pilot and
# estimation samples both count. From the same samples, each a claim of its own at its own alpha: the published bound
# (anchor f(x)), and cosines to the pilot's direction by mean, distribution, and both ways (F2, F3).

MOST_KEPT = 2**28
"""Numbers of an image's features that are kept for the baselines (2 GiB); of more, only the claim itself is made."""

BASELINES = ("paper_radius", "fcsb_radius", "cone_radius", "cdf_radius", "direction_radius")
"""Columns of other claims and methods; none may be combined with the main claim by taking the larger one."""


class FeatureRadius(Certifier):
    """The largest radius at which `cos(m(x'), m(x)) >= cos0` is certified, from a fixed number of samples (F1, T4).

    Columns, each at level alpha for a claim of its own:

    * `cone_radius`: the same claim by the closed form (T3), on the same confidence event;
    * `paper_radius`, `paper_s`: `cos(m(x'), f(x)) >= cos0` as published (T1, Hoeffding), from all samples;
    * `fcsb_radius`, `fcsb_s`: `cos(m(x'), u) >= cos0`, u the pilot's mean direction (T1, betting), estimation samples;
    * `cdf_radius`: the same claim about u from the whole distribution (T5, ELL band);
    * `direction_radius`: the same claim about u, forwards by T5 and sideways by T2 and T7, alpha / 2 each (F3).

    Args:
        cos0: cosine to certify. sigma: noise level. alpha: error probability.
        n: all samples, n_pilot of them for the pilot's direction.
        baselines: fill the columns, for which all samples are kept.

    Example:
        >>> certifier = FeatureRadius(cos0=0.5, sigma=0.25, alpha=0.01, n=400, n_pilot=100)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.8, 0.6], [0.8, -0.6]] * (wanted.sure // 2) or [[1.0, 0.0]])
        >>> found = certifier.finding()
        >>> round(found.r, 2), found.radius > found.columns["cone_radius"] > found.columns["paper_radius"]
        (0.77, True)
    """

    def __init__(
        self, *, cos0: float, sigma: float, alpha: float, n: int, n_pilot: int, baselines: bool = True
    ) -> None:
        self.cos0 = check_cos0(cos0)
        super().__init__(
            ("pilot", n_pilot),
            ("estimation", n - n_pilot),
            ("clean", 1 if baselines else 0),
            sigma=sigma,
            alpha=alpha,
            settings=(self.cos0,),
            looks=() if baselines else ("pilot", "estimation"),
        )
        self._baselines = baselines
        self._rows: dict[Stage, Array] = {}
        self._direction: feature.PredictableDirection | None = None
        self._scores: list[Array] = [np.zeros(0)]

    def _absorb(self, stage: Stage, rows: Array) -> None:
        if self._baselines:  # which need all samples at once; scores alone are small
            self._rows[stage] = rows
        if stage == "clean":
            return
        if self._direction is None:
            self._direction = feature.PredictableDirection(rows.shape[1])
        self._scores.append(self._direction.scores(rows))

    def finding(self) -> Finding:
        r = _norm_lower(np.concatenate(self._scores), self.alpha)
        columns: dict[str, float] = {}
        if self._baselines:
            pilot, estimation = self._rows.get("pilot"), self._rows["estimation"]
            samples = estimation if pilot is None else np.concatenate([pilot, estimation])
            columns = self._anchored(samples) | self._directed(pilot, estimation)
            columns["cone_radius"] = float(feature.cone_radius(r, self.cos0, self.sigma))
        return Finding(
            radius=feature_radius(r, self.cos0, self.sigma),
            stop="fixed",
            n=self.counts["estimation"],
            n_pilot=self.counts["pilot"],
            failed=self.failed,
            r=r,
            mean=self.mean,
            columns=columns,
        )

    def _anchored(self, samples: Array) -> dict[str, float]:
        clean = self._rows["clean"][0]
        if not np.isfinite(clean).all():
            return {"paper_s": 0.0, "paper_radius": 0.0}
        s = float(hoeffding_lower(direction_scores(samples, clean), self.alpha))
        return {"paper_s": s, "paper_radius": float(feature.fcsb_radius(s, self.cos0, self.sigma))}

    def _directed(self, pilot: Array | None, estimation: Array) -> dict[str, float]:
        direction = None if pilot is None else mean_feature(pilot)[0]
        if direction is None or not np.linalg.norm(direction) > 1e-9:
            return {"fcsb_s": 0.0, "fcsb_radius": 0.0, "cdf_radius": 0.0, "direction_radius": 0.0}
        scores = direction_scores(estimation, direction)
        s = float(betting_lower(scores, self.alpha))
        n, target = len(scores), 0.5 * (1.0 + self.cos0)
        side = sideways(estimation, direction, 0.5 * self.alpha)
        return {
            "fcsb_s": s,
            "fcsb_radius": float(feature.fcsb_radius(s, self.cos0, self.sigma)),
            "cdf_radius": cdf_radius(scores, target, self.sigma, ell_band(n, self.alpha)),
            "direction_radius": direction_radius(scores, self.cos0, self.sigma, ell_band(n, 0.5 * self.alpha), side),
        }


class FeatureTest(Certifier):
    """Is `cos(m(x'), m(x)) >= cos0` certified at this radius? Samples until yes, hopeless, or n (F1, T4; Ville).

    The lower bound `r` at the stop is reported as well: it comes from the same wealth process and the same event.

    Args:
        radius: to certify, in pixels. n: most samples.

    Example:
        >>> certifier = FeatureTest(radius=0.125, cos0=0.5, sigma=0.25, alpha=0.001, n=10_000)
        >>> while certifier.request() is not None:
        ...     certifier.take([[0.8, 0.6], [0.8, -0.6]] * 16)
        >>> found = certifier.finding()
        >>> found.radius, found.stop, found.n < 200
        (0.125, 'certified', True)
    """

    def __init__(self, *, radius: float, cos0: float, sigma: float, alpha: float, n: int) -> None:
        self.radius, self.cos0 = check_radius(radius), check_cos0(cos0)
        super().__init__(
            ("estimation", n), sigma=sigma, alpha=alpha, settings=(self.radius, self.cos0), looks=("estimation",)
        )
        norm = feature.least_norm(self.cos0, radius / self.sigma)
        self._test = SequentialTest(0.5 * (1.0 + min(norm, 1.0)), alpha=alpha)
        self._direction: feature.PredictableDirection | None = None
        self._scores: list[Array] = []
        if self._test.decision != "open":
            self._stages = []

    def _absorb(self, stage: Stage, rows: Array) -> None:
        del stage
        if self._direction is None:
            self._direction = feature.PredictableDirection(rows.shape[1])
        scores = self._direction.scores(rows)
        self._scores.append(scores)
        self._test.update(scores)

    def _decided(self) -> bool:
        return self._test.decision != "open"

    def finding(self) -> Finding:
        decision = self._test.decision
        scores = np.concatenate(self._scores) if self._scores else np.zeros(0)
        return Finding(
            radius=self.radius if decision == "certified" else 0.0,
            stop="exhausted" if decision == "open" else decision,
            n=self.counts["estimation"],
            n_pilot=0,
            failed=self.failed,
            r=_norm_lower(scores, self.alpha),
            mean=self.mean,
        )


def _norm_lower(scores: Array, alpha: float) -> float:
    """Return the norm's lower bound, zero if no sample met a direction (all of them failed)."""
    return feature.norm_lower_bound(scores, alpha) if len(scores) else 0.0


def feature_radius(r: float, cos0: float, sigma: float) -> float:
    """Return the radius certified for `cos(m(x'), m(x)) >= cos0` by a lower bound `r` of ||m(x)|| (T4); 0 is ABSTAIN.

    The table gives a shift that is certified; a few exact evaluations then go on towards the table's next one.

    Example:
        >>> [round(feature_radius(r, 0.5, 1.0), 3) for r in (0.05, 0.5, 0.7, 0.9)]
        [0.054, 0.583, 0.899, 1.461]
    """
    table = feature.vector_table()
    low = float(table.radius(r, cos0, 1.0))
    beyond = table.shifts[np.searchsorted(table.shifts, low, side="right") :]
    if not r > 0.0 or not len(beyond):
        return check_sigma(sigma) * low
    found = largest_true(lambda a: r >= feature.required_norm(cos0, float(a)), low, float(beyond[0]), steps=6)
    return check_sigma(sigma) * float(found)


# The feature claim: the smoothed features of image and attacked image keep a cosine (T4)


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
        curve = -1.0 if self.r is None else float(feature.vector_table().cos(self.r, eps / self.sigma))
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
        direction = feature.PredictableDirection(features.shape[1], start=self.direction)
        return feature.norm_lower_bound(direction.scores(features), alpha)


@dataclass(frozen=True, kw_only=True)
class FeatureClaim(Claim):
    """The claim of this module, and what another way to the same statement shares with it."""

    def plan(self, asked: Asked, materials: Materials) -> Plan:
        assert asked.min_cos is not None
        cos0, alpha, sigma = asked.min_cos, asked.alpha, asked.sigma
        common: dict[str, Any] = {"cos0": cos0, "sigma": sigma, "alpha": alpha, "n": asked.samples}
        baselines = materials.baselines and asked.samples * materials.width <= MOST_KEPT
        certifier: Callable[[], Certifier]
        if asked.radius is None:
            certifier = partial(FeatureRadius, **common, n_pilot=asked.n_pilot, baselines=baselines)
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


FEATURE = FeatureClaim(
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
