"""Certificates from the shape of the scores: their whole distribution, their covariance, many linear claims at once."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bands import Band
from robustvlm.certify.certifier import as_scores, unit_rows, unit_vector
from robustvlm.certify.feature import join, side_upper
from robustvlm.certify.means import kl_upper_mean
from robustvlm.certify.normal import Array, check_alpha, check_cos0, check_sigma, largest_true, shift_down
from robustvlm.errors import UserError

# Distribution certificate (T5): the mean of a [0, 1] score under a shift, from its whole survival function

A_MAX = 8.0


def layer_cake(levels: ArrayLike, survival: ArrayLike, a: ArrayLike) -> Array:
    """Return `sum_i (t_i - t_{i-1}) Phi(Phi^-1(S_i) - a)`, t_0 = 0: the shifted mean given `S_i <= P(g >= t_i)` (T5).

    Args:
        levels: [n] or [n, K], in [0, 1], non-decreasing along axis 0.
        survival: [n] lower bounds of the survival function at the levels.
        a: shift(s), any shape [...]; the result has shape [..., K].

    Source: Kumar et al., NeurIPS 2020, Theorem 1, in lower-sum form.

    Example:
        >>> round(float(layer_cake([0.2, 0.95], [1.0, 0.9], 0.5)), 6)
        0.787071
    """
    gaps = np.diff(np.asarray(levels, dtype=np.float64), axis=0, prepend=0.0)
    weights = shift_down(survival, np.asarray(a, dtype=np.float64)[..., None])
    return np.asarray(weights @ gaps)


def sorted_for(scores: ArrayLike, band: Band) -> Array:
    """Return the scores [n, ...] sorted along axis 0, NaN as 0, checked against the size the band was made for.

    Raises:
        UserError: the number of scores differs from the band's n (samples dropped or added after planning).

    Example:
        >>> from robustvlm.certify.bands import dkw_band
        >>> sorted_for([0.3, float("nan")], dkw_band(2, 0.1)).tolist()
        [0.0, 0.3]
    """
    x = as_scores(scores)
    if len(x) != band.n:
        raise UserError(f"the band was made for {band.n} samples, got {len(x)}: failed samples count as NaN, not less")
    return np.sort(x, axis=0)


def cdf_lower(scores: ArrayLike, a: ArrayLike, band: Band) -> Array:
    """Return a lower bound of `E g(x' + noise)` for every x' within `a` sigmas, from i.i.d. scores at x (T5).

    Args:
        scores: [n] or [n, K] in [0, 1]; n = band.n. Each column's bound holds at the band's alpha, for all `a` at once.
        a: shift(s), any shape [...]; the result has shape [..., K].

    Example:
        >>> from robustvlm.certify.bands import ell_band
        >>> round(float(cdf_lower([0.9] * 1000, 0.5, ell_band(1000, 0.001))), 4)
        0.8667
    """
    return layer_cake(sorted_for(scores, band), band.lower, a)


def cdf_radius(scores: ArrayLike, target: float, sigma: float, band: Band) -> float:
    """Return the largest radius at which `E g(x' + noise) >= target` is certified; 0 means ABSTAIN (T5).

    For the claim `<m(x'), u> >= c`, hence `cos(m(x'), u) >= c` when c > 0, use `g = (1 + <f, u>) / 2` and the target
    `(1 + c) / 2`.

    Args:
        scores: [n], or [n, K]: then every column must reach the target (the minimum over a fixed set of claims needs
            no correction, T8).

    Example:
        >>> from robustvlm.certify.bands import ell_band
        >>> round(cdf_radius([0.9] * 1000, 0.75, 0.25, ell_band(1000, 0.001)), 3)
        0.33
    """
    x = sorted_for(scores, band)
    return check_sigma(sigma) * shift_reached(x, target, band, A_MAX)


def shift_reached(levels: Array, target: float, band: Band, a_max: float) -> float:
    """Return the largest shift up to `a_max` at which every column of the sorted scores keeps the target (T5, T8).

    Example:
        >>> from robustvlm.certify.bands import dkw_band
        >>> shift_reached(np.full(100, 0.5), 0.9, dkw_band(100, 0.01), 4.0)
        0.0
    """
    return float(largest_true(lambda a: np.min(layer_cake(levels, band.lower, a)) >= target, 0.0, a_max, steps=30))


# Covariance certificate (T7), and the cone around a published direction that uses it sideways (T3, T5, T7)


def hcr_drift(variance: ArrayLike, a: ArrayLike) -> Array:
    """Return `sqrt(variance (e^{a^2} - 1)) >= |<m(x') - m(x), w>|` for a direction with that variance (T7).

    With the largest eigenvalue of Cov(f) (at most `1 - r^2`) it bounds `||m(x') - m(x)||`. Source: Hammersley 1950,
    Chapman and Robbins 1951.

    Example:
        >>> round(float(hcr_drift(0.02, 1.0)), 5)
        0.18538
    """
    a = np.asarray(a, dtype=np.float64)
    return np.asarray(np.sqrt(np.asarray(variance, dtype=np.float64) * np.expm1(a * a)))


def eigenvalue_upper(eigenvalue: float, n: int, alpha: float) -> float:
    """Return an upper bound of the top eigenvalue of `E[g g^T]`, ||g|| <= 1, from the sample's top eigenvalue (T7).

    Free of the dimension: the true top eigenvector is one fixed direction, along which the sample's quadratic form is a
    mean of [0, 1] variables that is at most the sample's top eigenvalue.

    Example:
        >>> round(eigenvalue_upper(0.02, 10_000, 0.001), 6)
        0.025653
    """
    return float(kl_upper_mean(min(max(eigenvalue, 0.0), 1.0), n, alpha))


@dataclass(frozen=True)
class Sideways:
    """Upper bounds for the part of the feature orthogonal to a direction u (T7).

    Attributes:
        eta: bound of `||P m(x)||`.
        lam: bound of the top eigenvalue of `E[P f f^T P]`.
        alpha: joint error probability.
    """

    eta: float
    lam: float
    alpha: float

    def at(self, a: ArrayLike) -> Array:
        """Return `s(a) >= ||P m(x')||`: the better of T2 and T7, which share one confidence event."""
        return np.minimum(side_upper(self.eta, a), self.eta + hcr_drift(self.lam, a))


def sideways(features: ArrayLike, direction: ArrayLike, alpha: float) -> Sideways:
    """Return the sideways bounds from unit features [n, D] and a direction [D] chosen without them (T7).

    Half of `alpha` goes to the eigenvalue and half to the mean. A failed row (NaN) gets a full sideways length in the
    worst direction: its share is added to both bounds.

    Example:
        >>> rows = np.tile([[0.8, 0.6], [0.8, -0.6]], (500, 1))
        >>> bounds = sideways(rows, [1.0, 0.0], 0.002)
        >>> round(bounds.eta, 3), round(bounds.lam, 3)
        (0.081, 0.418)
    """
    level = log(2.0 / check_alpha(alpha))
    rows, u = unit_rows(features), unit_vector(direction)
    n = len(rows)
    failed = np.asarray(np.isnan(rows).any(axis=1))
    kept = np.where(failed[:, None], 0.0, rows)
    side = kept - np.outer(kept @ u, u)
    lost = float(failed.mean())
    gram = side.T @ side if side.shape[1] <= n else side @ side.T  # the same non-zero eigenvalues, the smaller matrix
    top = float(np.linalg.eigvalsh(gram / n)[-1]) + lost
    lam = eigenvalue_upper(top, n, 0.5 * alpha)
    mean = float(np.linalg.norm(side.mean(axis=0))) + lost
    eta = mean + sqrt(2.0 * lam * level / n) + 2.0 * level / (3.0 * n)  # Bernstein along the true mean's direction
    return Sideways(min(1.0, eta), lam, alpha)


def _cos(levels: Array, a: Array, band: Band, side: Sideways) -> Array:
    return join(2.0 * layer_cake(levels, band.lower, a) - 1.0, side.at(a))


def direction_radius(scores: ArrayLike, cos0: float, sigma: float, band: Band, side: Sideways) -> float:
    """Return the radius inside which `cos(m(x'), u) >= cos0`, for a published direction u; 0 means ABSTAIN.

    Example:
        >>> from robustvlm.certify.bands import ell_band
        >>> round(direction_radius([0.9] * 1000, 0.5, 0.25, ell_band(1000, 5e-4), Sideways(0.1, 0.05, 5e-4)), 2)
        0.37
    """
    check_cos0(cos0)
    levels = sorted_for(as_scores(scores), band)

    def certified(a: Array) -> Array:
        cos = _cos(levels, a, band, side)
        return np.asarray((cos >= cos0) & (cos > 0.0))

    return check_sigma(sigma) * float(largest_true(certified, 0.0, A_MAX, steps=30))


# Many linear claims about the smoothed feature at once: `<m(x'), v> >= c` for every v of a fixed set (T5, T8)

_CHUNK = 64  # vectors scored and sorted at a time: 64 * n float64, whatever the number of classes


def _levels(rows: Array, units: Array, band: Band) -> Array:
    return sorted_for(0.5 * (1.0 + rows @ units.T), band)


def _normalised(vectors: ArrayLike) -> tuple[Array, Array]:
    v = np.atleast_2d(np.asarray(vectors, dtype=np.float64))
    lengths = np.linalg.norm(v, axis=1)
    if not np.isfinite(lengths).all():
        raise UserError("the vectors of a linear claim must be finite")
    return v / np.maximum(lengths, 1e-300)[:, None], lengths


def halfspace_lower(features: ArrayLike, vectors: ArrayLike, a: float, band: Band) -> Array:
    """Return, per vector v [K, D], a lower bound of `<m(x'), v>` for all x' within `a` sigmas: `||v|| (2 T_a - 1)`.

    Each holds at the band's alpha. Their minimum is a level-alpha lower bound of the smallest one without correction
    (T8); all of them at once, or the largest, are not.

    Args:
        features: [n, D] unit features at x, n = band.n; a NaN row counts as the worst value for every vector.

    Example:
        >>> from robustvlm.certify.bands import ell_band
        >>> rows = [[0.6, 0.8], [0.8, 0.6]] * 500
        >>> halfspace_lower(rows, [[1.0, 0.0], [0.0, 2.0]], 0.5, ell_band(1000, 0.001)).round(3).tolist()
        [0.591, 1.183]
    """
    rows = unit_rows(features)
    units, lengths = _normalised(vectors)
    parts = [
        layer_cake(_levels(rows, units[i : i + _CHUNK], band), band.lower, a) for i in range(0, len(units), _CHUNK)
    ]
    return lengths * (2.0 * np.concatenate(parts) - 1.0)


def halfspace_shift(
    features: ArrayLike,
    vectors: ArrayLike,
    threshold: Callable[[float], ArrayLike],
    band: Band,
    *,
    a_max: float = A_MAX,
) -> float:
    """Return the largest shift at which `<m(x'), v> >= threshold(a)` is certified for every v, or 0 (T5, T8).

    Args:
        features: [n, D] unit features at x.
        vectors: [K, D], fixed before the features were drawn (text, pilot).
        threshold: non-decreasing in the shift; one number, or one for each vector [K].

    Example:
        >>> from robustvlm.certify.bands import ell_band
        >>> rows = [[0.6, 0.8], [0.8, 0.6]] * 500
        >>> round(halfspace_shift(rows, [[1.0, 0.0]], lambda a: 0.0, ell_band(1000, 0.001)), 2)
        1.97
    """
    rows = unit_rows(features)
    units, lengths = _normalised(vectors)
    best = a_max
    for i in range(0, len(units), _CHUNK):
        part = slice(i, i + _CHUNK)

        def own(a: float, part: slice = part) -> Array:
            return np.broadcast_to(np.asarray(threshold(a), dtype=np.float64), len(units))[part]

        best = _chunk_shift(_levels(rows, units[part], band), lengths[part], own, band, best)
    return best


def _chunk_shift(levels: Array, lengths: Array, threshold: Callable[[float], Array], band: Band, best: float) -> float:
    def holds(a: ArrayLike) -> bool:
        lower = lengths * (2.0 * layer_cake(levels, band.lower, float(np.asarray(a))) - 1.0)
        return bool((lower >= threshold(float(np.asarray(a)))).all())

    if holds(best):  # the minimum over claims: only a chunk that is worse than all before needs a bisection
        return best
    return float(largest_true(holds, 0.0, best, steps=30))
