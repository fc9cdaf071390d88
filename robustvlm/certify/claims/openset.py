"""The open-set claim: an image stays accepted, or stays rejected, by its mean feature's score; and its certifiers."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify.bands import ell_band
from robustvlm.certify.certifier import Certifier, Finding, Stage, Stop, as_scores, mean_feature, unit_rows
from robustvlm.certify.claims.base import Asked, Claim, Given, Materials, Plan, Quantity, sampling_of, upper_mean
from robustvlm.certify.normal import Array, check_radius
from robustvlm.certify.openset import Claims, OpensetRule, contrast_vectors, openset_score, pilot_choice
from robustvlm.certify.shapes import halfspace_shift
from robustvlm.certify.tangent import TangentTest
from robustvlm.errors import BadSetting, UserError, setting
from robustvlm.text import format_exact

# Certifiers for open-set decisions: the image stays accepted, or stays rejected, whichever the pilot says (T5, T8)


class _DecisionRadius(Certifier):
    """Settles in the pilot which linear claims keep the decision, and tests them on the estimation samples."""

    def __init__(
        self, *, sigma: float, alpha: float, n: int, n_pilot: int, radius: float | None, settings: tuple[object, ...]
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

    The pilot chooses the claims that keep the decision; see `robustvlm.certify.openset` for why they do.

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
        parts = (rule.prototypes, rule.classes, rule.antibodies, rule.weight, rule.thresholds)
        settings: tuple[object, ...] = parts if rule.floor is None else (*parts, rule.floor)
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


# The open-set claim: an image stays accepted, or stays rejected, by the score of the mean feature (T5, T6)


@dataclass(frozen=True, kw_only=True, eq=False)
class OpensetQuantity(Quantity):
    """`max_k min_a <m(x'), v_ka>` stays at least tau (accepted), or below it (rejected; signs are turned).

    Args:
        vectors: [K, A, D]. tau: threshold. accepts: the side that is certified.
    """

    vectors: Array
    tau: float
    accepts: bool
    radius: float

    words = "open-set score of the smoothed feature on its certified side (for rejected images, its negative)"

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
class RuleQuantity(Quantity):
    """A model with a threshold for each class keeps accepting, or rejecting (`robustvlm.certify.openset`)."""

    rule: OpensetRule
    accepts: bool
    radius: float

    words = "open-set score less the threshold of the predicted class (for rejected images, its negative)"

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
        against = torch.zeros_like(cosines[:, 0])
        if len(rule.antibodies):
            against = (mean @ like(rule.antibodies).T).amax(dim=1)
            against = rule.weight * (against if rule.floor is None else (against - rule.floor).clamp_min(0.0))
        each = cosines - like(rule.thresholds[rule.classes])
        # Aim 0 moves the margin of the predicted class; the others pursue that of one of the leading prototypes each.
        leading = cosines.argsort(dim=1, descending=True)
        place = torch.where(aim == 0, 0, aim % cosines.shape[1])
        return self._sign * (each.gather(1, leading.gather(1, place[:, None]))[:, 0] - against)

    def value(self, features: Array) -> float:
        return self._sign * self.rule.margin(mean_feature(features)[0])

    def upper(self, features: Array, alpha: float) -> float:
        """Half the features choose, the other half bound; no correction, as for `OpensetQuantity`.

        Accepted: the margin is at most the largest of S_q - tau over all prototypes q. Rejected: tau of the predicted
        class less S is at most the largest threshold less S_p for the leading prototype p.
        """
        rule, half = self.rule, len(features) // 2
        centre, rows = mean_feature(features[:half])[0], unit_rows(features[half:])
        limits = rule.thresholds[rule.classes]
        if self.accepts:
            nearest, shift = rule.nearest(centre)
            pairs = zip(rule.prototypes - nearest, limits, strict=True)
            return max(_upper(rows, vector, alpha) + shift - float(limit) for vector, limit in pairs)
        vectors, shifts = rule.contrasts(rule.prototypes[(rule.prototypes @ centre).argmax()])
        pairs = zip(vectors, shifts, strict=True)
        return max(_upper(rows, -vector, alpha) - float(shift) for vector, shift in pairs) + float(limits.max())


def _upper(rows: Array, vector: Array, alpha: float) -> float:
    length = float(np.linalg.norm(vector))
    return length * upper_mean(rows @ (vector / length), alpha) if length > 1e-12 else 0.0


@dataclass(frozen=True, kw_only=True)
class _Openset(Claim):
    def check(self, given: Given, *, refuses: bool) -> None:
        if refuses and given.antibodies is not None:
            raise UserError(f"'{given.model}' has antibodies of its own: leave out {setting('antibodies')}")
        if (given.tau is None and not refuses) or not math.isfinite(given.tau or 0.0):
            raise UserError(f"an open-set claim needs its threshold: pass {setting('tau')}, chosen on other images")
        if not (given.weight >= 0.0 and math.isfinite(given.weight)):
            raise BadSetting("weight", "must be a finite number that is not negative", got=given.weight)
        if given.deployed is not None:
            raise UserError(
                f"{setting('deployed')} is for feature, class and vote claims: an open-set certificate holds for any "
                "number of inference samples of the abstaining decision (docs/certify.md)"
            )

    def plan(self, asked: Asked, materials: Materials) -> Plan:
        if materials.rule is not None:
            return self._of_rule(asked, materials.rule)
        assert asked.tau is not None
        vectors = _vectors(asked, materials)
        length = float(np.linalg.norm(vectors, axis=-1).max())
        return self._plan(
            asked,
            statement=f"the open-set score of the mean feature stays on its side of {format_exact(asked.tau)}",
            risk="score on the side that the pilot chose (no correction, T8)",
            target=0.5 * (1.0 - abs(asked.tau) / max(length, 1e-12)),
            certifier=partial(OpensetRadius, vectors=vectors, tau=asked.tau, **sampling_of(asked), radius=asked.radius),
        )

    def _of_rule(self, asked: Asked, rule: OpensetRule) -> Plan:
        low, high = float(rule.thresholds.min()), float(rule.thresholds.max())
        between = format_exact(low) if low == high else f"{format_exact(low)} to {format_exact(high)}, by class"
        statement = f"the image stays accepted, or stays rejected (thresholds of the model: {between})"
        if asked.tau is not None:
            statement = (
                "the score of the mean feature, not scaled to unit length, stays above or stays below "
                f"{format_exact(asked.tau)} "
                "(--tau in place of the model's thresholds: not the decision of the deployed model)"
            )
        return self._plan(
            asked,
            statement=statement,
            risk="claims that keep the decision, chosen by the pilot (no correction, T8)",
            target=0.5 * (1.0 - rule.room / max(rule.reach, 1e-12)),
            certifier=partial(RuleRadius, rule=rule, **sampling_of(asked), radius=asked.radius),
        )

    def _plan(
        self, asked: Asked, *, statement: str, risk: str, target: float, certifier: Callable[[], Certifier]
    ) -> Plan:
        """Return the plan; `target` is the least mean score that the easier one of accepting and rejecting asks for."""
        early = asked.radius is not None
        return Plan(
            statement=statement,
            rule=self.rule,
            theorem="T6" if early else "T5",
            bound="tangent" if early else "ell",
            stop_rule="anytime" if early else "fixed",
            alpha_split={risk: asked.alpha},
            best=self.linear_best(asked, min(max(target, 1e-6), 0.5)),
            certifier=certifier,
            label_source="pilot",
        )

    def correct(self, label: int, prediction: int) -> bool | None:
        return bool(prediction) == (label >= 0)

    def thresholds(self, asked: Asked, rule: OpensetRule | None) -> dict[str, float] | None:
        if rule is None:
            assert asked.tau is not None
            return {"tau": asked.tau}
        return {"lowest": float(rule.thresholds.min()), "highest": float(rule.thresholds.max())}

    def audited(
        self, row: Mapping[str, Any], asked: Asked, materials: Materials, *, steering: Array, evidence: Array
    ) -> Quantity:
        del steering, evidence
        accepts, radius = row["prediction"] == 1, row["radius"]
        if materials.rule is not None:
            return RuleQuantity(rule=materials.rule, accepts=accepts, radius=radius)
        assert asked.tau is not None
        return OpensetQuantity(vectors=_vectors(asked, materials), tau=asked.tau, accepts=accepts, radius=radius)


def _vectors(asked: Asked, materials: Materials) -> Array:
    """Return the vectors [K, A, D] of the score of one threshold."""
    text = materials.classes
    against = np.zeros((0, text.shape[1])) if materials.against is None else materials.against
    return contrast_vectors(text, against, asked.weight)


OPENSET = _Openset(
    name="openset",
    kept="the smoothed model's acceptance or rejection is certified to stay",
    names_class=False,
    rule="accepted or rejected by the score of the mean feature m over the noise, of infinitely many copies",
    options=("tau", "antibodies", "weight"),
    head="rule",
    tests_radius=True,
    quantity=OpensetQuantity.words,
)
