"""Many linear claims about the smoothed feature at once: `<m(x'), v> >= c` for every v of a fixed set (T5, T8)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.band import Band
from robustvlm.certify.distribution import A_MAX, layer_cake, sorted_for
from robustvlm.certify.normal import Array, largest_true
from robustvlm.certify.scores import unit_rows
from robustvlm.errors import UserError

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
        >>> from robustvlm.certify.bounds.band import ell_band
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
        >>> from robustvlm.certify.bounds.band import ell_band
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
