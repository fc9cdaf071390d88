"""The joint claim: the same statement as `feature`, from the distribution of angles and the mean at one alpha (T20)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from robustvlm.certify.angle_test import JointTest
from robustvlm.certify.angles import TEST_SHARE, TURN_SHARE, JointPilot, best_joint_shift, joint_shift
from robustvlm.certify.certifier import Certifier, Finding, Stage
from robustvlm.certify.claims.base import Asked, Materials, Plan, sampling_of
from robustvlm.certify.claims.class_ import stop_of
from robustvlm.certify.claims.feature import FEATURE, MOST_KEPT, FeatureClaim, FeatureQuantity, feature_radius
from robustvlm.certify.feature import PredictableDirection, norm_lower_bound
from robustvlm.certify.normal import Array, check_cos0, check_radius
from robustvlm.errors import UserError, setting
from robustvlm.text import format_exact

_PILOT = 50

REST_SHARE = 1.0 - TEST_SHARE - TURN_SHARE
"""Part of alpha for a lower bound of the smoothed feature's length."""


class JointRadius(Certifier):
    """The largest radius at which `cos(m(x'), m(x)) >= cos0` is certified by angles and mean together (T20, T4).

    Column: `norm_radius`, the bound of `FeatureRadius` from the estimation samples alone, at its own alpha. The
    finding's `r` is a lower bound of ||m(x)|| at the part of alpha that is left for it: the bets and r hold together,
    so the radius is the larger of what either certifies (T4 of r; the first shift of the bets that fails costs a step).

    Args:
        cos0: cosine to certify. n: all samples, n_pilot of them for direction and bets.

    Example:
        >>> certifier = JointRadius(cos0=0.5, sigma=0.25, alpha=0.001, n=1000, n_pilot=50)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.96, 0.28], [0.96, -0.28]] * (wanted.sure // 2))
        >>> found = certifier.finding()
        >>> round(found.radius, 2), found.radius > found.columns["norm_radius"]
        (0.52, True)
    """

    def __init__(self, *, cos0: float, sigma: float, alpha: float, n: int, n_pilot: int) -> None:
        self.cos0 = check_cos0(cos0)
        super().__init__(
            ("pilot", n_pilot), ("estimation", n - n_pilot), sigma=sigma, alpha=alpha, settings=(self.cos0,)
        )
        if n_pilot < 2:
            raise UserError("direction and bets are chosen by pilot samples: pass n_pilot of at least 2")
        self._rows: dict[Stage, Array] = {}

    def _absorb(self, stage: Stage, rows: Array) -> None:
        self._rows[stage] = rows

    def finding(self) -> Finding:
        estimation = self._rows["estimation"]
        pilot = JointPilot(self._rows["pilot"], cos0=self.cos0, n=len(estimation), alpha=self.alpha)
        shift, r, plain = 0.0, 0.0, 0.0
        if pilot.direction is not None:
            scores = PredictableDirection(estimation.shape[1], start=pilot.direction).scores(estimation)
            shift = joint_shift(pilot, estimation)
            r = norm_lower_bound(scores, REST_SHARE * self.alpha)
            plain = norm_lower_bound(scores, self.alpha)
        return Finding(
            radius=max(self.sigma * shift, feature_radius(r, self.cos0, self.sigma)),
            stop="fixed",
            n=self.counts["estimation"],
            n_pilot=self.counts["pilot"],
            failed=self.failed,
            r=r,
            mean=self.mean,
            columns={"norm_radius": feature_radius(plain, self.cos0, self.sigma)},
        )


class JointAtRadius(Certifier):
    """Is `cos(m(x'), m(x)) >= cos0` certified at this radius, by angles and mean? Samples until yes, hopeless, or n.

    The finding's `r` is a lower bound of ||m(x)|| at the part of alpha that the bets leave (T26).

    Args:
        radius: to certify, in pixels. n: most samples, n_pilot of them for direction and bets.

    Example:
        >>> certifier = JointAtRadius(radius=0.3, cos0=0.5, sigma=0.25, alpha=0.001, n=10_000, n_pilot=50)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.96, 0.28], [0.96, -0.28]] * (wanted.sure // 2))
        >>> found = certifier.finding()
        >>> found.radius, found.stop, found.n < 500
        (0.3, 'certified', True)
    """

    def __init__(self, *, radius: float, cos0: float, sigma: float, alpha: float, n: int, n_pilot: int) -> None:
        self.radius, self.cos0, self._rest = check_radius(radius), check_cos0(cos0), n - n_pilot
        super().__init__(
            ("pilot", n_pilot),
            ("estimation", n - n_pilot),
            sigma=sigma,
            alpha=alpha,
            settings=(self.radius, self.cos0),
            looks=("estimation",),
        )
        if n_pilot < 2:
            raise UserError("direction and bets are chosen by pilot samples: pass n_pilot of at least 2")
        self._test: JointTest | None = None

    def _absorb(self, stage: Stage, rows: Array) -> None:
        if stage == "pilot":
            a = self.radius / self.sigma
            self._test = JointTest(rows, cos0=self.cos0, a=a, n=self._rest, alpha=self.alpha)
        elif self._test is not None:
            self._test.update(rows)

    def _decided(self) -> bool:
        return self._test is not None and self._test.decision != "open"

    def finding(self) -> Finding:
        decision = "open" if self._test is None else self._test.decision
        scores = [] if self._test is None else self._test.scores
        r = norm_lower_bound(np.concatenate(scores), REST_SHARE * self.alpha) if scores else 0.0
        return Finding(
            radius=self.radius if decision == "certified" else 0.0,
            stop=stop_of(decision),
            n=self.counts["estimation"],
            n_pilot=self.counts["pilot"],
            failed=self.failed,
            r=r,
            mean=self.mean,
        )


@dataclass(frozen=True, kw_only=True)
class _Joint(FeatureClaim):
    def pilot(self, samples: int, *, early: bool) -> int:
        return min(_PILOT if early else max(_PILOT, samples // 20), samples // 2)

    def plan(self, asked: Asked, materials: Materials) -> Plan:
        assert asked.min_cos is not None
        if asked.samples * materials.width > MOST_KEPT:
            other = f"{setting('claim', 'feature')}, the same statement, or fewer {setting('samples')}"
            raise UserError(
                f"the claim 'joint' keeps all features of an image, and {asked.samples:,} of {materials.width:,} "
                f"numbers are too many: pass {other}"
            )
        cos0, alpha, sigma = asked.min_cos, asked.alpha, asked.sigma
        early = asked.radius is not None
        certifier: Callable[[], Certifier] = partial(JointRadius, cos0=cos0, **sampling_of(asked))
        if early:
            certifier = partial(JointAtRadius, cos0=cos0, radius=asked.radius or 0.0, **sampling_of(asked))
        return Plan(
            statement="the smoothed features of image and attacked image have a cosine of at least "
            + format_exact(cos0),
            rule=self.rule,
            theorem="T26" if early else "T20",
            bound="betting",
            stop_rule="anytime" if early else "fixed",
            alpha_split={
                "angles and mean (one wealth)": _part(TEST_SHARE, alpha),
                "angle of the pilot's direction": _part(TURN_SHARE, alpha),
                "norm of the smoothed feature (betting)": _part(REST_SHARE, alpha),
            },
            best=lambda n: sigma * best_joint_shift(self.rest(asked, n), alpha, cos0),
            certifier=certifier,
            direction_source="pilot",
        )


def _part(share: float, alpha: float) -> float:
    """A part of alpha, as it is read."""
    return float(f"{share * alpha:.10g}")


JOINT = _Joint(
    name="joint",
    kept=FEATURE.kept,
    needs_classes=False,
    columns=("radius", "deployed_radius", "norm_radius"),
    curve=True,
    rule=FEATURE.rule,
    deployed=FEATURE.deployed,
    deployed_at_radius=True,
    tests_radius=True,
    options=FEATURE.options,
    head=None,
    known_best=True,
    quantity=FeatureQuantity.words,
)
