"""Is a cosine of smoothed features certified at one radius? Angles and mean tested sample by sample (T26, T20, T4)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from robustvlm.certify.angles import (
    ON_BEST,
    TEST_SHARE,
    TURN_SHARE,
    angle_scores,
    angle_target,
    turn_expected,
    turn_upper,
)
from robustvlm.certify.certifier import as_scores, unit_rows, unit_vector
from robustvlm.certify.feature import PredictableDirection, vector_table
from robustvlm.certify.means import FRACTIONS, Decision, log_gains
from robustvlm.certify.noise import CHUNK
from robustvlm.certify.normal import Array, check_alpha, check_cos0, check_shift
from robustvlm.certify.tangent import Tangent, tangent_at

# T26. The bets of T20 at one shift are supermartingales in the number of samples, so they may be looked at after every
# chunk (Ville). What is not is the bound of the angle gamma between u and m(x), which is for a number of samples that
# was fixed beforehand. It is looked at after 32, 64, 128, ... samples, with half of what is left of its part of alpha
# each time: all looks together fail with probability at most alpha / 20. Once it has confirmed gamma, the wealth of the
# angles counts, from the first sample on; before, the others have less wealth, pathwise.

FUTILITY = 0.01


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the pilot chose: the angle to confirm, after how many samples, and the bets that it leads to."""

    turn: float
    theta: float
    tangent: Tangent
    nulls: Array
    weights: Array
    needed: float


def look_share(look: int) -> float:
    """Return the part of its alpha that the look number 0, 1, ... at the pilot's direction may use.

    Example:
        >>> sum(look_share(look) for look in range(20)) < 1.0
        True
    """
    return 0.5 ** (look + 1)


def looks_of(n: int) -> list[int]:
    """Return after how many of n samples the angle to the pilot's direction is looked at.

    Example:
        >>> looks_of(300)
        [32, 64, 128, 256]
    """
    return [CHUNK * 2**k for k in range(64) if CHUNK * 2**k <= n]


class JointTest:
    """Anytime-valid test of `cos(m(x'), m(x)) >= cos0` for all x' within `a` sigmas, by angles and mean (T26).

    Args:
        pilot: [n0, D] unit features that choose direction, angle and bets. n: most samples to come.

    Attributes:
        decision: "open", "certified" or "futile" (which costs power, never soundness).
        n: samples seen. confirmed: whether the angle to the pilot's direction is bounded by now.

    Example:
        >>> rows = np.tile([[0.96, 0.28], [0.96, -0.28]], (500, 1))
        >>> test = JointTest(rows[:50], cos0=0.5, a=1.0, n=950, alpha=0.001)
        >>> while test.decision == "open":
        ...     decision = test.update(rows[50 + test.n : 82 + test.n])
        >>> decision, test.n
        ('certified', 96)
    """

    def __init__(self, pilot: ArrayLike, *, cos0: float, a: float, n: int, alpha: float) -> None:
        rows = unit_rows(pilot)
        self.cos0, self.a, self.alpha = check_cos0(cos0), check_shift(a), check_alpha(alpha)
        self.n, self.confirmed = 0, False
        self.scores: list[Array] = []
        self.decision: Decision = "open"
        mean = np.nan_to_num(rows).mean(axis=0)
        if not np.linalg.norm(mean) > 1e-9:
            self.decision = "futile"
            return
        self._u = unit_vector(mean)
        self._looks = looks_of(n)
        self._null = 0.5 * (1.0 + float(vector_table().required(cos0, a)))
        self._plan = self._best_plan(rows)
        self._direction = PredictableDirection(rows.shape[1], start=self._u)
        self._rows: list[Array] = []
        self._won = np.zeros((1 + len(self._plan.nulls), len(FRACTIONS)))
        self._lost = np.zeros_like(self._won)
        self._conclude()

    def _best_plan(self, rows: Array) -> _Plan:
        """Return the plan that will want the fewest samples, judged by the pilot: any choice is sound."""
        plans = [self._plan_for(rows, look, count) for look, count in enumerate(self._looks or [CHUNK])]
        return min(plans, key=lambda plan: plan.needed)

    def _plan_for(self, rows: Array, look: int, count: int) -> _Plan:
        angle = float(np.arccos(self.cos0))
        expected = turn_expected(rows, self._u, count, TURN_SHARE * self.alpha * look_share(look))
        turn = min(expected, 0.9 * angle)
        cosines = rows @ self._u
        angles = angle_scores(cosines, angle - turn)
        tangent = tangent_at(angles, self.a)
        nulls = np.maximum(tangent.null_mean(angle_target(angle - turn))[:, 0], 1e-6)
        along, moved = as_scores(0.5 * (1.0 + cosines)), tangent.transform(angles)[..., 0]
        needed = np.stack([self._needed(along, self._null), *map(self._needed, moved, nulls)])
        # A bet on angles waits for its angle; where that was cut short, it may wait in vain.
        needed[1:] = np.inf if turn < expected else np.maximum(needed[1:], count)
        weights = np.full(needed.shape, (1.0 - ON_BEST) / needed.size)
        best = np.unravel_index(int(np.argmin(needed)), needed.shape)
        weights[best] += ON_BEST
        return _Plan(turn, angle - turn, tangent, nulls, weights, float(needed[best]))

    def _needed(self, scores: Array, null: float) -> Array:
        """Samples [F] like the pilot's, one worst one among them, until the wealth is there; a choice, no bound."""
        each = _gains(scores, null) / len(scores)
        wanted = -log(ON_BEST * TEST_SHARE * self.alpha) - np.log1p(-np.array(FRACTIONS))
        return np.where(each > 0.0, wanted / np.maximum(each, 1e-300), np.inf)

    def update(self, features: ArrayLike) -> Decision:
        """Add unit features [n, D] of the estimation stream, failed ones as NaN, and return the decision."""
        rows, start = unit_rows(features), 0
        while start < len(rows) and self.decision == "open":
            # No step goes past a look at the angle.
            count = next((look for look in self._looks if look > self.n), self.n + len(rows)) - self.n
            self._step(rows[start : start + count])
            start += count
        return self.decision

    def _step(self, rows: Array) -> None:
        along = self._direction.scores(rows)
        angles = angle_scores(rows @ self._u, self._plan.theta)
        moved = self._plan.tangent.transform(angles)[..., 0]
        self._won += np.stack([_gains(along, self._null), *map(_gains, moved, self._plan.nulls)])
        against = map(_gains, 1.0 - moved, 1.0 - self._plan.nulls)
        self._lost += np.stack([_gains(1.0 - along, 1.0 - self._null), *against])
        self.scores.append(along)
        self.n += len(rows)
        if not self.confirmed:
            self._rows.append(rows)
            if self.n in self._looks:
                level = TURN_SHARE * self.alpha * look_share(self._looks.index(self.n))
                self.confirmed = turn_upper(np.concatenate(self._rows), self._u, level) <= self._plan.turn
        self._conclude()

    @property
    def log_wealth(self) -> float:
        """The current log wealth against the claim; without the angles where these are not confirmed."""
        used = self._won if self.confirmed else self._won[:1]
        return float(logsumexp(used + np.log(self._plan.weights[: len(used)])))

    def _conclude(self) -> None:
        if self.log_wealth >= -log(TEST_SHARE * self.alpha):
            self.decision = "certified"
            return
        possible = np.append(self._null, self._plan.nulls) < 1.0 - 1e-9
        doubted = logsumexp(self._lost, axis=1) - log(len(FRACTIONS)) >= log(1.0 / FUTILITY)
        waits_in_vain = not self.confirmed and not any(look > self.n for look in self._looks)
        hopeless = doubted | ~possible
        if hopeless[0] and (hopeless.all() or waits_in_vain):
            self.decision = "futile"


def _gains(scores: Array, null: float) -> Array:
    """Log wealth [F]; a null outside (0, 1) cannot be bet against, and its wealth stays at one."""
    return log_gains(scores, null) if 1e-9 < null < 1.0 - 1e-9 else np.zeros(len(FRACTIONS))
