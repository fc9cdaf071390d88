"""Certificates of a class: by the mean feature, tested in sequence, for prompts chosen afterwards, and by vote."""

from math import log, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betainc

from robustvlm.certify.bands import Band
from robustvlm.certify.certifier import Certifier, Finding, Stage, as_scores, direction_scores, unit_rows, unit_vector
from robustvlm.certify.feature import fcsb_radius
from robustvlm.certify.means import Decision, betting_lower, clopper_pearson_lower, log_gains, mix
from robustvlm.certify.normal import Array, check_alpha, check_sigma
from robustvlm.certify.shapes import halfspace_shift
from robustvlm.certify.tangent import TangentTest
from robustvlm.certify.threats import PLAIN, find_threat
from robustvlm.errors import UserError

# Certified zero-shot class of the mean feature: `argmax_k <m(x'), t_k>` stays y (P1; T5 or T0, with T8)

_CHUNK = 16


def rival_normals(text: ArrayLike, label: int) -> Array | None:
    """Return unit normals `(t_y - t_k) / ||t_y - t_k||` [K-1, D], or None if a rival has the label's own embedding.

    Args:
        text: class embeddings [K, D].
        label: y, chosen without the estimation samples.

    Raises:
        UserError: the label is not one of the classes, or there is no rival.

    Example:
        >>> rival_normals([[1.0, 0.0], [0.0, 1.0]], 0).round(4).tolist()
        [[0.7071, -0.7071]]
        >>> rival_normals([[1.0, 0.0], [1.0, 0.0]], 0) is None
        True
    """
    t = np.asarray(text, dtype=np.float64)
    if t.ndim != 2 or len(t) < 2:
        raise UserError(f"expected embeddings [K, D] of at least two classes, got shape {list(t.shape)}")
    if not 0 <= label < len(t):
        raise UserError(f"the label must be one of the {len(t)} classes, got {label}")
    differences = t[label] - np.delete(t, label, axis=0)
    lengths = np.linalg.norm(differences, axis=1)
    if not lengths.min() > 1e-9:  # also a NaN
        return None
    return np.asarray(differences / lengths[:, None])


def class_margin_radius(features: ArrayLike, text: ArrayLike, label: int, sigma: float, band: Band) -> float:
    """Return the radius inside which the mean feature's class is `label`; 0 means ABSTAIN (P1-CDF; T5, T8).

    Every rival's margin is bounded at the band's alpha and no correction for their number is needed: the claim is the
    minimum over a fixed set of rivals.

    Args:
        features: [n, D] unit features of estimation noise, n = band.n; failed passes as NaN rows.
        text: [K, D] class embeddings that do not depend on the features.
        label: from a pilot sample, never from `features`.

    Example:
        >>> from robustvlm.certify.bands import ell_band
        >>> rows = [[0.8, 0.6], [1.0, 0.0]] * 500
        >>> round(class_margin_radius(rows, [[1.0, 0.0], [0.0, 1.0]], 0, 0.25, ell_band(1000, 0.001)), 3)
        0.323
    """
    normals = rival_normals(text, label)
    if normals is None:
        return 0.0
    return check_sigma(sigma) * halfspace_shift(features, normals, lambda _: 0.0, band)


def mean_margin_radius(features: ArrayLike, text: ArrayLike, label: int, sigma: float, alpha: float) -> float:
    """Return the radius from the smallest mean margin alone: `sigma Phi^-1(min_k LCB_k)` (P1-mean; T0, T8).

    Uses the betting bound for every rival. Weaker than `class_margin_radius` by a wide margin on CLIP geometry; kept
    for comparison and because it is valid at any stopping time.

    Example:
        >>> rows = [[0.8, 0.6], [1.0, 0.0]] * 500
        >>> round(mean_margin_radius(rows, [[1.0, 0.0], [0.0, 1.0]], 0, 0.25, 0.001), 3)
        0.126
    """
    normals = rival_normals(text, label)
    if normals is None:
        return 0.0
    rows = unit_rows(features)
    scores = as_scores(0.5 * (1.0 + rows @ normals.T))
    return float(fcsb_radius(least_lower(scores, alpha), 0.0, sigma))


def cosine_class_radius(
    features: ArrayLike, direction: ArrayLike, text: ArrayLike, label: int, sigma: float, alpha: float
) -> float:
    """Return the radius from a bound of the cosine to a direction alone: what feature-cosine smoothing says of a class.

    The angle from u to the nearest bisector of the label and a rival is delta = arcsin(min_k <u, v_k>). While
    cos(m(x'), u) > cos(delta) (T1), m(x') has not crossed any of them. This is how a bound of the cosine extends to
    predictions (arXiv 2601.16200, from version 3 on, as far as its abstract says), with the pilot's direction for the
    clean feature and T1 in its correct form. Weaker than `class_margin_radius`, which asks for the margins themselves.

    Args:
        features: unit features [n, D] that did not choose the direction. direction: u [D], of any length.

    Example:
        >>> rows = [[0.8, 0.6], [1.0, 0.0]] * 500
        >>> round(cosine_class_radius(rows, [1.0, 0.3], [[1.0, 0.0], [0.0, 1.0]], 0, 0.25, 0.001), 3)
        0.065
    """
    normals = rival_normals(text, label)
    u = np.asarray(direction, dtype=np.float64)
    if normals is None or not np.isfinite(u).all() or not np.linalg.norm(u) > 1e-9:
        return 0.0
    apart = float((normals @ unit_vector(u)).min()) if len(normals) else 1.0
    if not apart > 0.0:
        return 0.0
    share = float(betting_lower(direction_scores(features, u), alpha))
    return float(fcsb_radius(share, sqrt(max(0.0, 1.0 - apart * apart)), sigma))


def least_lower(scores: Array, alpha: float) -> float:
    """Return the least of the betting lower bounds of the columns of scores [n, K], bisecting only where needed.

    Example:
        >>> round(least_lower(np.full((100, 3), 0.9), 0.001), 2)
        0.82
    """
    level = log(1.0 / check_alpha(alpha))
    order = np.argsort(scores.mean(axis=0))  # the smallest margins first: most others then pass one comparison
    best = 1.0
    for i in range(0, len(order), _CHUNK):
        block = scores[:, order[i : i + _CHUNK]]
        worse = ~(mix(log_gains(block, best)) >= level) if best > 0.0 else np.zeros(block.shape[1], dtype=bool)
        if worse.any():
            best = min(best, float(betting_lower(block[:, worse], alpha).min()))
    return best


# Is the class certified at this radius? All rivals tested side by side, stopping as soon as all have given in


class ClassTest:
    """Anytime-valid test that the mean feature's class is `label` everywhere within `a` sigmas (T6, T8).

    One `TangentTest` per rival, with references from the pilot. Each test's crossing is permanent, so rivals leave as
    they are beaten; the class is certified when none is left, at level `alpha` without correction: if the claim is
    false, some fixed rival's null is true and its wealth reaches `1 / alpha` with probability at most alpha.

    `open_rivals` is the number of rivals that are not beaten yet.

    Args:
        pilot: [n0, D] unit features from the pilot stream (may also have chosen the label).
        text: [K, D] class embeddings.
        label: y, from the pilot.
        a: radius to certify over sigma.

    Example:
        >>> rows = np.tile([[0.8, 0.6], [1.0, 0.0]], (100, 1))
        >>> test = ClassTest(rows, [[1.0, 0.0], [0.0, 1.0]], 0, a=0.5, alpha=0.001)
        >>> while test.decision == "open":
        ...     decision = test.update(rows[:32])
        >>> decision
        'certified'
    """

    def __init__(self, pilot: ArrayLike, text: ArrayLike, label: int, *, a: float, alpha: float) -> None:
        normals = rival_normals(text, label)
        self.n = 0
        self.decision: Decision = "open"
        if normals is None:  # a rival with the label's own embedding can never be beaten
            self.open_rivals, self.decision = len(np.asarray(text)) - 1, "futile"
            return
        self._normals = normals
        self.open_rivals = len(normals)
        self._test = TangentTest(_margins(unit_rows(pilot), normals), a=a, target=0.5, alpha=alpha)
        self._conclude()

    def update(self, features: ArrayLike) -> Decision:
        """Add unit features [n, D] of the estimation stream and return the decision."""
        rows = unit_rows(features)
        self.n += len(rows)
        if self.decision == "open":
            self._test.update(_margins(rows, self._normals))
            self._conclude()
        return self.decision

    def _conclude(self) -> None:
        if self._test.hopeless.any():
            self.decision = "futile"
            return
        left = ~self._test.certified
        if not left.all():
            self._test.keep(left)
            self._normals = self._normals[left]
            self.open_rivals = int(left.sum())
        if self.open_rivals == 0:
            self.decision = "certified"


def _margins(rows: Array, normals: Array) -> Array:
    return as_scores(0.5 * (1.0 + rows @ normals.T))


# The ball that the mean of finitely many features lies in


def mean_ball(n: int, alpha: float, *, r: float = 0.0) -> float:
    """Return a bound of `||mean of n features - m||` that holds with probability 1 - alpha (McDiarmid).

    Args:
        r: a lower bound of `||m||` that is certain, or holds on an event whose error is counted elsewhere.

    Example:
        >>> round(mean_ball(10_000, 0.001), 4)
        0.0472
    """
    if n < 1:
        raise UserError(f"a mean needs at least one sample, got n = {n}")
    return sqrt(max(0.0, 1.0 - r * r) / n) + sqrt(2.0 * log(1.0 / check_alpha(alpha)) / n)


# Hard-vote smoothing (Cohen et al., ICML 2019): another deployed rule, `argmax_k P(argmax_j <f, t_j> = k)`.
#
# Its radius says nothing about the classifier of the mean feature, and the larger of the two radii is no certificate of
# either (see `best_of`).


def vote_radius(
    successes: int, n: int, sigma: float, alpha: float, *, share: float = 0.5, threat: str | None = None
) -> float:
    """Return the radius inside which the label's vote share stays above `share`; 0 means ABSTAIN.

    `sigma (Phi^-1(p) - Phi^-1(share))` with p the exact lower bound of the share at the image, for Gaussian noise.

    Args:
        successes: estimation votes for the label that the pilot chose; failed passes are votes for no class.
        n: all estimation passes, the failed ones included.
        threat: what the noise is against, by name; l2 by default.

    Example:
        >>> round(vote_radius(9_900, 10_000, 0.25, 0.001), 4), vote_radius(50, 100, 0.25, 0.001)
        (0.5531, 0.0)
    """
    return find_threat(threat).reach(float(clopper_pearson_lower(successes, n, alpha)), share, sigma)


def vote_predict(counts: ArrayLike, alpha: float) -> int | None:
    """Return the class whose votes lead significantly, or None for ABSTAIN (their PREDICT, two-sided binomial test).

    Args:
        counts: votes per class [K] from fresh inference noise.

    Raises:
        UserError: there are fewer than two classes.

    Example:
        >>> vote_predict([90, 10, 0], 0.001), vote_predict([55, 45, 0], 0.001)
        (0, None)
    """
    votes = np.asarray(counts, dtype=np.int64)
    if votes.ndim != 1 or len(votes) < 2:
        raise UserError("expected vote counts of at least two classes")
    second, first = np.argsort(votes, kind="stable")[-2:]
    top, total = int(votes[first]), int(votes[first] + votes[second])
    return int(first) if vote_p_value(top, total) <= check_alpha(alpha) else None


def vote_p_value(top: int, total: int) -> float:
    """Return the two-sided exact binomial p-value of `top >= total / 2` of `total` votes against a fair coin.

    Example:
        >>> round(vote_p_value(9, 10), 6), vote_p_value(5, 10)
        (0.021484, 1.0)
    """
    return 1.0 if top < 1 else min(1.0, 2.0 * float(betainc(top, total - top + 1, 0.5)))


# The hard vote of any classifier: samples are class numbers, not features


class CountedVotes(Certifier):
    """The radius within which most votes stay with the pilot's class (Cohen et al. 2019, CERTIFY); 0 is ABSTAIN.

    `n_pilot` samples choose the class, `n` others estimate its share by the bound of Clopper and Pearson. The column
    `votes` is that share.

    Args:
        classes: how many there are. Samples are rows [n, 1] with the number of the class; a pass that failed is NaN
            and a vote for none.
        threat: what the noise is against, by name.

    Example:
        >>> certifier = CountedVotes(classes=2, sigma=0.25, alpha=0.001, n=1000, n_pilot=100)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[1.0]] * wanted.sure)
        >>> certifier.finding().prediction, round(certifier.finding().radius, 3)
        (1, 0.616)
    """

    def __init__(self, *, classes: int, sigma: float, alpha: float, n: int, n_pilot: int, threat: str = PLAIN) -> None:
        super().__init__(("pilot", n_pilot), ("estimation", n), sigma=sigma, alpha=alpha, settings=(classes,))
        if n_pilot < 1:
            raise UserError("the class is chosen by samples of their own: pass n0 of at least 1")
        self.classes, self.label, self.votes, self.threat = classes, -1, 0, threat

    def _absorb(self, stage: Stage, rows: Array) -> None:
        chosen = rows[np.isfinite(rows[:, 0]), 0].astype(np.int64)
        if stage == "pilot":
            self.label = int(np.bincount(chosen, minlength=self.classes).argmax())
        else:
            self.votes += int((chosen == self.label).sum())

    def finding(self) -> Finding:
        n = self.counts["estimation"]
        return Finding(
            radius=vote_radius(self.votes, n, self.sigma, self.alpha, threat=self.threat),
            stop="fixed",
            n=n,
            n_pilot=self.counts["pilot"],
            failed=self.failed,
            prediction=self.label,
            columns={"votes": self.votes / n},
        )
