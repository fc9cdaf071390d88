"""Simultaneous lower bounds for a survival function: bands over the order statistics, calibrated exactly."""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
from platformdirs import user_cache_dir
from scipy.special import gammaln

from robustvlm.certify.normal import Array, beta_quantile, check_alpha
from robustvlm.core.files import parse_json, read_text
from robustvlm.errors import UserError

# Equal-local-levels (Berk-Jones type) calibration: the exact crossing probability of the order-statistics band

_NEGLIGIBLE = 1e-22  # terms dropped below this size only make the crossing probability larger


def order_quantiles(n: int, eta: float) -> Array:
    """Return `b_j = BetaQuantile(eta; j, n - j + 1)`, j = 1..n: each uniform order statistic is below with prob eta.

    Example:
        >>> [round(float(b), 4) for b in order_quantiles(2, 0.05)]
        [0.0253, 0.2236]
    """
    ranks = np.arange(1.0, n + 1.0)
    return beta_quantile(eta, ranks, n - ranks + 1.0)


def crossing_prob(n: int, eta: float) -> float:
    """Return P(some of n uniform order statistics lies below its `order_quantiles(n, eta)`), exactly.

    The empirical count at the boundary points is followed as a Poisson process conditioned to end at n (only positive
    terms are added, so nothing cancels); it crosses when at least j points lie below b_j. Source: the one-sided case of
    Moscovich and Nadler, Stat. Probab. Lett. 2017.

    Example:
        >>> round(crossing_prob(1, 0.05), 12)
        0.05
        >>> round(crossing_prob(1000, 1.4314e-5), 6)
        0.001
    """
    bounds = order_quantiles(n, eta)
    rates = n * np.diff(bounds, prepend=0.0, append=1.0)
    mass, first = np.ones(1), 0  # mass[k]: P(count = first + k, no crossing yet)
    for j, kernel in enumerate(_poisson_kernels(rates[:n])):
        mass = np.convolve(mass, kernel)[: j + 1 - first]
        skip = int(np.argmax(mass > _NEGLIGIBLE))
        mass, first = mass[skip:], first + skip
    missing = n - np.arange(first, first + len(mass))
    last = -rates[n] + missing * log(rates[n]) - gammaln(missing + 1.0)
    total = -n + n * log(n) - gammaln(n + 1.0)
    return float(1.0 - mass @ np.exp(last - total))


def _poisson_kernels(rates: Array) -> list[Array]:
    """Poisson probabilities for each rate, cut where they become negligible."""
    counts = np.arange(int(np.max(rates) + 12.0 * np.sqrt(np.max(rates)) + 40.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = counts * np.log(rates[:, None])
    logs[:, 0] = 0.0
    table = np.exp(logs - rates[:, None] - gammaln(counts + 1.0))
    lengths = len(counts) - np.argmax(table[:, ::-1] > _NEGLIGIBLE, axis=1)
    return [row[:length] for row, length in zip(table, lengths, strict=True)]


def calibrate(n: int, alpha: float, *, tolerance: float = 1e-5) -> float:
    """Return the local level eta whose crossing probability is at most, and within `tolerance` of, `alpha`.

    The returned level is one whose crossing probability was computed and found to be at most alpha. Takes about eight
    evaluations of `crossing_prob` (2 s at n = 10,000).

    Raises:
        UserError: n is not positive or alpha not in (0, 1).

    Example:
        >>> round(calibrate(100, 0.05), 6)
        0.002461
    """
    if n < 1:
        raise UserError(f"a band needs at least one sample, got n = {n}")
    target = log(check_alpha(alpha)) - 0.5 * tolerance
    low, high = log(alpha / n), log(alpha)  # union bound below, a single crossing above: both are certain
    f_low = log(max(crossing_prob(n, exp(low)), 1e-300)) - target
    f_high = log(crossing_prob(n, exp(high))) - target
    while f_low < -0.5 * tolerance and high - low > 1e-9:
        share = f_low / (f_low - f_high)  # log against log the curve is nearly straight
        middle = low + (high - low) * min(max(share, 1e-3), 1.0 - 1e-3)
        f_middle = log(max(crossing_prob(n, exp(middle)), 1e-300)) - target
        if f_middle <= 0.4 * tolerance:
            low, f_low = middle, f_middle
        else:
            high, f_high = middle, f_middle
    return exp(low)


# Calibrated local levels: a small shipped table, then a file in the user's cache folder, then the computation

COMPUTE_UP_TO = 20_000
"""Largest n whose level is computed on demand (about 6 s); larger bands use the fallback without calibration."""

LEAST_LEVEL = 1e-6
"""Least alpha that is calibrated: of a smaller one, one minus the probability of no crossing keeps too few digits."""


def cache_file() -> Path:
    """Return where computed levels are kept.

    Example:
        >>> cache_file().name
        'ell-levels.json'
    """
    return Path(user_cache_dir("robustvlm", appauthor=False)) / "ell-levels.json"


def _key(n: int, alpha: float) -> str:
    return f"{n}:{alpha!r}"


def _seal(key: str, eta: float) -> str:
    return hashlib.blake2b(f"ell-1:{key}:{eta!r}".encode(), digest_size=12).hexdigest()


@lru_cache(maxsize=1)
def shipped_levels() -> dict[str, float]:
    """Return the shipped table, keys "n:alpha" (built by tools/build_ell_table.py).

    Example:
        >>> round(shipped_levels()["1000:0.001"] * 1e5, 3)
        1.432
    """
    text = (files("robustvlm") / "assets" / "certify" / "ell.json").read_text(encoding="utf-8")
    return {str(key): float(value) for key, value in json.loads(text).items()}


def _read_cache(path: Path) -> dict[str, list[object]]:
    try:
        entries = parse_json(read_text(path))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _cached(n: int, alpha: float, path: Path) -> float | None:
    """The cached level, or None if it is absent, damaged or outside what any calibration can give."""
    key = _key(n, alpha)
    match _read_cache(path).get(key):
        case [float(eta), str(seal)] if seal == _seal(key, eta) and alpha / n <= eta * (1.0 + 1e-9) <= alpha * 1.01:
            return eta
    return None


def _remember(n: int, alpha: float, eta: float, path: Path) -> None:
    """Write through a temporary file in the same folder; a cache that cannot be written is no error."""
    key = _key(n, alpha)
    entries = {**_read_cache(path), key: [eta, _seal(key, eta)]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(entries, stream, indent=0, sort_keys=True)
        os.replace(name, path)
    except OSError:
        return


@lru_cache(maxsize=256)
def local_level(n: int, alpha: float) -> float | None:
    """Return the calibrated local level for `n` samples, or None when `n` is too large, or `alpha` too small.

    A cached value is used only if its seal and its certain limits `alpha/n <= eta <= alpha` hold; a damaged or
    foreign cache entry is computed anew.

    Example:
        >>> round(local_level(1000, 0.001) * 1e5, 3)
        1.432
        >>> local_level(10**7, 0.001) is None
        True
    """
    alpha = check_alpha(alpha)
    eta = shipped_levels().get(_key(n, alpha))
    if eta is not None or n > COMPUTE_UP_TO or alpha < LEAST_LEVEL:
        return eta
    path = cache_file()
    eta = _cached(n, alpha, path)
    if eta is None:
        eta = calibrate(n, alpha)
        _remember(n, alpha, eta, path)
    return eta


# Simultaneous lower bounds for the survival function at the order statistics of a sample of known size


@dataclass(frozen=True, eq=False)
class Band:
    """Numbers `lower[i]` with `lower[i] <= P(g >= g_(i+1))` for all i at once, with probability at least 1 - alpha.

    `g_(1) <= ... <= g_(n)` are the sorted scores. The band depends on n and alpha only: it is made before the data,
    and the functions that use it refuse a sample of another size.
    """

    lower: Array
    alpha: float
    name: str

    @property
    def n(self) -> int:
        """The number of samples the band was made for."""
        return len(self.lower)


def _check_n(n: int) -> int:
    if n < 1:
        raise UserError(f"a band needs at least one sample, got n = {n}")
    return int(n)


def dkw_band(n: int, alpha: float) -> Band:
    """Return the one-sided Dvoretzky-Kiefer-Wolfowitz band (Massart 1990; needs alpha <= 1/2).

    Raises:
        UserError: alpha is above 1/2, where the one-sided inequality does not hold.

    Example:
        >>> round(float(dkw_band(10_000, 0.001).lower[0]), 6)
        0.981415
    """
    if check_alpha(alpha) > 0.5:
        raise UserError(f"the one-sided DKW band needs alpha <= 0.5, got {alpha}")
    survival = np.arange(_check_n(n), 0, -1) / n
    return Band(np.maximum(0.0, survival - sqrt(log(1.0 / alpha) / (2 * n))), alpha, "dkw")


def index_band(n: int, alpha: float, *, points: int = 128) -> Band:
    """Return a band without calibration: exact binomial bounds at a few order statistics, each at `alpha / points`.

    Between the chosen ranks the bound of the next higher rank is used, because the survival function decreases. The
    union bound over the fixed ranks makes it valid for every n; it is the fallback when n is too large to calibrate.

    Example:
        >>> round(float(index_band(10_000, 0.001).lower[0]), 5)
        0.99884
    """
    half = np.geomspace(1, max(1, _check_n(n) // 2), max(1, points // 2))
    ranks = np.unique(np.concatenate([np.floor(half), n + 1 - np.floor(half)]).astype(np.int64))
    values = beta_quantile(check_alpha(alpha) / len(ranks), n - ranks + 1.0, ranks)
    following = np.searchsorted(ranks, np.arange(1, n + 1))  # the first chosen rank that is not below i
    return Band(np.asarray(values[following]), alpha, "index")


def ell_band(n: int, alpha: float) -> Band:
    """Return the equal-local-levels (Berk-Jones) band, or `index_band` where that is not calibrated.

    Every order statistic gets the same local level, calibrated so that the chance of any crossing is alpha exactly
    for continuous scores and smaller otherwise. Narrow in the tails, where a Gaussian shift looks.

    Example:
        >>> band = ell_band(10_000, 0.001)
        >>> band.name, round(float(band.lower[0]), 5)
        ('ell', 0.99884)
    """
    level = local_level(_check_n(n), check_alpha(alpha))
    if level is None:
        return index_band(n, alpha)
    return Band(order_quantiles(n, level)[::-1], alpha, "ell")
