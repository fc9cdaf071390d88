"""The T4 certificate as a table: microseconds instead of milliseconds, always read on the conservative side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import load_file

from robustvlm.certify.fcsb import VACUOUS
from robustvlm.certify.normal import Array, check_cos0, check_sigma


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
