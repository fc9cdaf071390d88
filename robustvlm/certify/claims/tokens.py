"""The tokens claim: each of the smoothed image tokens keeps a cosine to its value at the image, all at once (T4, T8).

Of an encoder whose feature is T unit tokens side by side, m_t = E f_t(x + noise) is one token's mean. The claim
`cos(m_t(x'), m_t(x)) >= cos0 for every t` asks each token the question of the feature claim. Two statements rest on the
same noisy copies, and each has its own error probability alpha:

* **All tokens, one radius.** r_t is a lower bound of ||m_t|| at level alpha for each t by itself, and r = min r_t. If
  t0 is the token of the least true norm, then r > ||m_t0|| needs r_t0 > ||m_t0||, which has probability alpha at most.
  So r bounds every norm, and the radius of r holds for every token, *without* a correction for their number (T8).
* **A bound for each token.** Here every r_t is stated. One of T statements is false with probability T times that of
  each, so each has the share alpha / T of the error; the copies may be the same (a union bound needs no independence).

Neither is the feature claim, which is about the tokens' concatenation and says nothing of a single token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from robustvlm.certify import feature
from robustvlm.certify.certifier import Certifier, Finding, Stage, as_scores
from robustvlm.certify.claims.base import Asked, Claim, Materials, Plan, Quantity, upper_mean
from robustvlm.certify.claims.feature import feature_radius
from robustvlm.certify.deployed import deployed_feature_radius
from robustvlm.certify.limits import best_mean
from robustvlm.certify.means import BettingState, betting_lower
from robustvlm.certify.normal import Array, check_cos0, check_radius
from robustvlm.errors import UserError, setting
from robustvlm.text import format_exact

_FUTILITY = 0.01
_SHARPNESS = 20.0
_OFF = 1e-2
_AT_ONCE = 2**21  # numbers whose tokens are scored at once, so that few copies of large features are held


def unit_tokens(features: ArrayLike, tokens: int) -> Array:
    """Return unit tokens [n, T, D] of features [n, T * D]; a row that is not finite becomes a row of NaN.

    Raises:
        UserError: the features are not so many tokens of equal length, side by side at unit norm.

    Example:
        >>> unit_tokens([[0.6, 0.0, 0.0, 0.6]], 2).round(6).tolist()
        Traceback (most recent call last):
        robustvlm.errors.UserError: expected 2 tokens of equal length in a unit feature, got one of 0.8485 times that...
        >>> unit_tokens([[0.5**0.5, 0.0, 0.0, 0.5**0.5]], 2).round(6).tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or not len(rows) or rows.shape[1] % tokens:
        raise UserError(f"expected features [n, {tokens} * D], got shape {list(rows.shape)}")
    rows = np.sqrt(tokens) * rows.reshape(len(rows), tokens, -1)
    rows = np.where(np.isfinite(rows).all(axis=(1, 2), keepdims=True), rows, np.nan)
    lengths = np.linalg.norm(rows, axis=2, keepdims=True)
    off = np.abs(lengths[np.isfinite(lengths)] - 1.0)
    if off.size and off.max() > _OFF:
        found = lengths[np.isfinite(lengths)].flat[off.argmax()]
        raise UserError(
            f"expected {tokens} tokens of equal length in a unit feature, got one of {found:.4g} times that: what "
            "stands around the tower must hand on tokens at unit length"
        )
    return np.asarray(rows / lengths)


class TokenDirections:
    """`feature.PredictableDirection` for every token: scores against the normalised sum of the tokens before.

    The first row only sets the directions and gives no scores. Later on a token without one (those before cancel)
    scores 1/2, which is at most (1 + ||m_t||) / 2 as well.

    Example:
        >>> rows = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.0, 1.0]]])
        >>> TokenDirections(2, 2).scores(rows).round(3).tolist()
        [[0.8, 1.0]]
    """

    def __init__(self, tokens: int, width: int, *, start: Array | None = None) -> None:
        self.total = np.zeros((tokens, width)) if start is None else start.copy()

    def scores(self, rows: Array) -> Array:
        """Return scores [k, T] in [0, 1] of unit tokens [n, T, D], in order; a failed row (NaN) scores 0."""
        sums = np.cumsum(np.concatenate([self.total[None], np.nan_to_num(rows, nan=0.0)]), axis=0)
        self.total = sums[-1]
        before = sums[:-1]
        lengths = np.linalg.norm(before, axis=2)
        along = np.einsum("ntd,ntd->nt", rows, before)
        scores = 0.5 * (1.0 + np.divide(along, lengths, out=0.0 * along, where=lengths > 1e-9))
        known = (lengths > 1e-9).any(axis=1)
        return as_scores(scores[known]) if known.any() else np.zeros((0, rows.shape[1]))


def norms_lower(scores: Array, alpha: float) -> Array:
    """Return lower bounds [T] of the norms ||m_t|| from scores [n, T], each at level `alpha`; 0 without a score."""
    if not len(scores):
        return np.zeros(scores.shape[1])
    return np.asarray(np.maximum(0.0, 2.0 * betting_lower(scores, alpha) - 1.0))


class _Tokens(Certifier):
    """Takes noisy features a look at a time, so that of them only directions and scores are kept."""

    def __init__(
        self, *, tokens: int, cos0: float, sigma: float, alpha: float, n: int, n_pilot: int, radius: float | None = None
    ) -> None:
        self.tokens, self.cos0 = tokens, check_cos0(cos0)
        self.radius = None if radius is None else check_radius(radius)
        super().__init__(
            ("pilot", n_pilot),
            ("estimation", n - n_pilot),
            sigma=sigma,
            alpha=alpha,
            settings=(self.tokens, self.cos0, self.radius),
            looks=("pilot", "estimation"),
        )
        self._directions: TokenDirections | None = None
        self._scores: list[Array] = [np.zeros((0, tokens))]

    def _absorb(self, stage: Stage, rows: Array) -> None:
        del stage
        found = []
        for some in np.array_split(rows, min(len(rows), 1 + rows.size // _AT_ONCE)):
            units = unit_tokens(some, self.tokens)
            if self._directions is None:
                self._directions = TokenDirections(*units.shape[1:])
            found.append(self._directions.scores(units))
        self._scores.append(np.concatenate(found))
        self._look(self._scores[-1])

    def _look(self, scores: Array) -> None:
        """Take scores into account that came last."""

    def _found(self, **rest: Any) -> Finding:
        scores = np.concatenate(self._scores)
        return Finding(
            n=self.counts["estimation"],
            n_pilot=self.counts["pilot"],
            failed=self.failed,
            r=float(norms_lower(scores, self.alpha).min()),
            parts=norms_lower(scores, self.alpha / self.tokens),
            mean=self.mean,
            **rest,
        )


class TokensRadius(_Tokens):
    """The largest radius at which every token keeps `cos(m_t(x'), m_t(x)) >= cos0`, from a fixed number of samples.

    `Finding.r` bounds the least norm of all tokens (level alpha), `Finding.parts` [T] every norm at once (alpha / T
    each, another claim); see the module.

    Args:
        tokens: T, the feature is so many unit tokens side by side, over the root of T.

    Example:
        >>> certifier = TokensRadius(tokens=2, cos0=0.5, sigma=0.25, alpha=0.01, n=416, n_pilot=0)
        >>> while certifier.request() is not None:
        ...     certifier.take(np.sqrt(0.5) * np.array([[0.8, 0.6, 1.0, 0.0], [0.8, -0.6, 1.0, 0.0]] * 16))
        >>> found = certifier.finding()
        >>> round(found.r, 2), found.parts.round(2).tolist(), found.radius > 0.2
        (0.77, [0.76, 0.96], True)
    """

    def finding(self) -> Finding:
        found = self._found(radius=0.0, stop="fixed")
        return replace(found, radius=feature_radius(found.r or 0.0, self.cos0, self.sigma))


class TokensTest(_Tokens):
    """Does every token keep its cosine within this radius? Samples until yes, hopeless, or n (T4, T8; Ville).

    Certified once every token's wealth has at some look reached 1 / alpha. Where one token's true norm is too small,
    its wealth gets there with probability alpha at most, so that nothing is to be corrected for the others.

    Example:
        >>> certifier = TokensTest(tokens=2, radius=0.125, cos0=0.5, sigma=0.25, alpha=0.001, n=10_000, n_pilot=0)
        >>> while certifier.request() is not None:
        ...     certifier.take(np.sqrt(0.5) * np.array([[0.8, 0.6, 1.0, 0.0], [0.8, -0.6, 1.0, 0.0]] * 16))
        >>> certifier.finding().stop, certifier.finding().n < 200
        ('certified', True)
    """

    def __init__(self, *, radius: float, **rest: Any) -> None:
        super().__init__(radius=radius, **rest)
        least = 0.5 * (1.0 + min(feature.least_norm(self.cos0, radius / self.sigma), 1.0))
        self._possible = least < 1.0 - 1e-12
        if self._possible:
            self._wins = BettingState(np.full(self.tokens, least))
            self._loses = BettingState(np.full(self.tokens, 1.0 - least))
        else:
            self._stages = []

    def _look(self, scores: Array) -> None:
        self._wins.update(scores)
        self._loses.update(1.0 - scores)

    @property
    def _certified(self) -> bool:
        return self._possible and bool(self._wins.rejected(self.alpha).all())

    @property
    def _futile(self) -> bool:
        # One token that falls short is enough; that one is taken to when it does not costs power alone.
        return not self._possible or bool(self._loses.rejected(_FUTILITY / self.tokens).any())

    def _decided(self) -> bool:
        return self._certified or self._futile

    def finding(self) -> Finding:
        held = self._certified
        return self._found(
            radius=self.radius if held else 0.0, stop="certified" if held else "futile" if self._futile else "exhausted"
        )


# The claim, and what an audit attacks


@dataclass(frozen=True, kw_only=True, eq=False)
class TokensQuantity(Quantity):
    """`cos(m_t(x'), m_t(x)) >= bound(eps)` for the token where it is least (T4, T8).

    Args:
        sigma: noise level. cos0, radius: what the certificate states. r: the bound of the least norm behind it.
        directions: [T, D] estimates of the directions of m_t(x) from noise of their own, which steer the search.
        clean: [n, T * D] features of the clean image under fresh noise, the evidence.
    """

    sigma: float
    cos0: float
    radius: float
    r: float | None
    directions: Array
    clean: Array

    words = "least cosine of a smoothed image token of the attacked image to that of the image"

    def bound(self, eps: float) -> float:
        curve = -1.0 if self.r is None else float(feature.vector_table().cos(self.r, eps / self.sigma))
        return max(curve, self.cos0) if eps <= self.radius else curve

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        """Return the least cosine, softened (aim 0), or that of the token which is lowest but `aim` - 1 others."""
        u = torch.as_tensor(self.directions, dtype=features.dtype, device=features.device)
        means = features.mean(dim=1).view(len(features), *u.shape)
        cosines = torch.nn.functional.cosine_similarity(means, u[None], dim=-1)
        soft = -torch.logsumexp(-_SHARPNESS * cosines, dim=1) / _SHARPNESS
        place = (aim - 1).clamp(0, len(u) - 1)[:, None]
        return torch.where(aim == 0, soft, cosines.sort(dim=1).values.gather(1, place)[:, 0])

    def value(self, features: Array) -> float:
        there, here = (
            np.nan_to_num(unit_tokens(rows, len(self.directions))).mean(0) for rows in (features, self.clean)
        )
        lengths = np.linalg.norm(there, axis=1) * np.linalg.norm(here, axis=1)
        return float((np.einsum("td,td->t", there, here) / np.maximum(lengths, 1e-12)).min())

    def upper(self, features: Array, alpha: float) -> float:
        """Return the least of upper bounds for all tokens, each with its share of alpha.

        Each divides a bound of <m', m> (independent pairs) by lower bounds of both norms, a third of the share each.
        """
        tokens = len(self.directions)
        share = alpha / (3.0 * tokens)
        there, here = (unit_tokens(rows, tokens) for rows in (features, self.clean))
        norms = self._norms(there, share) * self._norms(here, share)
        uppers = []
        for pairs, length in zip(np.einsum("ntd,ntd->tn", there, here), norms, strict=True):
            inner = upper_mean(pairs, share)
            # Norms are at most one, so dividing could only make a negative number smaller.
            uppers.append(inner if inner <= 0.0 else min(1.0, inner / length) if length > 0.0 else 1.0)
        return min(uppers)

    def _norms(self, units: Array, alpha: float) -> Array:
        return norms_lower(TokenDirections(*units.shape[1:], start=self.directions).scores(units), alpha)


@dataclass(frozen=True, kw_only=True)
class _TokensClaim(Claim):
    def plan(self, asked: Asked, materials: Materials) -> Plan:
        assert asked.min_cos is not None
        if materials.tokens < 2:
            raise UserError(
                f"{setting('claim', self.name)} is about the image tokens of a model that answers in words: pass "
                f"mllm:NAME without @pooled, or {setting('claim', 'feature')} for one feature of an image"
            )
        cos0, alpha, sigma = asked.min_cos, asked.alpha, asked.sigma
        common: dict[str, Any] = {
            "tokens": materials.tokens, "cos0": cos0, "sigma": sigma, "alpha": alpha, "n": asked.samples,
            "n_pilot": asked.n_pilot,
        }  # fmt: skip
        certifier: Callable[[], Certifier] = partial(TokensRadius, **common)
        if asked.radius is not None:
            certifier = partial(TokensTest, **common, radius=asked.radius)
        return Plan(
            statement=f"each of the {materials.tokens} smoothed image tokens has a cosine of at least "
            f"{format_exact(cos0)} to that of the image; of the words that follow from them nothing is stated",
            rule=self.rule,
            theorem="T4",
            bound="betting",
            stop_rule="fixed" if asked.radius is None else "anytime",
            alpha_split={"least norm of the smoothed tokens (betting, no correction)": alpha},
            best=lambda n: feature_radius(max(0.0, 2.0 * best_mean(max(1, n - 1), alpha) - 1.0), cos0, sigma),
            certifier=certifier,
            direction_source="predictable",
        )

    def pilot(self, samples: int, *, early: bool) -> int:
        del samples, early
        return 0

    def deployed_columns(self, found: Finding, asked: Asked, *, sigma: float) -> dict[str, float]:
        if asked.deployed is None or found.parts is None:
            return {}
        assert asked.min_cos is not None
        share = asked.alpha / len(found.parts)  # any of the tokens may be the one that few copies turn away
        radius = deployed_feature_radius(found.r or 0.0, asked.min_cos, sigma, asked.deployed, share)
        return {"deployed_radius": min(radius, found.radius)}

    def audited(
        self, row: Mapping[str, Any], asked: Asked, materials: Materials, *, steering: Array, evidence: Array
    ) -> Quantity:
        assert asked.min_cos is not None
        means = np.nan_to_num(unit_tokens(steering, materials.tokens)).mean(axis=0)
        return TokensQuantity(
            sigma=asked.sigma,
            cos0=asked.min_cos,
            radius=row["radius"],
            r=row["r"],
            directions=means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12),
            clean=evidence,
        )


TOKENS = _TokensClaim(
    name="tokens",
    kept="every smoothed image token is certified to keep a cosine of at least {min_cos} to its value at the image",
    needs_classes=False,
    columns=("radius", "deployed_radius"),
    curve=True,
    rule="the mean of each image token over the noise, of infinitely many copies",
    deployed="the means of {n0:,} fresh copies of all tokens keep this cosine to those of the image",
    deployed_at_radius=True,
    options=("min_cos",),
    head=None,
    tests_radius=True,
    early_pilot=False,
    pilot_counts=True,  # its scores look back only
    quantity=TokensQuantity.words,
)
