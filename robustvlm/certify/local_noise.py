"""Noise that is chosen for each image: a vote for a noise level, which is certified not to change nearby (T22)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from robustvlm.certify.certifier import Certifier, Finding, Request, Stage, unit_rows
from robustvlm.certify.classes import vote_radius
from robustvlm.certify.means import clopper_pearson_lower
from robustvlm.certify.normal import Array, check_sigma
from robustvlm.certify.threats import find_threat
from robustvlm.core import MAX_SIGMA
from robustvlm.errors import UserError
from robustvlm.text import format_exact

# T22. Let h map images to one of finitely many noise levels, s(x) be the level that h gives to most copies x + N(0, s0²
# I), and the answer at x be that of any rule smoothed at the level s(x). If the copies of x keep their majority for it
# within R_s (T0 at the noise s0), and the rule at the *constant* level s(x) keeps its answer within R_c, the answer is
# constant within min(R_s, R_c): there the rule is, image by image, the one at the constant level s(x).
#
# So noise that depends on the image costs nothing but the second radius; no theorem is needed for noise that varies.

_LEAST, _MOST = 2, 16
FORM = "SIGMAS:THRESHOLDS:AT"


@dataclass(frozen=True)
class LocalNoise:
    """A fixed rule by which noisy copies of an image vote for its noise level.

    A copy, made at the noise `at`, votes by its top margin, the cosine to the nearest class text less that to the
    second nearest: for `sigmas[i]`, where i counts the thresholds that the margin reaches. Thresholds come from other
    images, or from nowhere: never from the images that are certified.

    Args:
        sigmas: the noise levels, all different. thresholds: one fewer, not falling. at: noise level of the vote.

    Raises:
        UserError: numbers that are no such rule.

    Example:
        >>> rule = LocalNoise((0.05, 0.1), (0.2,), 0.05)
        >>> str(rule), rule.levels([[0.6, 0.8], [1.0, 0.0], [np.nan, 0.0]], np.eye(2)).tolist()
        ('0.05,0.1:0.2:0.05', [1, 1, -1])
    """

    sigmas: tuple[float, ...]
    thresholds: tuple[float, ...]
    at: float

    def __post_init__(self) -> None:
        for sigma in (*self.sigmas, self.at):
            if check_sigma(sigma) > MAX_SIGMA:
                raise UserError(f"noise levels are at most {MAX_SIGMA:g} in [0, 1] pixels, got {format_exact(sigma)}")
        if not _LEAST <= len(self.sigmas) <= _MOST or len(set(self.sigmas)) < len(self.sigmas):
            raise UserError(
                f"noise is chosen among {_LEAST} to {_MOST} levels, each named once, got {_listed(self.sigmas)}: pass "
                "for example 0.05,0.1"
            )
        if len(self.thresholds) != len(self.sigmas) - 1:
            raise UserError(
                f"{len(self.sigmas)} noise levels need {len(self.sigmas) - 1} thresholds of the top margin between "
                f"them, got {len(self.thresholds)}"
            )
        rising = all(a <= b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False))
        if not all(map(math.isfinite, self.thresholds)) or not rising:
            raise UserError(f"thresholds must be finite and must not fall, got {_listed(self.thresholds)}")

    def __str__(self) -> str:
        return f"{_listed(self.sigmas)}:{_listed(self.thresholds)}:{format_exact(self.at)}"

    @property
    def words(self) -> str:
        """The rule in words."""
        return (
            f"the noise level of {_listed(self.sigmas)} that most copies at noise {format_exact(self.at)} vote for, by "
            f"their top margin against {_listed(self.thresholds)}"
        )

    def levels(self, features: ArrayLike, text: ArrayLike) -> npt.NDArray[np.int64]:
        """Return the level [n] that each feature [n, D] votes for, given class texts [K, D]; -1 for failed ones."""
        margins = top_margins(features, text)
        reached = np.searchsorted(np.asarray(self.thresholds), np.nan_to_num(margins), side="right")
        return np.where(np.isnan(margins), -1, reached).astype(np.int64)


def _listed(values: Sequence[float]) -> str:
    return ",".join(map(format_exact, values))


def read_local_noise(written: str) -> LocalNoise:
    """Return the rule that is written `SIGMAS:THRESHOLDS:AT`.

    Raises:
        UserError: it is written otherwise.

    Example:
        >>> read_local_noise("0.05,0.1,0.2:0.1,0.3:0.1").thresholds
        (0.1, 0.3)
    """
    parts = written.split(":")
    try:
        sigmas, thresholds, (at,) = (tuple(map(float, part.split(","))) for part in parts)
    except ValueError:
        raise UserError(
            f"'{written}' must be written {FORM}: noise levels, thresholds of the top margin between them, and the "
            "noise at which copies vote, as 0.05,0.1,0.2:0.1,0.3:0.1"
        ) from None
    return LocalNoise(sigmas, thresholds, at)


def top_margins(features: ArrayLike, text: ArrayLike) -> Array:
    """Return by how much the nearest of the texts [K, D] leads, for unit features [n, D]; NaN for failed ones.

    Example:
        >>> top_margins([[0.6, 0.8], [1.0, 0.0]], np.eye(2)).round(2).tolist()
        [0.2, 1.0]
    """
    rows, table = unit_rows(features), np.asarray(text, dtype=np.float64)
    if table.ndim != 2 or len(table) < 2:
        raise UserError("a top margin needs at least two classes")
    near = np.partition(rows @ table.T, len(table) - 2, axis=1)
    return np.asarray(near[:, -1] - near[:, -2])


def choose_thresholds(
    margins: ArrayLike, gains: ArrayLike, at: float, *, alpha: float = 0.001, steps: int = 24
) -> tuple[float, ...]:
    """Return thresholds under which images that are not certified later have the largest mean radius.

    Every choice of quantiles is tried, so that up to four levels are fast.

    Args:
        margins: top margins [N, n] of copies of N images at noise `at`. gains: what each level is worth to each image
            [N, L], as its radius there, 0 where its class is wrong.
        alpha: of the bound of the votes. steps: quantiles that are tried.

    Example:
        >>> choose_thresholds([[0.1] * 99, [0.5] * 99], [[0.2, 0.0], [0.2, 0.6]], 0.5)
        (0.5,)
    """
    shown, worth = np.asarray(margins, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    n, gaussian = shown.shape[1], find_threat(None)
    table = np.array([gaussian.reach(float(clopper_pearson_lower(c, n, alpha)), 0.5, at) for c in range(n + 1)])
    marks = np.unique(np.quantile(shown, np.linspace(0.0, 1.0, steps)))
    ends = np.concatenate([marks, [marks[-1] + 1e-6]])
    below = np.stack([(shown < end).sum(axis=1) for end in ends], axis=1)  # [N, M]
    best, found = -1.0, tuple(float(ends[0]) for _ in range(worth.shape[1] - 1))
    for chosen in combinations_with_replacement(range(len(ends)), worth.shape[1] - 1):
        edges = np.concatenate([np.zeros((len(shown), 1), int), below[:, chosen], np.full((len(shown), 1), n)], axis=1)
        votes = np.diff(edges, axis=1)
        level = votes.argmax(axis=1)
        here = np.arange(len(shown))
        value = float(np.minimum(table[votes[here, level]], worth[here, level]).mean())
        if value > best:
            best, found = value, tuple(float(ends[i]) for i in chosen)
    return found


class LocalRadius(Certifier):
    """The radius within which neither the chosen noise level nor the answer at that level changes (T22).

    The first `n_noise` samples, at noise `noise.at`, choose the level (a fifth of them) and bound its share of votes at
    alpha / 2. All others are drawn at that level and certify as they always do, at alpha / 2. Columns: `noise_radius`
    and `level_radius`, the two radii; `noise_level`, what was chosen; `deployed_radius`, where the deployed model with
    abstention answers, if the answers state that.

    Args:
        noise: how copies vote for a level. text: [K, D] class texts.
        certifier: makes the certifier of a level, from its place among `noise.sigmas`; at alpha / 2.
        alpha: error probability of both together. n_noise: copies that choose the noise.
        share: votes that the level must keep at x' for the deployed model to choose it (with that to answer); None: no
            column of deployed copies.

    Raises:
        UserError: there are fewer than two samples for the noise.

    Example:
        >>> from functools import partial
        >>> from robustvlm.certify.claims.vote import VoteRadius
        >>> law = LocalNoise((0.1, 0.25), (0.5,), 0.25)
        >>> level = lambda i: VoteRadius(text=np.eye(2), sigma=law.sigmas[i], alpha=0.0005, n=900, n_pilot=100)
        >>> certifier = LocalRadius(noise=law, text=np.eye(2), certifier=level, alpha=0.001, n=900, n_noise=300)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[1.0, 0.0]] * wanted.sure)
        >>> found = certifier.finding()
        >>> certifier.sigma, round(found.columns["noise_radius"], 2), round(found.columns["level_radius"], 2)
        (0.25, 0.47, 0.59)
    """

    streams = ("noise", "pilot", "estimation")

    def __init__(
        self,
        *,
        noise: LocalNoise,
        text: ArrayLike,
        certifier: Callable[[int], Certifier],
        alpha: float,
        n: int,
        n_noise: int,
        share: float | None = None,
    ) -> None:
        self.noise, self.text = noise, np.asarray(text, dtype=np.float64)
        self.level, self.votes, self.n_noise, self.share = -1, 0, n_noise, share
        settings = (str(noise), self.text, n_noise, *(certifier(i).key for i in range(len(noise.sigmas))))
        super().__init__(("noise", n_noise), ("estimation", n), sigma=noise.at, alpha=alpha, settings=settings)
        if n_noise < _LEAST:
            raise UserError(f"copies choose the noise and others judge the choice: pass at least two, got {n_noise}")
        self._certifier = certifier
        self._inner: Certifier | None = None

    @property
    def choosing(self) -> int:
        """How many of the copies choose the noise level; the others bound its share of votes."""
        return max(1, self.n_noise // 5)

    def request(self) -> Request | None:
        return super().request() if self._inner is None else self._inner.request()

    def take(self, features: ArrayLike) -> None:
        if self._inner is None:
            super().take(features)
        else:
            self._inner.take(features)

    def _absorb(self, stage: Stage, rows: Array) -> None:
        del stage
        levels = self.noise.levels(rows, self.text)
        first, rest = levels[: self.choosing], levels[self.choosing :]
        self.level = int(np.bincount(first[first >= 0], minlength=len(self.noise.sigmas)).argmax())
        self.votes = int((rest == self.level).sum())
        self._inner = self._certifier(self.level)
        self.sigma = self._inner.sigma  # all further noise is of this level

    def finding(self) -> Finding:
        assert self._inner is not None
        found = self._inner.finding()
        reach = self._reach(0.5)  # beyond it no certificate at the chosen level says anything of the model
        held = {name: min(value, reach) if name.endswith("_radius") else value for name, value in found.columns.items()}
        columns = held | {"noise_radius": reach, "level_radius": found.radius, "noise_level": self.sigma}
        if self.share is not None and "deployed_radius" in columns:
            columns["deployed_radius"] = min(columns["deployed_radius"], self._reach(self.share))
        return replace(
            found,
            radius=min(reach, found.radius),
            n_pilot=found.n_pilot + self.n_noise,
            failed=found.failed + self.failed,
            columns=columns,
        )

    def _reach(self, share: float) -> float:
        """Return the radius within which the chosen level keeps more than this share of the votes."""
        rest = self.n_noise - self.choosing
        return vote_radius(self.votes, rest, self.noise.at, 0.5 * self.alpha, share=share)
