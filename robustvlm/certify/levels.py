"""Several noise levels for one image, at one alpha: which of them certifies is chosen by a pilot, or after (T27)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from robustvlm.certify.bands import ell_band
from robustvlm.certify.certifier import mean_feature, unit_rows
from robustvlm.certify.classes import class_margin_radius, vote_radius
from robustvlm.certify.normal import Array, check_alpha, check_sigma
from robustvlm.errors import UserError

# T27. Let a model hold s rules of its own, smoothed at s noise levels, and answer a class where every one of them,
# asked with fresh copies, answers that class; else nothing. If at *some* level the rule is certified to answer no class
# but y within R of x, the model answers no class but y there: another answer would need that level's. So any of the
# levels may certify, and the radius is the largest.
#
# At one alpha: (union) the level is chosen after all samples were seen, with alpha / s for each; or (pilot) it is
# chosen by a few copies of each level, and fresh ones of that level alone certify it at alpha. Given the pilot, the
# claim is fixed before its noise is drawn, so nothing is paid for the choice but the copies of the pilot.

ABSTAIN = -1

_HOPE = 0.3
"""Error probability at which the pilot's copies are judged to compare levels: a choice, no bound."""

Spend = Literal["pilot", "union"]
Draw = Callable[[float, int], ArrayLike]
"""Returns so many unit features [n, D] of copies at a noise level, from fresh noise on every call."""


@dataclass(frozen=True)
class LevelFinding:
    """The certificate of one image: level, class and radius (0 and ABSTAIN where nothing is certified), and its cost.

    Attributes:
        label: certified class. copies: of all levels, the pilot's among them.
    """

    sigma: float
    label: int
    radius: float
    copies: int


def certify_levels(
    draw: Draw,
    text: ArrayLike,
    sigmas: Sequence[float],
    *,
    n: int,
    n_pilot: int,
    alpha: float,
    votes: bool = True,
    spend: Spend = "pilot",
) -> LevelFinding:
    """Return the largest radius that one of several noise levels certifies, at one alpha for all of them (T27).

    Args:
        text: class embeddings [K, D]. n: copies of all levels together. n_pilot: those of each level that choose.
        votes: of rules by vote (Cohen et al. 2019); else by the mean feature. spend: how the level is chosen.

    Raises:
        UserError: the copies do not go round, or levels that are not positive.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> rows = lambda sigma, n: np.where(rng.random((n, 1)) < sigma * sigma, [[0.0, 1.0]], [[1.0, 0.0]])
        >>> found = certify_levels(rows, np.eye(2), [0.1, 0.4], n=1000, n_pilot=50, alpha=0.001)
        >>> found.sigma, found.label, round(found.radius, 2)
        (0.4, 0, 0.38)
    """
    levels = [check_sigma(sigma) for sigma in sigmas]
    check_alpha(alpha)
    left = n - len(levels) * n_pilot
    if not levels or n_pilot < 1 or left < (1 if spend == "pilot" else len(levels)):
        raise UserError(
            f"{n} copies do not go round {len(levels)} noise levels with {n_pilot} each to choose: pass more, or fewer "
            "levels"
        )
    t = np.asarray(text, dtype=np.float64)
    pilots = {sigma: unit_rows(draw(sigma, n_pilot)) for sigma in levels}
    labels = {sigma: _label(rows, t, votes) for sigma, rows in pilots.items()}
    if spend == "pilot":
        chosen = choose_level(pilots, t, votes=votes)
        radius = _radius(unit_rows(draw(chosen, left)), t, labels[chosen], chosen, alpha, votes)
        return _finding(chosen, labels[chosen], radius, n)
    each = left // len(levels)
    radii = {
        sigma: _radius(unit_rows(draw(sigma, each)), t, labels[sigma], sigma, alpha / len(levels), votes)
        for sigma in levels
    }
    best = max(radii, key=lambda sigma: radii[sigma])
    return _finding(best, labels[best], radii[best], len(levels) * (n_pilot + each))


def _finding(sigma: float, label: int, radius: float, copies: int) -> LevelFinding:
    return LevelFinding(sigma, label if radius > 0.0 else ABSTAIN, radius, copies)


def choose_level(pilots: Mapping[float, Array], text: Array, *, votes: bool) -> float:
    """Return the level whose pilot [n, D] would certify most at a lax error probability: any choice is sound.

    Example:
        >>> sure, unsure = np.tile([[1.0, 0.0]], (50, 1)), np.tile([[1.0, 0.0], [0.0, 1.0]], (25, 1))
        >>> choose_level({0.1: sure, 0.4: unsure}, np.eye(2), votes=True)
        0.1
    """
    hopes = {
        sigma: _radius(rows, text, _label(rows, text, votes), sigma, _HOPE, votes) for sigma, rows in pilots.items()
    }
    return max(hopes, key=lambda sigma: hopes[sigma])


def _label(rows: Array, text: Array, votes: bool) -> int:
    if not votes:
        return int(np.argmax(mean_feature(rows)[0] @ text.T))
    return int(np.bincount(_votes(rows, text), minlength=len(text) + 1)[:-1].argmax())


def _votes(rows: Array, text: Array) -> npt.NDArray[np.int64]:
    """Return the class of each feature, K (a vote for none) where it failed or two classes tie."""
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    near = np.where(finite[:, None], rows, 0.0) @ text.T
    alone = (near == near.max(axis=1, keepdims=True)).sum(axis=1) == 1
    return np.where(finite & alone, near.argmax(axis=1), len(text)).astype(np.int64)


def _radius(rows: Array, text: Array, label: int, sigma: float, alpha: float, votes: bool) -> float:
    if votes:
        return vote_radius(int((_votes(rows, text) == label).sum()), len(rows), sigma, alpha)
    return class_margin_radius(rows, text, label, sigma, ell_band(len(rows), alpha))


def unanimous(answers: ArrayLike) -> npt.NDArray[np.int64]:
    """Return the class that all levels answer, ABSTAIN (-1) where they do not: answers [s, N] of s levels (T27).

    Example:
        >>> unanimous([[0, 1, 2, -1], [0, 2, 2, -1], [0, 1, -1, -1]]).tolist()
        [0, -1, -1, -1]
    """
    said = np.asarray(answers, dtype=np.int64)
    if said.ndim != 2 or not len(said):
        raise UserError(f"expected the answers [s, N] of at least one noise level, got shape {list(said.shape)}")
    return np.where((said == said[0]).all(axis=0), said[0], ABSTAIN)
