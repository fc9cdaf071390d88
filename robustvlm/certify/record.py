"""The record of a certificate: what is claimed, and everything needed to judge or repeat it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from robustvlm.certify.bounds.sample import ANYTIME_BOUNDS
from robustvlm.certify.normal import check_alpha, check_sigma
from robustvlm.errors import UserError

Claim = Literal["feature", "direction", "class", "vote", "openset-accept", "openset-reject"]
Source = Literal["given", "text", "clean", "pilot", "predictable", "none"]
StopRule = Literal["fixed", "anytime"]

_ANYTIME = ANYTIME_BOUNDS | {"tangent"}


def _one_of(name: str, value: str, allowed: object) -> None:
    known = get_args(allowed)
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got '{value}'")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How the evidence was gathered.

    Attributes:
        sigma: noise level, in the [0, 1] pixels of the tensor that receives the noise.
        alpha: error probability of this one certificate.
        alpha_split: its parts by name, adding up to at most alpha.
        n: estimation samples used; n_pilot: pilot samples.
        stop_rule: "fixed" (n decided beforehand) or "anytime"; only anytime-valid bounds may stop early.
        bound: name of the confidence bound (betting, ell, hoeffding, ...).
        seeds: seed per stream (pilot, estimation, inference); all different.
        dtype: precision of the encoder's forward pass, which is part of the encoder that is certified.
        encoder: hash of the encoder with everything after the noise.
        resize_norm: 2-norm of the linear resize before the noise; a radius at the source image is radius / resize_norm.
        label_source, direction_source: what chose the label and the direction; the estimation samples cannot.
        direction: hash of the published direction, or "".
        deployed_n0: samples of the deployed smoother, or None for the ideal one.

    Raises:
        UserError: a field contradicts the soundness rules.

    Example:
        >>> Provenance(sigma=0.25, alpha=0.001, n=640, n_pilot=0, stop_rule="anytime", bound="hoeffding",
        ...     seeds={"estimation": 1}, dtype="float32", encoder="ab12")
        Traceback (most recent call last):
        robustvlm.errors.UserError: the bound 'hoeffding' needs its n fixed beforehand and cannot stop early...
    """

    sigma: float
    alpha: float
    n: int
    n_pilot: int
    stop_rule: StopRule
    bound: str
    seeds: dict[str, int]
    dtype: str
    encoder: str
    alpha_split: dict[str, float] | None = None
    resize_norm: float = 1.0
    label_source: Source = "none"
    direction_source: Source = "none"
    direction: str = ""
    deployed_n0: int | None = None

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_alpha(self.alpha)
        _one_of("stop_rule", self.stop_rule, StopRule)
        _one_of("label_source", self.label_source, Source)
        _one_of("direction_source", self.direction_source, Source)
        if self.stop_rule == "anytime" and self.bound not in _ANYTIME:
            raise UserError(f"the bound '{self.bound}' needs its n fixed beforehand and cannot stop early: use betting")
        if sum((self.alpha_split or {}).values()) > self.alpha * (1.0 + 1e-9):
            raise UserError(f"the parts of alpha add up to more than alpha = {self.alpha}: {self.alpha_split}")
        if len(set(self.seeds.values())) < len(self.seeds):
            raise UserError(f"pilot, estimation and inference need different seeds, got {self.seeds}")


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certified statement about every x' closer than `radius` to x in the l2 norm; radius 0 is ABSTAIN.

    Attributes:
        claim: what kind of statement; certificates of different claims are about different deployed rules.
        theorem: which theorem gave the radius (T1 .. T8).
        radius: in pixel units of the tensor that receives the noise.
        cos0: certified cosine, for feature and direction claims.
        r: lower confidence bound the radius rests on (norm, score or share), if there is one.
        label: certified class index, for class and vote claims.

    Raises:
        UserError: the radius is negative or not finite, or the cosine is negative.

    Example:
        >>> how = Provenance(sigma=0.25, alpha=0.001, n=640, n_pilot=0, stop_rule="anytime", bound="betting",
        ...                  seeds={"estimation": 1}, dtype="float32", encoder="ab12", direction_source="predictable")
        >>> c = Certificate(claim="feature", theorem="T4", radius=0.2, cos0=0.5, r=0.7, provenance=how)
        >>> Certificate.from_dict(c.to_dict()) == c, c.abstained
        (True, False)
    """

    claim: Claim
    theorem: str
    radius: float
    provenance: Provenance
    cos0: float | None = None
    r: float | None = None
    label: int | None = None

    def __post_init__(self) -> None:
        _one_of("claim", self.claim, Claim)
        if not (math.isfinite(self.radius) and self.radius >= 0.0):
            raise UserError(f"a certified radius is a finite number >= 0 (0 is ABSTAIN), got {self.radius}")
        if self.cos0 is not None and not 0.0 <= self.cos0 < 1.0:
            raise UserError(f"a certified cosine lies in [0, 1), got {self.cos0}")
        if self.claim in ("class", "vote") and (self.label is None or self.provenance.label_source == "none"):
            raise UserError(f"a {self.claim} certificate needs its label and what chose it")

    @property
    def abstained(self) -> bool:
        """True if nothing is certified."""
        return self.radius == 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and dicts, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Certificate:
        """Rebuild a certificate from `to_dict`, checking it again; unknown keys are refused."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"not fields of a certificate: {', '.join(sorted(unknown))}")
        return cls(**{**data, "provenance": Provenance(**data["provenance"])})


def best_of(certificates: Sequence[Certificate], alpha: float) -> Certificate:
    """Return the certificate with the largest radius, provided that taking the largest is sound at level `alpha`.

    Raises:
        UserError: the certificates are about different claims, labels, cosines, noise levels or encoders (different
            deployed rules), or their error probabilities add up to more than `alpha`.

    Example:
        >>> best_of([], 0.001)
        Traceback (most recent call last):
        robustvlm.errors.UserError: there is no certificate to choose from
    """
    if not certificates:
        raise UserError("there is no certificate to choose from")
    rules = {(c.claim, c.label, c.cos0, c.provenance.sigma, c.provenance.encoder) for c in certificates}
    if len(rules) > 1:
        raise UserError("the largest radius may only be taken among certificates of one deployed rule and claim")
    spent = sum(c.provenance.alpha for c in certificates)
    if spent > check_alpha(alpha) * (1.0 + 1e-9):
        raise UserError(f"taking the best of {len(certificates)} spends alpha {spent:g}, more than {alpha:g}: split it")
    return max(certificates, key=lambda c: c.radius)


def expected_false(certificates: Sequence[Certificate]) -> float:
    """Return a bound of the expected number of false certificates: the sum of their error probabilities.

    Every attempted certificate spends its alpha, whether it abstains or not.

    Example:
        >>> expected_false([])
        0.0
    """
    return float(sum(c.provenance.alpha for c in certificates))
