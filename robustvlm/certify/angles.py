"""The cosine of smoothed features from the distribution of angles and from their mean, at one alpha (T20, with T4)."""

from __future__ import annotations

from dataclasses import dataclass
from math import atan2, cos, log, pi, sin, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp, ndtri

from robustvlm.certify.certifier import as_scores, unit_rows, unit_vector
from robustvlm.certify.feature import PredictableDirection, vector_radius, vector_table
from robustvlm.certify.means import FRACTIONS, kl_lower_mean, log_gains
from robustvlm.certify.normal import Array, check_alpha, check_cos0, largest_true
from robustvlm.certify.shapes import A_MAX, eigenvalue_upper, layer_cake, sideways
from robustvlm.certify.tangent import Tangent, tangent_at
from robustvlm.errors import UserError

# T20. Let u be a fixed direction, phi = arccos <f, u> (the angle to it of a feature f of length one), and 0 < theta <=
# pi / 2. For every unit w orthogonal to u put n = -sin(theta) u + cos(theta) w. A feature of length at most one has
#
#     <f, n> = -sin(theta) <f, u> + cos(theta) <f, w> <= sin(phi - theta)        [ <f, w> <= sin(phi) ]
#
# whatever w is. So with G = (1 - sin(phi - theta)) / (1 + sin(theta)), a score in [0, 1] that depends on phi alone,
# E G(x' + noise) > 1 / (1 + sin(theta)) gives <m(x'), n> < 0 for all w at once. A vector m' at an angle of theta
# or more to u, zero included, has <m', n> >= 0 for the w in its own plane. Hence the angle is below theta.
#
# What E G does under the shift follows from the whole distribution of G at x (T5, as a mean test by T6). T4 knows the
# mean of cos(phi) alone, and must allow for features that turn away from u by just as much as their mean allows; but it
# also knows that they do not turn to one side, which T20 does not use. Neither contains the other.

TURN_SHARE = 0.05
"""Part of alpha for the angle between the pilot's direction and the smoothed feature."""

TEST_SHARE = 0.9
"""Part of alpha for the bets; what is left is for a lower bound of the smoothed feature's length."""

STEP = 0.01
"""Distance of the shifts that are tested, in sigmas."""

ON_BEST = 0.75
"""Share of the wealth on the bet that the pilot recommends; the others share the rest."""

COARSE = 0.1
"""Their distance where the pilot expects no difficulty."""


def angle_scores(cosines: ArrayLike, theta: float) -> Array:
    """Return `G = (1 - sin(phi - theta)) / (1 + sin(theta))` of cosines `cos(phi)`; NaN as 0, the worst (T20).

    Example:
        >>> angle_scores([1.0, 0.5, float("nan")], np.pi / 3).round(4).tolist()
        [1.0, 0.5359, 0.0]
    """
    y = np.clip(np.asarray(cosines, dtype=np.float64), -1.0, 1.0)
    turned = np.sqrt(1.0 - y * y) * cos(theta) - y * sin(theta)
    return as_scores((1.0 - turned) / (1.0 + sin(theta)))


def angle_target(theta: float) -> float:
    """Return the mean of `angle_scores` above which the smoothed feature's angle is below theta (T20).

    Example:
        >>> round(angle_target(np.pi / 3), 4)
        0.5359
    """
    return 1.0 / (1.0 + sin(theta))


def turn_upper(rows: Array, direction: ArrayLike, alpha: float) -> float:
    """Return an upper bound of the angle between m and a direction, from unit features [n, D] that did not choose it.

    The part of m orthogonal to the direction by Bernstein along its own direction (two thirds of alpha, `sideways`),
    its part along it by Chernoff's bound.

    Example:
        >>> rows = np.tile([[0.8, 0.6], [0.8, -0.6]], (500, 1))
        >>> round(turn_upper(rows, [1.0, 0.0], 0.003), 3)
        0.111
    """
    u = unit_vector(direction)
    across = sideways(rows, u, 2.0 * alpha / 3.0).eta
    scores = as_scores(0.5 * (1.0 + unit_rows(rows) @ u))
    along = 2.0 * float(kl_lower_mean(scores.mean(), len(scores), alpha / 3.0)) - 1.0
    return atan2(across, along) if along > 0.0 else pi


def turn_expected(pilot: Array, u: Array, n: int, alpha: float) -> float:
    """Return what `turn_upper` of n further samples will hardly exceed, judged by the pilot: a choice, no bound.

    Example:
        >>> rows = np.tile([[0.8, 0.6], [0.8, -0.6]], (50, 1))
        >>> turn_upper(np.tile(rows, (5, 1)), [1.0, 0.0], 0.003) < turn_expected(rows, np.eye(2)[0], 500, 0.003)
        True
    """
    kept = pilot[np.isfinite(pilot).all(axis=1)]
    side = kept - np.outer(kept @ u, u)
    spread = float((side**2).sum(axis=1).mean()) * len(kept) / max(1, len(kept) - 1)
    top = float(np.linalg.eigvalsh(side @ side.T if len(side) < side.shape[1] else side.T @ side)[-1]) / len(kept)
    lam, level = eigenvalue_upper(1.3 * top, n, alpha / 3.0), log(3.0 / alpha)
    across = 1.2 * sqrt(spread / len(kept) + spread / n) + sqrt(2.0 * lam * level / n) + 2.0 * level / (3.0 * n)
    return 1.1 * atan2(across, max(0.05, float((kept @ u).mean())))


@dataclass(frozen=True, eq=False)
class Bets:
    """Bets against "the claim is false at this shift": what each needs of its scores, and its share of the wealth.

    Args:
        null: of the scores along a direction (T4); one or more where there is no bet.
        tangent, nulls: of the scores of angles (T20, T6), [C] references. weights: [1 + C, F], adding up to one.
    """

    null: float
    tangent: Tangent
    nulls: Array
    weights: Array

    def log_wealth(self, along: Array, angles: Array | None) -> float:
        """Return the log of the wealth after scores [n] of both kinds; without angles, what the others have."""
        won = [_won(along, self.null)]
        if angles is not None:
            moved = self.tangent.transform(angles)[..., 0]
            won += [_won(scores, null) for scores, null in zip(moved, self.nulls, strict=True)]
        used = np.stack(won)
        return float(logsumexp(used + np.log(self.weights[: len(used)])))


def _won(scores: Array, null: float) -> Array:
    """Log wealth [F] of each bet; a null of one cannot be bet against, and its wealth stays at one."""
    return log_gains(scores, null) if null < 1.0 - 1e-9 else np.zeros(len(FRACTIONS))


class JointPilot:
    """What the pilot chooses for the joint claim: direction, angle to it, the order of shifts, and the bets at each.

    Args:
        pilot: [n0, D] unit features. cos0: cosine to keep. n: estimation samples to come. alpha: error probability.

    Attributes:
        direction: [D], or None where the pilot has none (nothing is certified then).
        turn: the angle between it and m that the estimation samples will have to confirm.
        theta: the angle to it that, with `turn`, keeps the cosine.
    """

    def __init__(self, pilot: ArrayLike, *, cos0: float, n: int, alpha: float) -> None:
        rows = unit_rows(pilot)
        self.cos0, self.n, self.alpha = check_cos0(cos0), n, check_alpha(alpha)
        mean = np.nan_to_num(rows).mean(axis=0)
        self.direction = unit_vector(mean) if np.linalg.norm(mean) > 1e-9 else None
        if self.direction is None:
            return
        angle = float(np.arccos(cos0))
        self.turn = min(turn_expected(rows, self.direction, n, TURN_SHARE * alpha), 0.9 * angle)
        self.theta = angle - self.turn
        cosines = rows @ self.direction
        self._along, self._angles = as_scores(0.5 * (1.0 + cosines)), angle_scores(cosines, self.theta)

    def bets(self, a: float) -> Bets:
        """Return the bets at a shift, most of the wealth on the one that would have won most on the pilot."""
        null = 0.5 * (1.0 + float(vector_table().required(self.cos0, a)))
        tangent = tangent_at(self._angles, a)
        nulls = np.maximum(tangent.null_mean(angle_target(self.theta))[:, 0], 1e-6)
        moved = tangent.transform(self._angles)[..., 0]
        hopes = np.stack([self._hope(self._along, null), *map(self._hope, moved, nulls)])
        weights = np.full(hopes.shape, (1.0 - ON_BEST) / hopes.size)
        weights[np.unravel_index(int(np.argmax(hopes)), hopes.shape)] += ON_BEST
        return Bets(null, tangent, nulls, weights)

    def _hope(self, scores: Array, null: float) -> Array:
        """The wealth that n samples like the pilot's and one worst sample would give; a choice, no bound."""
        if not null < 1.0 - 1e-9:
            return np.full(len(FRACTIONS), -np.inf)
        return self.n / len(scores) * _won(scores, null) + np.log1p(-np.array(FRACTIONS))

    def shifts(self) -> Array:
        """Return the shifts to be tested in this order: coarse where the pilot expects no difficulty, then fine."""
        floor = 1.0 - log(1.0 / self.alpha) / self.n
        survival = np.minimum(np.arange(len(self._angles), 0, -1) / len(self._angles), floor)
        levels = np.sort(self._angles)
        target = angle_target(self.theta)
        expected = float(largest_true(lambda a: layer_cake(levels, survival, float(a)) >= target, 0.0, A_MAX, steps=20))
        by_mean = float(vector_table().radius(2.0 * self._along.mean() - 1.0, self.cos0, 1.0))
        easy = COARSE * int(0.6 * max(expected, by_mean) / COARSE)
        return np.concatenate([np.arange(COARSE, easy, COARSE), np.arange(max(easy, STEP), A_MAX, STEP)])


class JointEvidence:
    """Scores of the estimation samples, and whether they certify the claim at a shift.

    Args:
        pilot: what was chosen beforehand. estimation: [n, D] unit features; failed ones as NaN.

    Raises:
        UserError: the samples are more or fewer than the bets were made for.
    """

    def __init__(self, pilot: JointPilot, estimation: ArrayLike) -> None:
        rows, self.pilot = unit_rows(estimation), pilot
        if len(rows) != pilot.n:
            raise UserError(f"the bets were made for {pilot.n} samples, got {len(rows)}: failed samples count as NaN")
        u = pilot.direction
        if u is None:
            return
        self._along = PredictableDirection(rows.shape[1], start=u).scores(rows)
        confirmed = turn_upper(rows, u, TURN_SHARE * pilot.alpha) <= pilot.turn
        self._angles = angle_scores(rows @ u, pilot.theta) if confirmed else None

    def holds(self, a: float) -> bool:
        """Whether the wealth against "the cosine falls below cos0 within a sigmas" is large enough."""
        if self.pilot.direction is None:
            return False
        wealth = self.pilot.bets(a).log_wealth(self._along, self._angles)
        return bool(wealth >= -log(TEST_SHARE * self.pilot.alpha))


def joint_shift(pilot: JointPilot, estimation: ArrayLike) -> float:
    """Return the largest shift at which `cos(m(x'), m(x)) >= cos0` is certified from n estimation features [n, D].

    The shifts are tested in the pilot's order, each at alpha, up to the first that fails. The claims are nested, so the
    first shift at which the claim is false decides: no correction for the number of shifts.

    Example:
        >>> rows = np.tile([[0.96, 0.28], [0.96, -0.28]], (500, 1))
        >>> round(joint_shift(JointPilot(rows[:50], cos0=0.5, n=950, alpha=0.001), rows[50:]), 2)
        2.08
    """
    evidence = JointEvidence(pilot, estimation)
    if pilot.direction is None:
        return 0.0
    reached = 0.0
    for a in pilot.shifts():
        if not evidence.holds(float(a)):
            break
        reached = float(a)
    return reached


def best_joint_shift(n: int, alpha: float, cos0: float) -> float:
    """Return a shift that n estimation samples cannot certify beyond, whatever they are.

    Example:
        >>> round(best_joint_shift(950, 0.001, 0.5), 2)
        2.35
    """
    most = check_alpha(alpha) ** (1.0 / max(1, n))  # no wealth against a greater null reaches 1 / alpha
    theta = float(np.arccos(check_cos0(cos0)))
    by_angles = float(ndtri(min(most, 1.0 - 1e-12)) - ndtri(angle_target(theta)))
    return max(0.0, by_angles, vector_radius(max(0.0, 2.0 * most - 1.0), cos0, 1.0))
