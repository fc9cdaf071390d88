"""The von Mises-Fisher distribution on the unit sphere: its log-normaliser, and how concentrated data are."""

from __future__ import annotations

from functools import cache
from math import lgamma, log, pi

import numpy as np
import numpy.typing as npt
from numpy.polynomial import Polynomial
from numpy.typing import ArrayLike
from scipy.special import ive

from robustvlm.errors import UserError

Array = npt.NDArray[np.float64]

# Below this order SciPy's scaled Bessel function neither overflows nor underflows for kappa from 1e-8 on; from it on,
# Debye's expansion with the terms kept is exact to about 1e-13.
_LARGE_ORDER = 20.0
_TERMS = 9
_NEXT_TO_ZERO = 1e-8


def log_normaliser(kappa: ArrayLike, dim: int) -> Array:
    """Return log C_D(kappa), the log-density of vMF(mu, kappa) being log C_D(kappa) + kappa <mu, z> on S^{D-1}.

    C_D(kappa) = kappa^v / ((2 pi)^{D/2} I_v(kappa)) with v = D/2 - 1. For large orders I_v comes from Debye's uniform
    asymptotic expansion (NIST DLMF 10.41.3), in which the powers of kappa cancel on paper instead of in the computer.

    Args:
        kappa: concentrations >= 0, any shape. dim: D >= 2.

    Raises:
        UserError: a negative concentration, or fewer than two dimensions.

    Example:
        >>> log_normaliser([0.0, 10.0, 1e6], 512).round(3).tolist()
        [867.968, 867.87, -996939.682]
    """
    values = np.asarray(kappa, dtype=np.float64)
    if dim < 2:
        raise UserError(f"directions need at least 2 dimensions, got {dim}")
    if not (values >= 0.0).all():
        raise UserError("concentrations must not be negative")
    order = 0.5 * dim - 1.0
    if order >= _LARGE_ORDER:
        return _by_debye(values, order, dim)
    safe = np.maximum(values, _NEXT_TO_ZERO)
    direct = order * np.log(safe) - 0.5 * dim * log(2 * pi) - np.log(ive(order, safe)) - safe
    uniform = lgamma(0.5 * dim) - log(2.0) - 0.5 * dim * log(pi)
    return np.asarray(np.where(values < _NEXT_TO_ZERO, uniform, direct))


def _by_debye(kappa: Array, order: float, dim: int) -> Array:
    """I_v(v x) ~ e^{v eta} / (sqrt(2 pi v) (1 + x^2)^{1/4}) sum_k u_k(t) / v^k, eta = 1/t + log(x t / (1 + t))."""
    root = np.hypot(1.0, kappa / order)  # 1 / t
    series = sum(u(1.0 / root) / order**k for k, u in enumerate(_debye_polynomials()))
    # v log(kappa) - v eta, without the log(x) that both hold:
    powers = order * (log(order) + np.log1p(root) - root)
    return np.asarray(
        powers + 0.5 * log(2 * pi * order) + 0.5 * np.log(root) - np.log(series) - 0.5 * dim * log(2 * pi)
    )


@cache
def _debye_polynomials() -> tuple[Polynomial, ...]:
    """u_0 = 1, u_{k+1}(t) = t^2 (1 - t^2) u_k'(t) / 2 + int_0^t (1 - 5 s^2) u_k(s) ds / 8 (DLMF 10.41.9)."""
    found = [Polynomial([1.0])]
    for _ in range(_TERMS - 1):
        u = found[-1]
        found.append(Polynomial([0, 0, 0.5, 0, -0.5]) * u.deriv() + (Polynomial([1, 0, -5]) * u).integ() / 8)
    return tuple(found)


def concentration(resultant: ArrayLike, dim: int) -> Array:
    """Return the usual estimate of kappa from r = ||mean of unit vectors||: r (D - r^2) / (1 - r^2).

    Source: Banerjee et al., JMLR 6 (2005), eq. 4.4.

    Raises:
        UserError: r outside [0, 1).

    Example:
        >>> concentration([0.0, 0.5], 3).round(3).tolist()
        [0.0, 1.833]
    """
    r = np.asarray(resultant, dtype=np.float64)
    if not ((r >= 0.0) & (r < 1.0)).all():
        raise UserError("mean resultant lengths lie in [0, 1): equal features have no finite concentration")
    return np.asarray(r * (dim - r * r) / (1.0 - r * r))


def mean_resultant(length: float, count: int) -> float:
    """Return the resultant length without the bias of few vectors: sqrt((n r^2 - 1) / (n - 1)), at least 0.

    The mean of n independent unit vectors has E r^2 = rho^2 + (1 - rho^2) / n: one image alone would look infinitely
    concentrated (our reading; for many images it is r itself).

    Raises:
        UserError: fewer than two vectors.

    Example:
        >>> round(mean_resultant(0.8, 4), 3), round(mean_resultant(0.8, 10**6), 3)
        (0.721, 0.8)
    """
    if count < 2:
        raise UserError(f"a concentration needs at least 2 images, got {count}")
    return float(np.sqrt(max(0.0, (count * length * length - 1.0) / (count - 1.0))))
