"""Feature-cosine smoothing bound (T1): a lower bound of the smoothed feature along one fixed direction."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from robustvlm.certify.normal import Array, check_cos0, check_sigma, shift_down

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
