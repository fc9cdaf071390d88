"""Distribution certificate (T5): the mean of a [0, 1] score under a shift, from its whole survival function."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.band import Band
from robustvlm.certify.normal import Array, check_sigma, largest_true, shift_down
from robustvlm.certify.scores import as_scores
from robustvlm.errors import UserError

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
        >>> from robustvlm.certify.bounds.band import dkw_band
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
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> round(float(cdf_lower([0.9] * 1000, 0.5, ell_band(1000, 0.001))), 4)
        0.8667
    """
    return layer_cake(sorted_for(scores, band), band.lower, a)


def cdf_upper(scores: ArrayLike, a: ArrayLike, band: Band) -> Array:
    """Return an upper bound of `E g(x' + noise)` for every x' within `a` sigmas (T5); shapes as in `cdf_lower`.

    Example:
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> round(float(cdf_upper([0.1] * 1000, 0.5, ell_band(1000, 0.001))), 4)
        0.1333
    """
    return 1.0 - cdf_lower(1.0 - np.asarray(scores, dtype=np.float64), a, band)


def cdf_plug_in(scores: ArrayLike, a: ArrayLike) -> Array:
    """Return the shifted mean of the empirical distribution: between `cdf_lower` and `cdf_upper`, and no certificate.

    Example:
        >>> round(float(cdf_plug_in([0.2] + [0.95] * 9, 0.5)), 6)
        0.787071
    """
    x = np.sort(as_scores(scores), axis=0)
    return layer_cake(x, np.arange(len(x), 0, -1) / len(x), a)


def cdf_radius(scores: ArrayLike, target: float, sigma: float, band: Band) -> float:
    """Return the largest radius at which `E g(x' + noise) >= target` is certified; 0 means ABSTAIN (T5).

    For the claim `<m(x'), u> >= c`, hence `cos(m(x'), u) >= c` when c > 0, use `g = (1 + <f, u>) / 2` and the target
    `(1 + c) / 2`.

    Args:
        scores: [n], or [n, K]: then every column must reach the target (the minimum over a fixed set of claims needs
            no correction, T8).

    Example:
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> round(cdf_radius([0.9] * 1000, 0.75, 0.25, ell_band(1000, 0.001)), 3)
        0.33
    """
    x = sorted_for(scores, band)
    return check_sigma(sigma) * shift_reached(x, target, band, A_MAX)


def shift_reached(levels: Array, target: float, band: Band, a_max: float) -> float:
    """Return the largest shift up to `a_max` at which every column of the sorted scores keeps the target (T5, T8).

    Example:
        >>> from robustvlm.certify.bounds.band import dkw_band
        >>> shift_reached(np.full(100, 0.5), 0.9, dkw_band(100, 0.01), 4.0)
        0.0
    """
    return float(largest_true(lambda a: np.min(layer_cake(levels, band.lower, a)) >= target, 0.0, a_max, steps=30))
