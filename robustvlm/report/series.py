"""The per-image numbers behind the histograms, taken from the result rows."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from robustvlm.runs.verdicts import Rows, columns


@dataclass(frozen=True)
class Margins:
    """Logit margins (true class minus best other) of the images that were right when clean, pairwise."""

    clean: tuple[float, ...]
    attacked: tuple[float, ...]


def margins(rows: Rows, eps: float) -> Margins:
    """Return each image's margin unperturbed and its smallest under any attack inside the ball of size `eps`.

    Example:
        >>> row = {"image_id": "a", "eps": 0.1, "outcome": "fooled", "clean_margin": 2.0, "margin": -0.5}
        >>> margins([row], 0.1)
        Margins(clean=(2.0,), attacked=(-0.5,))
    """
    clean: dict[str, float] = {}
    worst: dict[str, float] = {}
    for image_id, radius, outcome, before, after in columns(
        rows, "image_id", "eps", "outcome", "clean_margin", "margin"
    ):
        if radius > eps or outcome not in ("fooled", "robust") or not (_finite(before) and _finite(after)):
            continue
        clean[image_id] = before
        worst[image_id] = min(after, worst.get(image_id, after))
    return Margins(tuple(clean.values()), tuple(worst.values()))


def steps_to_success(rows: Rows) -> dict[float, list[int]]:
    """Return, per eps, the gradient steps of each attack that fooled an image.

    Example:
        >>> steps_to_success([{"eps": 0.1, "outcome": "fooled", "steps": 3}])
        {0.1: [3]}
    """
    steps: dict[float, list[int]] = defaultdict(list)
    for eps, outcome, taken in columns(rows, "eps", "outcome", "steps"):
        if outcome == "fooled":
            steps[eps].append(taken)
    return dict(sorted(steps.items()))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
