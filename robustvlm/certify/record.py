"""The record of a certificate, and its radius in source images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from robustvlm.certify.means import ANYTIME_BOUNDS
from robustvlm.certify.normal import Array, check_alpha, check_sigma
from robustvlm.certify.threats import PLAIN, find_threat
from robustvlm.core.framing import Framing, covering, fitting
from robustvlm.core.size import Size, sides
from robustvlm.errors import UserError, setting

# The record of a certificate: what is claimed, and everything needed to judge or repeat it

Source = Literal["given", "text", "clean", "pilot", "predictable", "none"]
StopRule = Literal["fixed", "anytime"]

OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""The form of the name of a claim that is code of the user's own, `module:callable`."""

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
        resize_norm: 1 where the source image is what receives the noise, so that the radius is one of the source too;
            None where it was resized and rounded to 8 bits, after which no radius at the source is stated.
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
    resize_norm: float | None = 1.0
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
    """A certified statement about every x' that a threat allows within `radius` of x; radius 0 is ABSTAIN.

    Attributes:
        claim: what kind of statement, a name of `KINDS` or `module:callable`; certificates of different claims are
            about different deployed rules.
        theorem: which theorem gave the radius (T1 .. T8, T20 .. T24).
        radius: of the tensor that receives the noise, in the unit of the threat.
        cos0: certified cosine, for feature and direction claims.
        r: lower confidence bound the radius rests on (norm, score or share), if there is one.
        label: certified class index, for class and vote claims; label_name: its name.
        rule: whose answer is certified, in words. classes: digest of the list of `n_classes` class names; prompts: of
            all else that tells them apart, as templates, antibodies and their weight, class vectors of a model's own.
        thresholds: of an open-set decision: "tau", or "lowest" and "highest" of a model's own.
        image_id, image: the image's name, and the digest of its pixels as they receive the noise.
        deployed_radius: radius within which the mean (or the vote) of `provenance.deployed_n0` fresh copies keeps the
            claim with probability 1 - alpha over them; None where nothing is stated of it.
        threat: what x' may be, a name of `robustvlm.certify.threats.THREATS`; l2 by default.

    Raises:
        UserError: the radius is negative or not finite, the cosine is negative, or the deployed radius is the larger.

    Example:
        >>> how = Provenance(sigma=0.25, alpha=0.001, n=640, n_pilot=0, stop_rule="anytime", bound="betting",
        ...                  seeds={"estimation": 1}, dtype="float32", encoder="ab12", direction_source="predictable")
        >>> c = Certificate(claim="feature", theorem="T4", radius=0.2, cos0=0.5, r=0.7, provenance=how)
        >>> Certificate.from_dict(c.to_dict()) == c, c.abstained
        (True, False)
    """

    claim: str
    theorem: str
    radius: float
    provenance: Provenance
    cos0: float | None = None
    r: float | None = None
    label: int | None = None
    label_name: str | None = None
    rule: str = ""
    classes: str | None = None
    n_classes: int | None = None
    prompts: str | None = None
    thresholds: dict[str, float] | None = None
    image_id: str = ""
    image: str = ""
    deployed_radius: float | None = None
    threat: str = PLAIN

    def __post_init__(self) -> None:
        kind = kind_of(self.claim)
        find_threat(self.threat)
        if self.deployed_radius is not None and not 0.0 <= self.deployed_radius <= self.radius:
            raise UserError(
                f"finitely many copies keep at most the radius {self.radius}, got a deployed {self.deployed_radius}"
            )
        if not (math.isfinite(self.radius) and self.radius >= 0.0):
            raise UserError(f"a certified radius is a finite number >= 0 (0 is ABSTAIN), got {self.radius}")
        if self.cos0 is not None and not 0.0 <= self.cos0 < 1.0:
            raise UserError(f"a certified cosine lies in [0, 1), got {self.cos0}")
        if kind.labelled and (self.label is None or self.provenance.label_source == "none"):
            raise UserError(f"a {self.claim} certificate needs its label and what chose it")

    @property
    def abstained(self) -> bool:
        """True if nothing is certified."""
        return self.radius == 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and dicts, ready for JSON; the threat only where it is another one than l2."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("threat", PLAIN)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Certificate:
        """Rebuild a certificate from `to_dict`, checking it again; unknown keys are refused."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"not fields of a certificate: {', '.join(sorted(unknown))}")
        return cls(**{**data, "provenance": Provenance(**data["provenance"])})


@dataclass(frozen=True)
class _Kind:
    """What a certificate of one claim must name: its label, and what else tells its statement from another.

    Attributes:
        labelled: it is about a label. named: what only certificates that name it can be compared by.
    """

    labelled: bool = False
    named: Callable[[Certificate], object] = lambda _: True


_OPENSET = _Kind(named=lambda c: c.thresholds and c.classes)
KINDS: dict[str, _Kind] = {
    "feature": _Kind(),
    "joint": _Kind(),
    "tokens": _Kind(),
    "direction": _Kind(named=lambda c: c.provenance.direction),
    "class": _Kind(labelled=True, named=lambda c: c.classes),
    "vote": _Kind(labelled=True, named=lambda c: c.classes),
    "named": _Kind(labelled=True, named=lambda c: c.classes),
    "topk": _Kind(labelled=True, named=lambda c: c.classes),
    "recall": _Kind(labelled=True, named=lambda c: c.classes),
    "openset-accept": _OPENSET,
    "openset-reject": _OPENSET,
}
"""What a record can claim, by name."""


def kind_of(claim: str) -> _Kind:
    """Return what certificates of a claim must name; of an own claim nothing is known, so nothing is asked.

    Raises:
        UserError: there is no such claim.
    """
    if OWN.fullmatch(claim):
        return _Kind()
    if claim not in KINDS:
        raise UserError(f"{setting('claim')} must be one of {', '.join(KINDS)}, got '{claim}'")
    return KINDS[claim]


_STATEMENT: dict[str, Callable[[Certificate], object]] = {
    "claim": lambda c: c.claim,
    "label": lambda c: c.label,
    "cosine": lambda c: c.cos0,
    "image": lambda c: (c.image_id, c.image),
    "rule": lambda c: c.rule,
    "class list": lambda c: c.classes,
    "prompts": lambda c: c.prompts,
    "thresholds": lambda c: None if c.thresholds is None else tuple(sorted(c.thresholds.items())),
    "direction": lambda c: c.provenance.direction,
    "threat": lambda c: c.threat,
    "sigma": lambda c: c.provenance.sigma,
    "encoder": lambda c: (c.provenance.encoder, c.provenance.dtype),
}
"""What makes two certificates statements about the same thing, by name."""


def best_of(certificates: Sequence[Certificate], alpha: float) -> Certificate:
    """Return the certificate with the largest radius, provided that taking the largest is sound at level `alpha`.

    Raises:
        UserError: the certificates are about different images, claims, labels, cosines, directions, thresholds, class
            lists, prompts, noise levels or encoders (different statements), do not say which image they are about, or
            their error probabilities add up to more than `alpha`.

    Example:
        >>> best_of([], 0.001)
        Traceback (most recent call last):
        robustvlm.errors.UserError: there is no certificate to choose from
    """
    if not certificates:
        raise UserError("there is no certificate to choose from")
    if len(certificates) > 1 and not all(c.image for c in certificates):
        raise UserError("the largest radius may only be taken for one image: name it (Certificate.image)")
    for c in certificates if len(certificates) > 1 else ():
        if not kind_of(c.claim).named(c):
            raise UserError(
                f"a {c.claim} certificate that does not name its direction, class list or thresholds cannot be compared"
            )
    differ = [name for name, of in _STATEMENT.items() if len({of(c) for c in certificates}) > 1]
    if differ:
        raise UserError(
            "the largest radius may only be taken among certificates of one deployed rule and claim about one image; "
            f"these differ in {', '.join(differ)}"
        )
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


# What a certified radius at the model's resolution is worth at the source image: the 2-norm of a resize, if linear.
#
# A resize in floating point is linear. One of 8-bit images is not: rounding makes two results differ by up to one grey
# level in every pixel, wherever the sources differ at all, so that a source change of length e may reach the model as
# `norm * e + sqrt(3 H W) / 255` and more (Pillow rounds between its two passes too). At 64 pixels that term is 0.43, at
# 224 it is 1.52: more than most certified radii. So where an image of 8 bits was resized, no radius at the source is
# stated.

_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}


def resize_matrix(source: int, target: int, interpolation: str = "bicubic") -> Array:
    """Return the antialiased resize of a line of `source` pixels to `target` ones as a matrix [target, source].

    The filter of Pillow: stretched by the scale when shrinking, cut at the edges, rows normalised to one. Without the
    rounding and clipping of 8-bit images, which are not linear.

    Raises:
        UserError: unknown interpolation, or a size below one.

    Example:
        >>> resize_matrix(4, 2, "bilinear").round(3).tolist()
        [[0.429, 0.429, 0.143, 0.0], [0.0, 0.143, 0.429, 0.429]]
    """
    if interpolation not in _SUPPORT or source < 1 or target < 1:
        raise UserError(f"cannot resize {source} pixels to {target} by '{interpolation}': use bicubic or bilinear")
    scale = source / target
    stretch = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs((np.arange(source) + 0.5)[None, :] - centres[:, None]) / stretch
    weights = _cubic(distance) if interpolation == "bicubic" else np.maximum(0.0, 1.0 - distance)
    weights = np.where(distance < _SUPPORT[interpolation], weights, 0.0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _cubic(x: Array, a: float = -0.5) -> Array:
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@lru_cache(maxsize=4096)
def _line_norm(source: int, target: int, interpolation: str) -> float:
    if source == target:
        return 1.0
    return float(np.linalg.norm(resize_matrix(source, target, interpolation), 2))


def resize_norm(width: int, height: int, size: Size | Framing) -> float:
    """Return a bound of the 2-norm of bringing an image to the size that a model sees, in its framing.

    Of a resize in floating point, without rounding to 8 bits: a perturbation of l2 norm e at the source then reaches
    the model with at most e times this, so that a radius R at the model's resolution is R / norm at the source. The
    norm of the two-dimensional resize is the product of those of its lines; cropping only lowers it, padding adds none.

    Example:
        >>> [round(resize_norm(side, side, 224), 3) for side in (32, 224, 500)]
        [7.013, 1.0, 0.452]
    """
    framing = Framing.of(size)
    if framing.resize_mode == "squash":
        to = sides(framing.image_size)
    elif framing.resize_mode == "longest":
        to = fitting(height, width, framing.image_size)
    else:
        to = covering(height, width, framing.scaled)
    return _line_norm(height, to[0], framing.interpolation) * _line_norm(width, to[1], framing.interpolation)


def source_norm(width: int, height: int, target: Size | Framing) -> float | None:
    """Return the factor from a change of an 8-bit image to that of the model's pixels: 1 if these are the same or None.

    Example:
        >>> source_norm(224, 224, 224), source_norm(256, 256, 224), source_norm(224, 224, Framing(224, short_side=256))
        (1.0, None, None)
        >>> source_norm(320, 224, (224, 320)), source_norm(224, 320, (224, 320))
        (1.0, None)
    """
    framing = Framing.of(target)
    return 1.0 if (height, width) == sides(framing.image_size) and framing.scaled == framing.image_size else None
