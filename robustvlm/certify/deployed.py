"""From the ideal smoothed feature to the deployed mean of n0 fresh samples: features, classes, refusals (T10)."""

from bisect import bisect_left
from functools import cache
from math import exp, expm1, log, sqrt
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.certifier import as_scores, mean_feature, unit_rows
from robustvlm.certify.classes import rival_normals, vote_p_value
from robustvlm.certify.feature import VACUOUS, fcsb_inner, norm_lower, vector_table
from robustvlm.certify.means import FRACTIONS, divergence, kl_lower, log_gains, mix
from robustvlm.certify.normal import Array, beta_quantile, check_alpha, check_cos0, check_sigma, largest_true
from robustvlm.certify.openset import pilot_choice
from robustvlm.errors import UserError

# The rule with abstention that a model may be deployed with: by the mean feature (`predict`) or by vote


def least_copies(alpha: float, *, votes: bool = False) -> int:
    """Return the fewest copies with which the rule can decide anything at alpha.

    Example:
        >>> least_copies(0.001), least_copies(0.001, votes=True)
        (27, 11)
    """
    check_alpha(alpha)
    if votes:
        return next(n for n in range(1, 10_000) if vote_p_value(n, n) <= alpha)
    wealth = (mix(log_gains(np.ones(n), 0.5)) for n in range(1, 10_000))
    half = next(n for n, gained in enumerate(wealth, start=1) if gained > log(1.0 / alpha))
    return max(2, 2 * half - 1)  # the larger half tests


# From the ideal smoothed feature to the mean of n0 fresh samples that is deployed (T10)


def deployed_inner(inner: ArrayLike, n0: int, alpha0: float) -> Array:
    """Return what `<mean of n0 fresh features at x', u>` keeps of a certified `<m(x'), u>`, w.p. 1 - alpha0 (T10).

    Chernoff's bound for the lower tail of the sample mean. x' must be chosen without knowing the inference noise; a
    public or fixed noise bank voids it.

    Example:
        >>> [round(float(deployed_inner(0.5, n0, 0.001)), 3) for n0 in (64, 256, 10_000)]
        [0.07, 0.291, 0.468]
    """
    if n0 < 1:
        raise UserError(f"the deployed mean needs at least one sample, got n0 = {n0}")
    q = np.clip(0.5 * (1.0 + np.asarray(inner, dtype=np.float64)), 0.0, 1.0)
    level = log(1.0 / check_alpha(alpha0)) / n0
    z = largest_true(lambda z: divergence(z, q) >= level, np.zeros_like(q), q, steps=52)
    return 2.0 * z - 1.0


def deployed_cos(inner: ArrayLike, n0: int, alpha0: float) -> Array:
    """Return the cosine to u certified for the deployed mean, or -1 where nothing is (T10); see `deployed_inner`.

    Example:
        >>> [round(float(deployed_cos(0.5, n0, 0.001)), 3) for n0 in (32, 128)]
        [-1.0, 0.2]
    """
    kept = deployed_inner(inner, n0, alpha0)
    return np.where(kept > 0.0, kept, VACUOUS)


def class_margin_needed(rivals: int, n0: int, alpha0: float) -> float:
    """Return the margin `<m(x'), v>` to every rival that keeps the class of the mean of n0 fresh samples (T10).

    With all margins (over unit directions v to the rivals) at least this, the argmax of the mean is another class with
    probability at most alpha0 over the inference noise. For one rival the mean of n0 scores g = (1 + <f, v>) / 2 in
    [0, 1] with expectation q falls to 1/2 with probability at most `exp(-n0 KL(1/2 || q))`, and `KL(1/2 || q) =
    -ln(4 q (1 - q)) / 2` (Chernoff, Hoeffding 1963); the union over all rivals has to stay within alpha0. It is certain
    only for margins that all hold at once, which a lower bound of the smallest margin gives (T8).

    Example:
        >>> [round(class_margin_needed(9, n0, 0.001), 3) for n0 in (16, 64, 1000)]
        [0.824, 0.498, 0.134]
    """
    if n0 < 1 or rivals < 1:
        raise UserError(f"the deployed mean needs at least one sample and one rival class, got n0 = {n0} and {rivals}")
    return min(1.0, sqrt(-expm1(-2.0 * log(rivals / check_alpha(alpha0)) / n0)) + 1e-12)


def vote_share_needed(n0: int, alpha0: float) -> float:
    """Return the vote share at x' from which on most of n0 fresh votes are the label's, w.p. 1 - alpha0 (T10).

    The label is sure to win with more than half of the votes: the exact binomial tail of at most half has to stay
    within alpha0.

    Example:
        >>> [round(vote_share_needed(n0, 0.001), 3) for n0 in (16, 64, 1000)]
        [0.851, 0.692, 0.549]
    """
    if n0 < 1:
        raise UserError(f"a deployed vote needs at least one sample, got n0 = {n0}")
    half = n0 // 2
    found = 1.0 - float(beta_quantile(check_alpha(alpha0), float(n0 - half), float(half + 1)))
    return max(0.5, found)  # no deployed vote keeps more than the ideal one, in the last digit either


@cache
def answered_margin_needed(rivals: int, n0: int, alpha: float, alpha0: float) -> float:
    """Return the margin `<m(x'), v>` to every rival at which the mean rule answers the label, w.p. 1 - alpha0.

    Of the rule with abstention at `alpha` (`predict`): its first half has to name the label, its second half to beat
    every rival. Let every margin score have an expectation of at least q. The first half fails for one rival with
    probability at most `exp(-h KL(1/2 || q))` (Chernoff). The second half surely succeeds once one bet's log wealth
    `sum_i log(1 + 2 F (g_i - 1/2))` is ln(8 / alpha); `c -> (1 + 2 F (g - 1/2))^-c` is convex and falls in g, so
    Chernoff's bound of its lower tail is largest for scores of 0 and 1 of mean q, where the wealth counts successes:
    `exp(-n KL(z || q))` with z the share of successes that is needed. Both halves, all rivals: a union.

    Example:
        >>> [round(answered_margin_needed(9, n0, 0.001, 0.001), 3) for n0 in (64, 256, 1000)]
        [0.988, 0.679, 0.37]
    """
    if rivals < 1 or n0 < 2:
        raise UserError(f"the rule needs at least two copies and one rival class, got n0 = {n0} and {rivals}")
    first, second = n0 // 2, n0 - n0 // 2
    bets = np.asarray(FRACTIONS)
    level = log(len(bets) / alpha) / second
    needed = (level - np.log1p(-bets)) / (np.log1p(bets) - np.log1p(-bets))
    needed = needed[needed < 1.0]
    if not len(needed):
        return 1.0

    def fails(q: float) -> bool:
        if q <= float(needed.min()):
            return True
        usable = needed[needed < q]
        undecided = float(np.exp(-second * divergence(usable, q)).min())
        return rivals * (exp(-first * float(divergence(0.5, q))) + undecided) > check_alpha(alpha0)

    low, high = 0.5, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if fails(middle) else (low, middle)
    return min(1.0, 2.0 * high - 1.0 + 1e-12)


@cache
def answered_share_needed(n0: int, alpha: float, alpha0: float) -> float:
    """Return the share of votes at x' from which on the vote rule at `alpha` answers the label, w.p. 1 - alpha0 (T10).

    With c of n0 votes the label's test is significant whichever way the others vote: fewer in the second place only
    make it more so. So the exact binomial tail of fewer than the least such c has to stay within alpha0. A share of 1
    stands for rules that never answer.

    Example:
        >>> [round(answered_share_needed(n0, 0.001, 0.001), 3) for n0 in (16, 64, 1000)]
        [0.997, 0.859, 0.601]
    """
    least = n0 // 2 + 1 + bisect_left(range(n0 // 2 + 1, n0 + 1), True, key=lambda c: vote_p_value(c, n0) <= alpha)
    if least > n0:
        return 1.0
    return max(0.5, 1.0 - float(beta_quantile(check_alpha(alpha0), float(n0 - least + 1), float(least))))


def predict(features: ArrayLike, text: ArrayLike, alpha0: float) -> int | None:
    """Return the class of the mean feature from n0 fresh inference features, or None for ABSTAIN (T10, T8).

    The first half chooses the label, the second half has to beat every rival at level alpha0. At any x' in the ball of
    a class certificate the result is another class than the certified one with probability at most alpha0.

    Args:
        features: [n0, D] unit features, n0 >= 2; failed passes as NaN rows.
        text: [K, D] class embeddings.

    Raises:
        UserError: there are fewer than two features.

    Example:
        >>> predict([[0.9, 0.43589]] * 256, [[1.0, 0.0], [0.0, 1.0]], 0.001)
        0
        >>> predict([[0.9, 0.43589]] * 8, [[1.0, 0.0], [0.0, 1.0]], 0.001) is None
        True
    """
    rows = unit_rows(features)
    if len(rows) < 2:
        raise UserError("an abstaining prediction needs at least two inference samples")
    half = len(rows) // 2
    t = np.asarray(text, dtype=np.float64)
    label = int(np.argmax(np.nan_to_num(rows[:half]).sum(axis=0) @ t.T))
    normals = rival_normals(t, label)
    if normals is None:
        return None
    wealth = mix(log_gains(as_scores(0.5 * (1.0 + rows[half:] @ normals.T)), 0.5))
    return label if bool((wealth >= log(1.0 / check_alpha(alpha0))).all()) else None


# Feature certificates for the deployed smoother: the mean of n0 fresh samples instead of the ideal feature (T10)


def deployed_feature_cos(r: ArrayLike, a: float, n0: int, alpha0: float) -> Array:
    """Return the certified cosine between the mean of n0 fresh samples at x' and m(x), w.p. 1 - alpha0, or -1 (T10).

    The larger of two bounds at alpha0 / 2 each: the angle certificate (T4) widened by the ball that the mean of n0
    samples lies in, and Chernoff's bound along m(x) from the inner product (T1). The inference noise must be fresh, and
    x' chosen without knowing it.

    Args:
        r: lower bounds of ||m(x)||, any shape.
        a: eps / sigma.

    Example:
        >>> deployed_feature_cos([0.5, 0.9, 0.99], 0.5, 1000, 0.001).round(2).tolist()
        [0.02, 0.9, 0.97]
    """
    r = np.asarray(r, dtype=np.float64)
    part = 0.5 * check_alpha(alpha0)
    inner = deployed_cos(fcsb_inner(0.5 * (1.0 + r), a), n0, part)
    return np.maximum(inner, _by_angle(vector_table().cos(r, a), norm_lower(r, a), n0, part))


def _by_angle(cosine: Array, norm: Array, n0: int, alpha0: float) -> Array:
    """Return the cosine certified for the deployed mean from an angle certificate, or -1 (T10).

    The mean of n0 samples lies in a ball around m(x'); seen from the origin the ball turns it by at most
    `arcsin(ball / norm)`.

    Args:
        cosine: certified `cos(m(x'), u)`. norm: lower bound of `||m(x')||` (`norm_lower` of a lower bound at x).
    """
    ball = np.sqrt(np.maximum(0.0, 1.0 - norm * norm) / n0) + np.sqrt(2.0 * log(1.0 / alpha0) / n0)
    turn = np.arcsin(np.minimum(1.0, ball / np.maximum(norm, 1e-12)))
    angle = np.arccos(np.clip(cosine, -1.0, 1.0)) + turn
    sound = (cosine > 0.0) & (ball < norm) & (angle < np.pi / 2)
    return np.where(sound, np.cos(np.where(sound, angle, 0.0)), VACUOUS)


def deployed_feature_radius(r: float, cos0: float, sigma: float, n0: int, alpha0: float) -> float:
    """Return the radius inside which the mean of n0 fresh samples keeps cosine `cos0` to m(x), w.p. 1 - alpha0 (T10).

    Never above the ideal smoother's radius; 0 is ABSTAIN.

    Example:
        >>> [round(deployed_feature_radius(0.9, 0.5, 1.0, n0, 0.001), 2) for n0 in (16, 256, 10_000)]
        [0.0, 0.88, 1.31]
    """
    least = max(check_cos0(cos0), 1e-12)
    high = float(vector_table().radius(r, cos0, 1.0))
    found = largest_true(lambda a: deployed_feature_cos(r, float(a), n0, alpha0) >= least, 0.0, high, steps=20)
    return check_sigma(sigma) * float(found)


# The deployed open-set rule: accept or reject from n0 fresh samples, abstain when they do not decide it (T10)


def predict_openset(
    features: ArrayLike, vectors: Array, tau: float, alpha0: float
) -> Literal["accept", "reject", "abstain"]:
    """Return the decision on the unnormalised score of m(x') from n0 fresh inference features (T10, T8).

    The first half chooses the class and the antibodies, the second half has to show the score on one side of `tau`.
    Inside an acceptance radius "reject" has probability at most alpha0, inside a rejection radius "accept".

    Args:
        features: [n0, D] unit features, n0 >= 2; failed passes as NaN rows.
        vectors: [K, A, D] from `contrast_vectors`.

    Raises:
        UserError: there are fewer than two features.

    Example:
        >>> v = np.array([[[0.0, 1.0]]])
        >>> [predict_openset([[0.6, 0.8]] * 100, v, tau, 0.001) for tau in (0.3, 0.78, 1.0)]
        ['accept', 'abstain', 'reject']
    """
    rows = unit_rows(features)
    if len(rows) < 2:
        raise UserError("an abstaining decision needs at least two inference samples")
    half = len(rows) // 2
    k, chosen = pilot_choice(mean_feature(rows[:half])[0], vectors)
    if float(_lower(rows[half:], vectors[k], alpha0).min()) >= tau:
        return "accept"
    picked = vectors[np.arange(len(vectors)), chosen]
    return "reject" if float((-_lower(rows[half:], -picked, alpha0)).max()) < tau else "abstain"


def _lower(rows: Array, vectors: Array, alpha: float) -> Array:
    """Lower bounds of `<m, v>` per vector [K, D]."""
    lengths = np.linalg.norm(vectors, axis=1)
    units = vectors / np.maximum(lengths, 1e-300)[:, None]
    return lengths * (2.0 * kl_lower(as_scores(0.5 * (1.0 + rows @ units.T)), check_alpha(alpha)) - 1.0)
