"""Certifiers for open-set decisions: the image stays accepted, or stays rejected, whichever the pilot says (T5, T8)."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from robustvlm.certify.bounds.band import ell_band
from robustvlm.certify.halfspace import halfspace_shift
from robustvlm.certify.normal import Array, check_radius
from robustvlm.certify.openset import openset_score, pilot_choice
from robustvlm.certify.openset_rule import Claims, OpensetRule
from robustvlm.certify.sampling import Certifier, Finding, Stage, Stop
from robustvlm.certify.scores import as_scores, mean_feature, unit_rows
from robustvlm.certify.tangent import TangentTest
from robustvlm.errors import UserError


class _DecisionRadius(Certifier):
    """Settles in the pilot which linear claims keep the decision, and tests them on the estimation samples."""

    def __init__(
        self,
        *,
        sigma: float,
        alpha: float,
        n: int,
        n_pilot: int,
        radius: float | None,
        settings: tuple[object, ...],
    ) -> None:
        self.radius = None if radius is None else check_radius(radius)
        super().__init__(
            ("pilot", n_pilot),
            ("estimation", n - n_pilot),
            sigma=sigma,
            alpha=alpha,
            settings=(self.radius, *settings),
            looks=() if radius is None else ("estimation",),
        )
        if n_pilot < 1:
            raise UserError("the side is chosen by pilot samples: pass n_pilot of at least 1")
        self._claims: Claims | None = None
        self._score = 0.0
        self._rows: Array | None = None
        self._test: _SideTest | None = None

    @abstractmethod
    def _chosen(self, centre: Array) -> tuple[Claims, float]:
        """Return the claims that keep the decision at the pilot's mean feature [D], and the score there."""

    @property
    def accepts(self) -> bool:
        """The side that the pilot chose."""
        return self._claims is not None and self._claims.accepts

    def _absorb(self, stage: Stage, rows: Array) -> None:
        if stage == "pilot":
            self._claims, self._score = self._chosen(mean_feature(rows)[0])
            if self.radius is not None:
                a = self.radius / self.sigma
                self._test = _SideTest(rows, self._claims.vectors, self._claims.least, a=a, alpha=self.alpha)
        elif self._test is not None:
            self._test.update(rows)
        else:
            self._rows = rows

    def _goes_on(self, stage: Stage) -> bool:
        del stage
        return not self._decided()

    def _decided(self) -> bool:
        return self._test is not None and self._test.stop != "exhausted"

    def finding(self) -> Finding:
        stop: Stop = "fixed" if self._test is None else self._test.stop
        return Finding(
            radius=self._radius() if self._test is None else (self.radius or 0.0) * (stop == "certified"),
            stop=stop,
            n=self.counts["estimation"],
            n_pilot=self.counts["pilot"],
            failed=self.failed,
            prediction=int(self.accepts),
            mean=self.mean,
            columns={"score": self._score},
            claim="openset-accept" if self.accepts else "openset-reject",
        )

    def _radius(self) -> float:
        assert self._rows is not None
        assert self._claims is not None
        claims = self._claims
        band = ell_band(len(self._rows), self.alpha)
        return self.sigma * halfspace_shift(self._rows, claims.vectors, lambda _: claims.least, band)


class OpensetRadius(_DecisionRadius):
    """The radius inside which `max_k min_a <m(x'), v_ka>` stays on the side of tau where the pilot found it (P1-CDF).

    The pilot chooses side, class and antibodies; the estimation samples bound the score on that side only. With
    `radius` the claim is decided at that radius, sampling until yes, hopeless, or n (T6).

    Args:
        vectors: [K, A, D] from `contrast_vectors`. tau: threshold, from other data.
        n: all samples, n_pilot of them for the pilot.

    Example:
        >>> from robustvlm.certify.openset import contrast_vectors
        >>> v = contrast_vectors(np.eye(2), [], 0.0)
        >>> certifier = OpensetRadius(vectors=v, tau=0.5, sigma=0.25, alpha=0.001, n=1000, n_pilot=200)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.6, 0.8]] * wanted.sure)
        >>> certifier.finding().claim, round(certifier.finding().radius, 2)
        ('openset-accept', 0.31)
    """

    def __init__(
        self,
        *,
        vectors: Array,
        tau: float,
        sigma: float,
        alpha: float,
        n: int,
        n_pilot: int,
        radius: float | None = None,
    ) -> None:
        self.vectors, self.tau = np.asarray(vectors, dtype=np.float64), float(tau)
        settings = (self.vectors, self.tau)
        super().__init__(sigma=sigma, alpha=alpha, n=n, n_pilot=n_pilot, radius=radius, settings=settings)

    def _chosen(self, centre: Array) -> tuple[Claims, float]:
        k, chosen = pilot_choice(centre, self.vectors)
        score = openset_score(centre, self.vectors)
        if score >= self.tau:
            linear, least = self.vectors[k], self.tau
        else:
            linear = -self.vectors[np.arange(len(self.vectors)), chosen]
            least = float(np.nextafter(-self.tau, np.inf))  # strictly below tau
        return Claims(linear, np.full(len(linear), least), score >= self.tau), score


class RuleRadius(_DecisionRadius):
    """The radius inside which a rule with a threshold for each class keeps accepting, or rejecting (`OpensetRule`).

    The pilot chooses the claims that keep the decision; see `robustvlm.certify.openset_rule` for why they do.

    Example:
        >>> rule = OpensetRule(np.eye(2), np.array([0, 1]), np.zeros((0, 2)), 0.0, np.array([0.9, 0.5]))
        >>> certifier = RuleRadius(rule=rule, sigma=0.25, alpha=0.001, n=1000, n_pilot=200)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.1, 0.99]] * wanted.sure)
        >>> certifier.finding().claim, round(certifier.finding().radius, 2)
        ('openset-accept', 0.38)
    """

    def __init__(
        self, *, rule: OpensetRule, sigma: float, alpha: float, n: int, n_pilot: int, radius: float | None = None
    ) -> None:
        settings = (rule.prototypes, rule.classes, rule.antibodies, rule.weight, rule.thresholds)
        super().__init__(sigma=sigma, alpha=alpha, n=n, n_pilot=n_pilot, radius=radius, settings=settings)
        self.rule = rule

    def _chosen(self, centre: Array) -> tuple[Claims, float]:
        return self.rule.claims(centre), self.rule.score(centre)


class _SideTest:
    """Anytime-valid test of `<m(x'), v> > least` for all given v [M, D], least [M], x' within `a` sigmas (T6, T8)."""

    def __init__(self, pilot: Array, vectors: Array, least: Array, *, a: float, alpha: float) -> None:
        lengths = np.linalg.norm(vectors, axis=1)
        self.stop: Stop = "exhausted"
        if not lengths.min() > 1e-9:
            self.stop = "futile"
            return
        self._units = vectors / lengths[:, None]
        scores = as_scores(0.5 * (1.0 + unit_rows(pilot) @ self._units.T))
        self._test = TangentTest(scores, a=a, target=0.5 * (1.0 + least / lengths), alpha=alpha)
        self._conclude()

    def update(self, rows: Array) -> None:
        if self.stop == "exhausted":
            self._test.update(as_scores(0.5 * (1.0 + unit_rows(rows) @ self._units.T)))
            self._conclude()

    def _conclude(self) -> None:
        """A claim once certified stays so; the image is when all its claims are (the minimum of a fixed set)."""
        if self._test.hopeless.any():
            self.stop = "futile"
            return
        left = ~self._test.certified
        if not left.all():
            self._test.keep(left)
            self._units = self._units[left]
        if not left.any():
            self.stop = "certified"
