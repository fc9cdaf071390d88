"""The published program of Cohen et al. 2019 (github.com/locuslab/smoothing) beside ours: loaded from a copy, as it is.

It is not part of this project. Two things it counts on are lent to its module alone: `scipy.stats.binom_test`, which
newer releases of scipy no longer have, and the device "cuda", in whose place the noise is drawn where the model is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn

from robustvlm.errors import UserError

REPOSITORY = "https://github.com/locuslab/smoothing"


class _TorchThere:
    """The module `torch`, but that noise is drawn on the device of what it is added to."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def randn_like(batch: Tensor, device: object = None) -> Tensor:
        del device
        return torch.randn_like(batch)


def _binom_test(count: int, n: int, p: float = 0.5) -> float:
    # 0 votes of 0 decide nothing; the function that was removed gave 1 as well.
    return 1.0 if n < 1 else float(scipy.stats.binomtest(int(count), int(n), p).pvalue)


def load_published(place: Path) -> ModuleType:
    """Return the module `core` of a copy of the repository: its root, its folder `code`, or the file.

    Raises:
        UserError: there is no such file, or it does not hold their class `Smooth`.
    """
    tried = [place, place / "core.py", place / "code" / "core.py"]
    file = next((path for path in tried if path.is_file()), None)
    if file is None:
        raise UserError(f"'{place}' holds no code/core.py: clone {REPOSITORY} and pass its folder")
    spec = importlib.util.spec_from_file_location("published_smoothing", file)
    if spec is None or spec.loader is None:
        raise UserError(f"'{file}' is no Python file: clone {REPOSITORY} and pass its folder")
    module, lent = importlib.util.module_from_spec(spec), not hasattr(scipy.stats, "binom_test")
    if lent:
        scipy.stats.binom_test = _binom_test
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leaves their folder as it is
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"their program needs another package ({error}): pip install statsmodels") from error
    finally:
        sys.dont_write_bytecode = written
        if lent:
            del scipy.stats.binom_test
    if not hasattr(module, "Smooth"):
        raise UserError(f"'{file}' has no class Smooth: clone {REPOSITORY} and pass its folder")
    module.torch = _TorchThere()  # type: ignore[attr-defined]
    return module


class _Base(nn.Module):
    """Pixels at the model's resolution to logits, with the rows counted that pass."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits, self.rows = logits, 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.rows += len(pixels)
        return self.logits(pixels)


@dataclass
class Published:
    """Their smoothed classifier on a model of ours, with the votes that it counts kept.

    Args:
        module: of `load_published`. logits: from noisy pixels [R, 3, S, S] to logits [R, K]; nothing is clipped.
        classes: K. batch: noisy images in a pass.
    """

    module: ModuleType
    logits: Callable[[Tensor], Tensor]
    classes: int
    sigma: float
    batch: int = 128
    counts: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base = _Base(self.logits)
        self.smooth = self.module.Smooth(self.base, self.classes, self.sigma)
        count = self.smooth._sample_noise

        def kept(*given: Any) -> np.ndarray:
            self.counts.append(count(*given))
            return self.counts[-1]

        self.smooth._sample_noise = kept

    @property
    def passes(self) -> int:
        """Rows through the model so far."""
        return self.base.rows

    def certify(self, pixels: Tensor, n0: int, n: int, alpha: float) -> tuple[int, float, int]:
        """Return what their CERTIFY says of an image [3, S, S]: class or -1, radius; and the votes for it, of n."""
        self.counts.clear()
        label, radius = self.smooth.certify(pixels, n0, n, alpha, self.batch)
        selection, estimation = self.counts
        return int(label), float(radius), int(estimation[int(selection.argmax())])

    def predict(self, pixels: Tensor, n: int, alpha: float) -> tuple[int, np.ndarray]:
        """Return what their PREDICT says of an image: class or -1; and the votes [K] that it saw."""
        self.counts.clear()
        said = self.smooth.predict(pixels, n, alpha, self.batch)
        return int(said), self.counts[-1]
