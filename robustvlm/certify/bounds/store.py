"""Calibrated local levels: a small shipped table, then a file in the user's cache folder, then the computation."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from platformdirs import user_cache_dir

from robustvlm.certify.bounds.ell import calibrate
from robustvlm.certify.normal import check_alpha
from robustvlm.core.reading import parse_json, read_text

COMPUTE_UP_TO = 20_000
"""Largest n whose level is computed on demand (about 6 s); larger bands use the fallback without calibration."""


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
    """Return the calibrated local level for `n` samples, or None when `n` is too large to calibrate on demand.

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
    if eta is not None or n > COMPUTE_UP_TO:
        return eta
    path = cache_file()
    eta = _cached(n, alpha, path)
    if eta is None:
        eta = calibrate(n, alpha)
        _remember(n, alpha, eta, path)
    return eta
