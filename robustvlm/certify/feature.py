"""Certificates for the smoothed feature: along a direction, by its norm, as a cone, and the tight bound of the two."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import load_file
from scipy.special import ndtr, ndtri

from robustvlm.certify.certifier import as_scores, unit_rows, unit_vector
from robustvlm.certify.means import betting_lower
from robustvlm.certify.normal import Array, check_cos0, check_shift, check_sigma, largest_true, shift_down, shift_up

# Feature-cosine smoothing bound (T1): a lower bound of the smoothed feature along one fixed direction

VACUOUS = -1.0
"""The cosine reported when nothing is certified."""


def fcsb_inner(s: ArrayLike, a: ArrayLike) -> Array:
    """Return `B(a) = 2 Phi(Phi^-1(S) - a) - 1 <= <m(x'), u>` for every x' within `a` sigmas (T1).

    Args:
        s: lower bound of `S = E(1 + <f(x + noise), u>) / 2`, with `u` independent of the noise in the expectation.
        a: eps / sigma.

    B(a) may be negative; it then bounds the inner product only, never the cosine (see `fcsb_cos`).

    Example:
        >>> round(float(fcsb_inner(0.964070, 0.6)), 5)
        0.76986
    """
    return 2.0 * shift_down(s, a) - 1.0


def fcsb_cos(s: ArrayLike, a: ArrayLike) -> Array:
    """Return the certified `cos(m(x'), u)`: `B(a)` where it is positive, otherwise -1 (T1).

    Dividing by a norm of at most one can only increase a positive number. A negative `B(a)` is no bound of the cosine
    (the true cosine can be -1), and at zero the smoothed feature itself may be zero: both are vacuous.

    Example:
        >>> [round(float(c), 5) for c in fcsb_cos([0.964070, 0.4], 0.6)]
        [0.76986, -1.0]
    """
    inner = fcsb_inner(s, a)
    return np.where(inner > 0.0, inner, VACUOUS)


def fcsb_radius(s: ArrayLike, cos0: float, sigma: float) -> Array:
    """Return `sigma max(0, Phi^-1(S) - Phi^-1((1 + cos0) / 2))`: inside it `cos(m(x'), u) >= cos0` (T1).

    Args:
        s: lower confidence bound of S, never the plug-in mean. With `u = f(x)` this is the radius of FCSB as published
            (arXiv 2601.16200), an anchor that the smoothed model never emits; zero means ABSTAIN.
        cos0: cosine to certify, in [0, 1).
        sigma: noise level in pixel units; so is the radius.

    Example:
        >>> [round(float(r), 6) for r in fcsb_radius([0.9640697, 0.7], 0.5, 0.5)]
        [0.562755, 0.0]
    """
    threshold = ndtri(0.5 * (1.0 + check_cos0(cos0)))
    below_one = np.clip(np.asarray(s, dtype=np.float64), 0.0, np.nextafter(1.0, 0.0))
    return np.asarray(check_sigma(sigma) * np.maximum(0.0, ndtri(below_one) - threshold))


# Norm bounds (T2) and the closed-form cone certificate for the angle to the smoothed clean feature (T3)


def norm_upper(norm: ArrayLike, a: ArrayLike) -> Array:
    """Return `N(a) >= ||m(x')||` from an upper bound `norm` of `||m(x)||`, at most one (T2).

    Example:
        >>> round(float(norm_upper(0.5, 0.5)), 5)
        0.7598
    """
    return np.minimum(1.0, 2.0 * shift_up(0.5 * (1.0 + np.asarray(norm, dtype=np.float64)), a) - 1.0)


def norm_lower(norm: ArrayLike, a: ArrayLike) -> Array:
    """Return a lower bound of `||m(x')||` from a lower bound `norm` of `||m(x)||`, at least zero (T2).

    Example:
        >>> round(float(norm_lower(0.7, 0.5)), 5)
        0.40834
    """
    return np.maximum(0.0, fcsb_inner(0.5 * (1.0 + np.asarray(norm, dtype=np.float64)), a))


def side_upper(eta: ArrayLike, a: ArrayLike) -> Array:
    """Return `s(a) >= ||P m(x')||`, P the projection orthogonal to u, from an upper bound `eta` of `||P m(x)||` (T2).

    Example:
        >>> round(float(side_upper(0.0, 0.5)), 5)
        0.38292
    """
    return norm_upper(np.minimum(1.0, np.asarray(eta, dtype=np.float64)), a)


def join(p: ArrayLike, s: ArrayLike, norm: ArrayLike = 1.0) -> Array:
    """Return `p / min(1, norm, sqrt(p^2 + s^2))`, the certified cosine to u, or -1 where `p <= 0` (T3).

    Args:
        p: lower bound of `<m(x'), u>`.
        s: upper bound of `||P m(x')||`.
        norm: upper bound of `||m(x')||`.

    Example:
        >>> round(float(join(0.3, 0.4)), 6)
        0.6
    """
    p, s = np.asarray(p, dtype=np.float64), np.asarray(s, dtype=np.float64)
    length = np.minimum(np.minimum(1.0, norm), np.hypot(p, s))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0.0, np.minimum(1.0, p / length), VACUOUS)


def cone_cos(r: ArrayLike, a: ArrayLike, *, eta: ArrayLike = 0.0, norm: ArrayLike = 1.0) -> Array:
    """Return the certified `cos(m(x'), u)` given `<m(x), u> >= r` and `||P m(x)|| <= eta` (T3).

    Args:
        r: lower bound of `<m(x), u>`. For `u = m(x) / ||m(x)||` (eta = 0) a lower bound of `||m(x)||`; u need not be
            known then, and the claim is about the angle between the two smoothed features.
        a: eps / sigma.
        eta: upper bound of the part of m(x) orthogonal to u.
        norm: upper bound of `||m(x)||`.

    Example:
        >>> [round(float(c), 5) for c in cone_cos([0.7, 0.9], 0.5)]
        [0.72944, 0.89007]
    """
    p = fcsb_inner(0.5 * (1.0 + np.asarray(r, dtype=np.float64)), a)
    return join(p, side_upper(eta, a), norm_upper(norm, a))


def cone_radius(r: ArrayLike, cos0: float, sigma: float, *, eta: ArrayLike = 0.0, norm: ArrayLike = 1.0) -> Array:
    """Return the largest radius at which `cone_cos` is still at least `cos0` (and above zero); 0 means ABSTAIN (T3).

    Example:
        >>> [round(float(v), 3) for v in cone_radius([0.6, 0.9, 0.99], 0.5, 1.0)]
        [0.54, 1.093, 1.901]
    """
    check_cos0(cos0)
    r, eta, norm = np.broadcast_arrays(np.asarray(r, dtype=np.float64), eta, norm)

    def certified(a: Array) -> Array:
        cos = cone_cos(r, a, eta=eta, norm=norm)
        return np.asarray((cos >= cos0) & (cos > 0.0))

    return check_sigma(sigma) * largest_true(certified, np.zeros(r.shape), np.full(r.shape, 9.0))


# Vector Neyman-Pearson certificate (T4): the tight angle bound given a lower bound of the smoothed norm.
#
# With the angle theta fixed, weak duality gives a sound certificate for *any* multipliers: the adversarial feature
# stays within theta of u whenever `r > E ||(1 - s L sin(theta), s L cos(theta) - l)|| + eta |l|` for some s >= 0 and l,
# where L is the likelihood ratio of the shift. (Divide the Lagrangian of the design by kappa and put s = 1/kappa.) The
# right side is jointly convex in (s, l); its minimum is the least norm that certifies the angle.
#
# The expectation is not estimated but bounded: the integrand is convex in L, so the chord between grid points lies
# above it, and a chord integrates exactly. Neither the minimiser nor the quadrature can therefore make the claim too
# strong.

MARGIN = 1e-9
"""Added to the least norm: covers rounding in the sums."""

A_MIN = 1e-4
"""Smaller shifts are judged as this one, where the cells of the likelihood ratio are still well apart."""

A_MAX = 5.0
"""Largest shift that is evaluated; a norm that certifies more is credited with this one."""


@lru_cache(maxsize=512)
def _chords(a: float, step: float = 0.005) -> tuple[Array, Array, float]:
    """Grid values of L, their weights, and the weight of the slope at infinity: E F(L) <= w @ F(L) + tail * slope."""
    a = max(a, A_MIN)
    t = np.arange(-6.5, 6.5 + a + step, step)
    likelihood = np.append(0.0, np.exp(a * t - 0.5 * a * a))
    plain = _cell_masses(t)
    tilted = _cell_masses(t - a)  # E[L; cell] is the cell's mass under the shifted normal
    width = np.diff(likelihood)
    weights = np.zeros(len(likelihood))
    weights[:-1] += np.maximum(0.0, likelihood[1:] * plain - tilted) / width
    weights[1:] += np.maximum(0.0, tilted - likelihood[:-1] * plain) / width
    beyond = float(ndtr(-t[-1]))
    weights[-1] += beyond
    return likelihood, weights, max(0.0, float(ndtr(a - t[-1])) - float(likelihood[-1]) * beyond)


def _cell_masses(t: Array) -> Array:
    """Standard normal masses of (-inf, t_0], (t_0, t_1], ..., computed in the smaller tail."""
    edges = np.append(-np.inf, t)
    left, right = edges[:-1], edges[1:]
    return np.asarray(np.where(left > 0.0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left)))


def _dual(x: Array, cos0: float, a: float, eta: float) -> tuple[float, Array]:
    likelihood, weights, tail = _chords(a)
    sin0 = np.sqrt(1.0 - cos0 * cos0)
    along = 1.0 - x[0] * sin0 * likelihood
    across = x[0] * cos0 * likelihood - x[1]
    length = np.hypot(along, across)
    pull = weights / np.maximum(length, 1e-300)
    slope = np.array([pull @ ((across * cos0 - along * sin0) * likelihood) + tail, -(pull @ across) + eta])
    return float(weights @ length + tail * abs(x[0]) + eta * abs(x[1])), slope


@lru_cache(maxsize=65536)
def required_norm(cos0: float, a: float, *, eta: float = 0.0) -> float:
    """Return the least `r` such that `<m(x), u> >= r` certifies `cos(m(x'), u) > cos0` at shift `a`, rounded up (T4).

    Args:
        cos0: cosine to certify, in [0, 1).
        a: eps / sigma.
        eta: upper bound of the part of m(x) orthogonal to u; 0 for `u = m(x) / ||m(x)||`.

    A value of one or more means that no norm certifies it.

    Example:
        >>> [round(required_norm(0.5, a), 3) for a in (0.1, 0.5, 1.0, 2.0)]
        [0.092, 0.437, 0.749, 0.972]
    """
    from scipy.optimize import minimize

    check_cos0(cos0)
    a = check_shift(a)
    if a > A_MAX:
        return 1.0 + MARGIN
    sin0 = float(np.sqrt(1.0 - cos0 * cos0))
    start = np.array([np.exp(-0.5 * a * a) / sin0, cos0 / sin0])
    options = {"ftol": 1e-14, "gtol": 1e-10, "maxiter": 300}
    bounds = [(0.0, None), (0.0, None)]
    found = minimize(_dual, start, args=(cos0, a, eta), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    value = _dual(found.x, cos0, a, eta)[0]
    return min(value if np.isfinite(value) else 1.0, 1.0) + MARGIN


def vector_radius(r: float, cos0: float, sigma: float, *, eta: float = 0.0) -> float:
    """Return the largest radius at which `cos(m(x'), u) > cos0` is certified by `<m(x), u> >= r`; 0 is ABSTAIN (T4).

    Where rounding or the range of shifts leaves the closed form (T3, same premise) ahead, that is returned. For the
    claim about the two smoothed features, `r` is a lower confidence bound of `||m(x)||` and eta is 0.

    Example:
        >>> [round(vector_radius(r, 0.5, 1.0), 3) for r in (0.5, 0.7, 0.9)]
        [0.583, 0.899, 1.461]
    """
    check_cos0(cos0)
    found = largest_true(lambda a: float(r) >= required_norm(cos0, float(a), eta=eta), 0.0, A_MAX, steps=24)
    return max(check_sigma(sigma) * float(found), float(cone_radius(r, cos0, sigma, eta=eta)))


def vector_cos(r: float, a: float, *, eta: float = 0.0) -> float:
    """Return the largest certified `cos(m(x'), u)` at shift `a` given `<m(x), u> >= r`, or -1 if below zero (T4, T3).

    Example:
        >>> [round(vector_cos(r, a), 4) for r, a in ((0.7, 0.5), (0.9, 0.5), (0.9, 1.0))]
        [0.8846, 0.9706, 0.8471]
    """
    closed = float(cone_cos(r, a, eta=eta))
    if not float(r) >= required_norm(0.0, a, eta=eta):
        return closed
    found = largest_true(lambda c: float(r) >= required_norm(float(c), a, eta=eta), 0.0, 1.0 - 1e-9, steps=26)
    return max(float(found), closed)


# The T4 certificate as a table: microseconds instead of milliseconds, always read on the conservative side


@dataclass(frozen=True, eq=False)
class VectorTable:
    """Least norms that certify `cos(m(x'), m(x)) > cos0` on a grid of shifts and cosines, rounded up.

    A query between grid points is answered by the harder neighbour: the next larger cosine, and of the shifts the
    largest one on the grid that the norm certifies. The rows and columns never decrease, so the answer is never above
    that of the exact certificate (`vector_radius`, `vector_cos`).

    Args:
        cosines: [C] increasing, in [0, 1).
        shifts: [A] increasing, in units of sigma, starting at 0.
        norms: [C, A] least norm for each, non-decreasing along both axes.
    """

    cosines: Array
    shifts: Array
    norms: Array

    def radius(self, r: ArrayLike, cos0: float, sigma: float) -> Array:
        """Return the certified radius for lower bounds `r` of the smoothed norm (any shape); 0 is ABSTAIN.

        Example:
            >>> [round(float(v), 2) for v in vector_table().radius([0.5, 0.9], 0.5, 1.0)]
            [0.58, 1.46]
        """
        row = self._row(check_cos0(cos0))
        if row is None:
            return np.zeros(np.shape(r))
        found = np.searchsorted(row, np.asarray(r, dtype=np.float64), side="right") - 1
        clean = np.where(np.isnan(r), -1, found)
        return check_sigma(sigma) * np.where(clean >= 0, self.shifts[np.maximum(clean, 0)], 0.0)

    def cos(self, r: ArrayLike, a: float) -> Array:
        """Return the certified cosine at shift `a` (eps / sigma) for lower bounds `r`, or -1 where there is none.

        Example:
            >>> [round(float(v), 2) for v in vector_table().cos([0.05, 0.9], 0.5)]
            [-1.0, 0.97]
        """
        column = int(np.searchsorted(self.shifts, a, side="left"))
        if not a >= 0.0 or column == len(self.shifts):
            return np.full(np.shape(r), VACUOUS)
        found = np.searchsorted(self.norms[:, column], np.asarray(r, dtype=np.float64), side="right") - 1
        clean = np.where(np.isnan(r), -1, found)
        return np.where(clean >= 0, self.cosines[np.maximum(clean, 0)], VACUOUS)

    def required(self, cos0: float, a: float) -> float:
        """Return the least norm for cosine `cos0` at shift `a` (the inverse table), or inf beyond the grid.

        Use `m0 = (1 + required) / 2` as the null mean of the sequential test "certified at radius a * sigma".

        Example:
            >>> round(vector_table().required(0.5, 0.5), 3)
            0.437
        """
        row = self._row(check_cos0(cos0))
        column = int(np.searchsorted(self.shifts, a, side="left"))
        if row is None or not a >= 0.0 or column == len(self.shifts):
            return float("inf")
        return float(row[column])

    def _row(self, cos0: float) -> Array | None:
        index = int(np.searchsorted(self.cosines, cos0, side="left"))
        return None if index == len(self.cosines) else self.norms[index]


@lru_cache(maxsize=1)
def vector_table() -> VectorTable:
    """Return the shipped table (built by tools/build_t4_table.py): cosines 0..0.999, shifts 0..4.

    Example:
        >>> vector_table().norms.shape
        (102, 401)
    """
    with as_file(files("robustvlm") / "assets" / "certify" / "t4.safetensors") as path:
        stored = load_file(path)
    steps = stored["norm_steps"].astype(np.float64)  # least norm in steps of 2^-16, rounded up; 65535 is none
    norms = np.where(steps == 65535, np.inf, steps / 65536.0)
    return VectorTable(stored["cosines"], stored["shifts"], norms)


@lru_cache(maxsize=64)
def least_norm(cos0: float, a: float) -> float:
    """Return the least norm for cosine `cos0` at shift `a`: the table's, or by `required_norm` where it ends.

    Example:
        >>> round(least_norm(0.5, 0.5), 3), round(least_norm(0.9995, 0.004), 3)
        (0.437, 0.101)
    """
    found = vector_table().required(cos0, a)
    return found if np.isfinite(found) else required_norm(cos0, a)


# A direction that only looks back: lower bounds of the smoothed feature's norm without a pilot sample (T3, T4)


class PredictableDirection:
    """Scores each feature against the normalised sum of the features before it.

    Given the past, `x_i = (1 + <f_i, u_{i-1}>) / 2` has mean at most `(1 + ||m||) / 2`, so the betting wealth against
    `||m|| <= r0` is a supermartingale: no pilot, no dimension factor, valid at any time. (A direction estimated on the
    same samples it is scored on would be wrong almost always in high dimension.) Results do not depend on batching.

    Args:
        dim: feature dimension D.
        start: optional direction known before the noise is drawn (the clean feature, a pilot mean). Without it the
            first feature only sets the direction and gives no score.

    Example:
        >>> direction = PredictableDirection(2)
        >>> direction.scores([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).round(4).tolist()
        [0.5, 0.995]
    """

    def __init__(self, dim: int, *, start: ArrayLike | None = None) -> None:
        self.total = np.zeros(dim) if start is None else unit_vector(start).copy()

    def scores(self, features: ArrayLike) -> Array:
        """Return the scores of unit features [n, D], in order; rows met while there is no direction give none.

        A failed row (NaN) scores 0, the worst value, and does not move the direction.
        """
        rows = unit_rows(features)
        moves = np.nan_to_num(rows, nan=0.0)
        sums = np.cumsum(np.vstack([self.total, moves]), axis=0)
        self.total = sums[-1]
        lengths = np.linalg.norm(sums[:-1], axis=1)
        known = lengths > 1e-9
        cosines = np.einsum("nd,nd->n", rows[known], sums[:-1][known]) / lengths[known]
        return as_scores(0.5 * (1.0 + cosines)) if known.any() else np.zeros(0)


def norm_lower_bound(scores: ArrayLike, alpha: float) -> float:
    """Return a lower bound of `||m(x)||` from scores of a `PredictableDirection`, valid at any stopping time.

    Only the betting bound is offered: the scores depend on each other through the direction, and the betting wealth is
    the bound that allows this.

    Example:
        >>> round(norm_lower_bound([0.95] * 1000, 0.001), 2)
        0.88
    """
    return max(0.0, 2.0 * float(betting_lower(scores, alpha)) - 1.0)
