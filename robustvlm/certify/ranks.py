"""When a class stays among the k with the most votes: the bound in shares of votes, and bets on it copy by copy."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from robustvlm.certify.means import FRACTIONS, mix
from robustvlm.certify.normal import Array, largest_true
from robustvlm.certify.shapes import A_MAX

# The k classes with the most votes (the question of Jia et al., ICLR 2020, arXiv 1912.09899; the bound is another).
#
# Let p_j be the share of noisy copies of x that are put into class j, p'_j that at x', and y a class that does not
# depend on the estimation samples. y is among the k classes with the most votes at x' if for every set G of k rivals
# some rival in G has p'_j < p'_y. Let T be a part of G with t classes, chosen by the pilot alone. Then
#
#     t p'_y > sum of p'_j over T      (*)
#
# suffices, as not all of T can have p'_j >= p'_y. The score g = t 1[copy in y] - 1[copy in T] has the values -1, 0 and
# t, so that (*) is E g(x' + noise) > 0, and by T0 for each of its level sets (T5), with s the share of T at x,
#
#     E g(x' + noise) >= -1 + Phi(Phi^-1(1 - s) - a) + t Phi(Phi^-1(p_y) - a).
#
# p_y is bounded from below and s from above by Clopper and Pearson at alpha / 2 each: a level-alpha radius for one G.
# The claim is about the least of those over all G, a fixed family, so that the least bound needs no correction (T8).
#
# Which T: order the rivals by their pilot votes, and let T(G) be the t last of G. Then T(G) never holds one of the
# first k - t rivals, and every t of the others are T(G) of some G. The radius falls in the votes of T, so the least is
# that of the t rivals with the most estimation votes among those behind the first k - t. The pilot also chooses t.


def rank_shift(least: float, rivals: float, t: int) -> float:
    """Return the largest shift a at which t p'_y exceeds the share of t rivals, p_y >= least and s <= rivals; or 0.

    Example:
        >>> round(rank_shift(0.6, 0.1, 1), 4), rank_shift(0.2, 0.5, 2), round(rank_shift(0.4, 0.5, 2), 4)
        (0.7674, 0.0, 0.2647)
    """
    ours, theirs = ndtri(least), ndtri(1.0 - rivals)

    def holds(a: Array) -> bool:
        return bool(ndtr(theirs - a) + t * ndtr(ours - a) > 1.0 + 1e-12)

    return float(largest_true(holds, 0.0, A_MAX)) if holds(np.float64(0.0)) else 0.0


@dataclass(frozen=True, eq=False)
class RankBets:
    """Bets on (*) at a shift, for one set T of t rivals: what a copy in the class, in none, and in T counts.

    The left side of the bound, F = Phi(Phi^-1(1 - s) - a) + t Phi(Phi^-1(p_y) - a), is convex in (s, p_y), so it lies
    above its tangent at any reference, which is the mean of a score of single copies (T6). Scaled to [0, 1], that score
    is 0 in T, 1 in the class, and `middle` elsewhere; its mean above `nulls` gives F > 1. Constant bets, mixed.

    Args:
        middle, nulls: [C], by reference.
    """

    middle: Array
    nulls: Array

    def wealth(self, own: int, rivals: int, n: int) -> float:
        """Return the log wealth of the bets on the claim after n copies, so many of them in the class and in T."""
        return float(mix(self._gains(own, rivals, n, against=False).ravel()))

    def doubt(self, own: int, rivals: int, n: int) -> float:
        """Return that of the bets against it, the least of all references."""
        doubts = mix(self._gains(own, rivals, n, against=True))
        return float(np.where(self.nulls < 1.0 - 1e-9, doubts, np.inf).min())

    def _gains(self, own: int, rivals: int, n: int, *, against: bool) -> Array:
        possible = self.nulls < 1.0 - 1e-9  # elsewhere the wealth stays at one
        nulls = np.where(possible, self.nulls, 0.5)[:, None]
        values = np.stack([np.ones_like(self.middle), np.zeros_like(self.middle), self.middle], axis=1)
        odds = (1.0 - values) / (1.0 - nulls) - 1.0 if against else values / nulls - 1.0
        gains = np.log1p(np.array(FRACTIONS)[:, None] * odds[:, None, :]) @ np.array([own, rivals, n - own - rivals])
        return np.asarray(np.where(possible[:, None], gains, 0.0))


def rank_bets(own: float, rivals: float, t: int, a: float) -> RankBets:
    """Return bets with references where F is one, next to the pilot's shares of the class and of T and to two others.

    Example:
        >>> rank_bets(0.9, 0.05, 1, 1.0).nulls.round(3).tolist()
        [0.845, 0.855, 0.841]
    """
    shares = np.array([[1.0 - rivals * factor, own] for factor in (1.0, 0.5, min(2.0, 0.5 * (1.0 + 1.0 / rivals)))])
    reached = np.array([_shift_of(ours, other, t) for other, ours in shares])
    z = ndtri(shares) - (reached - a)[:, None]
    slope = np.exp(a * z - 0.5 * a * a) * np.array([1.0, t])
    constant = (ndtr(z - a) * np.array([1.0, t]) - slope * ndtr(z)).sum(axis=1)
    total = slope.sum(axis=1)
    return RankBets(slope[:, 0] / total, np.maximum((1.0 - constant) / total, 1e-6))


def _shift_of(own: float, others: float, t: int) -> float:
    """The shift, negative too, at which F is one for the share of the class and that of all outside of T."""
    ours, theirs = ndtri(own), ndtri(others)
    return float(largest_true(lambda a: ndtr(theirs - a) + t * ndtr(ours - a) > 1.0, -A_MAX, A_MAX))
