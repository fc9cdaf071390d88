"""What a claim wants of the sampling engine, and the scores that it makes of the samples."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from robustvlm.certify.noise import CHUNK, settings_digest
from robustvlm.certify.normal import Array, check_alpha, check_sigma
from robustvlm.errors import UserError

# What a claim wants of the sampling engine: which noise, how many rows of it, and when it has seen enough

Stage = Literal["clean", "noise", "pilot", "estimation"]
Stop = Literal["fixed", "certified", "futile", "exhausted"]


@dataclass(frozen=True)
class Request:
    """Features that a certifier still wants of one stage.

    Args:
        stage: "clean" is the image itself, without noise; "noise" chooses the level of all noise after it.
        sure: rows that are needed whatever they will say.
        most: rows that may be needed; a sequential test asks for one look surely and for the rest perhaps.
    """

    stage: Stage
    sure: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the samples of one image certify.

    Attributes:
        radius: certified, in the pixels of the tensor that receives the noise; 0 is ABSTAIN.
        stop: "fixed" n, or how a sequential test ended: claim certified, given up as hopeless, samples exhausted.
        n, n_pilot: estimation and pilot samples used. failed: those among them that were not finite (worst value).
        prediction: class index (class and vote), 1 accepted and 0 rejected (open set), None for features.
        r: lower confidence bound the radius rests on, if there is one.
        mean: mean feature [D] of all samples, for information; certificates do not rest on it.
        columns: radii and bounds of other claims and methods from the same samples, by column name.
        claim: claim of the record, where it depends on the samples ("openset-accept").
        parts: lower confidence bounds [T], all valid at once at the claim's alpha, of what it states of parts (tokens).
    """

    radius: float
    stop: Stop
    n: int
    n_pilot: int
    failed: int = 0
    prediction: int | None = None
    r: float | None = None
    mean: Array | None = None
    columns: dict[str, float] = field(default_factory=dict)
    claim: str | None = None
    parts: Array | None = None


class Certifier(ABC):
    """Decides one claim about one image from features that are handed to it stage by stage, in order.

    Stages run one after the other with sizes fixed beforehand; `looks` says in which of them the claim may be decided
    early, after every full chunk. Rows may arrive in pieces of any size and are looked at in the same steps.

    The noise level is stated here and nowhere else: the engine draws noise of the certifier's `sigma`, so that a radius
    cannot be counted in units of another level than its samples were drawn at.

    Args:
        stages: (stage, rows) in order; stages of no rows are left out.
        sigma: noise level, in [0, 1] pixels. alpha: error probability.
        settings: all else that decides the claim (texts, thresholds, radius, ...): numbers, texts and arrays.
        looks: stages in which `_decided` is asked after every chunk.

    Attributes:
        key: digest of everything that decides the claim; other claims draw other noise (`robustvlm.certify.noise`).
        of_image: what of an image decides its claim beside its pixels, such as its class; a part of the address too.
        streams: stages that have noise, each from a stream of its own.
        counts: rows used so far by stage.
        failed: noisy rows so far that were not finite.
    """

    of_image: tuple[object, ...] = ()
    streams: tuple[Stage, ...] = ("pilot", "estimation")

    def __init__(
        self,
        *stages: tuple[Stage, int],
        sigma: float,
        alpha: float,
        settings: tuple[object, ...] = (),
        looks: tuple[Stage, ...] = (),
    ) -> None:
        self.sigma, self.alpha = check_sigma(sigma), check_alpha(alpha)
        sizes = dict(stages)
        if min(sizes.values()) < 0 or sizes.get("estimation", 0) < 1:
            raise UserError(f"a claim needs estimation samples, got the stages {sizes}: pass a larger n than n_pilot")
        self.key = settings_digest(type(self).__name__, self.sigma, self.alpha, stages, settings)
        self._stages = [(stage, size) for stage, size in stages if size > 0]
        self._looks = looks
        self.counts: dict[Stage, int] = {"clean": 0, "noise": 0, "pilot": 0, "estimation": 0}
        self.failed = 0
        self._sum: Array | None = None
        self._waiting: list[Array] = []
        self._early = False

    def request(self) -> Request | None:
        """Return what is wanted next, or None when the finding is there."""
        if not self._stages:
            return None
        stage, size = self._stages[0]
        left = size - self.counts[stage] - self._held
        sure = min(left, CHUNK - self._held) if stage in self._looks else left
        return Request(stage, sure, left)

    def take(self, features: ArrayLike) -> None:
        """Add the next rows [n, D] of the requested stage, in order; rows behind the decision are ignored.

        Raises:
            UserError: the rows are more than the stage has room for.
        """
        rows = np.asarray(features, dtype=np.float64)
        wanted = self.request()
        if wanted is None:
            return
        if len(rows) > wanted.most:
            raise UserError(f"the stage {wanted.stage} has room for {wanted.most} more samples and got {len(rows)}")
        self._waiting.append(rows)
        left = wanted.most - len(rows)
        if left and (wanted.stage not in self._looks or self._held < CHUNK):
            return
        rows, self._waiting = np.concatenate(self._waiting), []
        step = CHUNK if wanted.stage in self._looks else len(rows)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            if len(part) < step and left:  # not a full look yet
                self._waiting = [part]
                return
            self._use(wanted.stage, part)
            if not self._stages or self._stages[0][0] != wanted.stage:
                return

    def shown(self, pixels: Tensor, stage: Stage, start: int, rows: int) -> Tensor:
        """Return the images [rows, C, H, W] whose noisy copies rows `start` and on of a stage are: the image itself."""
        del stage, start
        return pixels.expand(rows, *pixels.shape)

    @property
    def _held(self) -> int:
        return sum(len(rows) for rows in self._waiting)

    def _use(self, stage: Stage, rows: Array) -> None:
        self.counts[stage] += len(rows)
        if stage != "clean":
            finite = np.isfinite(rows).all(axis=1)
            self.failed += int((~finite).sum())
            self._sum = rows[finite].sum(axis=0) + (0.0 if self._sum is None else self._sum)
        self._absorb(stage, rows)
        if stage in self._looks and self._decided():
            self._stages, self._early = [], True
        elif self.counts[stage] == self._stages[0][1]:
            self._stages.pop(0)
            if self._decided():
                self._stages = []

    @property
    def mean(self) -> Array | None:
        """Mean of all noisy features so far [D], failed ones left out; for information."""
        n = self.counts["pilot"] + self.counts["estimation"] - self.failed
        return None if self._sum is None or n == 0 else self._sum / n

    @abstractmethod
    def _absorb(self, stage: Stage, rows: Array) -> None:
        """Take in rows [n, D] of a stage: a whole stage at once, or a look's worth where the claim may end early."""

    def _decided(self) -> bool:
        """Whether no further sample is wanted, of this stage or of those after it."""
        return False

    @abstractmethod
    def finding(self) -> Finding:
        """Return what is certified, once `request` is None."""


# Scores in [0, 1] and unit features, with failed passes counted as the worst value rather than dropped

_SLACK = 1e-3  # rounding of half-precision features; anything further out is not a score


def as_scores(values: ArrayLike) -> Array:
    """Return `values` as float64 scores in [0, 1], samples along axis 0; a NaN counts as 0, the worst value.

    Every lower bound in this package passes through here. Upper bounds are lower bounds of `1 - x`, so a NaN is the
    worst value for them too. Dropping failed samples instead would be a selection by content.

    Raises:
        UserError: a value is infinite or outside [0, 1] by more than 1e-3, or there is no sample.

    Example:
        >>> as_scores([0.2, float("nan"), 1.0000001]).tolist()
        [0.2, 0.0, 1.0]
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim == 0 or scores.shape[0] == 0:
        raise UserError("expected at least one score along axis 0, got none")
    scores = np.where(np.isnan(scores), 0.0, scores)
    if scores.min(initial=0.0) < -_SLACK or scores.max(initial=1.0) > 1.0 + _SLACK:
        raise UserError(f"scores must lie in [0, 1], got values from {scores.min():.6g} to {scores.max():.6g}")
    return np.asarray(np.clip(scores, 0.0, 1.0))


def unit_rows(features: ArrayLike) -> Array:
    """Return unit features [n, D] in float64, renormalised; a row that is not finite becomes a row of NaN.

    Raises:
        UserError: `features` is not a matrix, or a finite row's norm differs from one by more than 1e-2 (the theorems
            are about features on the unit sphere; normalise inside the expectation).

    Example:
        >>> unit_rows([[0.6, 0.8], [float("nan"), 1.0]]).tolist()
        [[0.6, 0.8], [nan, nan]]
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise UserError(f"expected features of shape [n, D] with n >= 1, got shape {list(rows.shape)}")
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    rows = np.where(finite[:, None], rows, np.nan)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    off = np.abs(norms[finite] - 1.0)
    if off.size and off.max() > 1e-2:
        raise UserError(f"expected unit features, got a row of norm {norms[finite].flat[off.argmax()]:.4g}")
    return np.asarray(rows / norms)


def unit_vector(direction: ArrayLike) -> Array:
    """Return `direction` [D] scaled to length one.

    Raises:
        UserError: it is not a vector, or its length is zero or not finite.

    Example:
        >>> unit_vector([3.0, 4.0]).tolist()
        [0.6, 0.8]
    """
    vector = np.asarray(direction, dtype=np.float64)
    length = float(np.linalg.norm(vector)) if vector.ndim == 1 else 0.0
    if not (length > 0.0 and np.isfinite(length)):
        raise UserError("expected a direction: a vector [D] of positive finite length")
    return np.asarray(vector / length)


def direction_scores(features: ArrayLike, direction: ArrayLike) -> Array:
    """Return `g = (1 + <f, u>) / 2` in [0, 1] for unit features [n, D] and directions [D] or [K, D] (scaled to one).

    The directions must not depend on the samples in `features`: take them from text, from the clean image or from an
    independent pilot sample. Rows that are NaN give the worst score 0.

    Example:
        >>> direction_scores([[1.0, 0.0], [0.0, 1.0]], [2.0, 0.0]).tolist()
        [1.0, 0.5]
    """
    rows = unit_rows(features)
    directions = np.asarray(direction, dtype=np.float64)
    units = unit_vector(directions) if directions.ndim == 1 else np.stack([unit_vector(row) for row in directions])
    return as_scores(0.5 * (1.0 + rows @ units.T))


def mean_feature(features: ArrayLike) -> tuple[Array, float]:
    """Return the mean [D] of unit features [n, D] with failed rows as zero vectors, and the share of failed rows.

    Whatever the failed rows would have been, the true sample mean is within that share of the returned one.

    Example:
        >>> mean, lost = mean_feature([[1.0, 0.0], [0.0, float("nan")]])
        >>> mean.tolist(), lost
        ([0.5, 0.0], 0.5)
    """
    rows = unit_rows(features)
    return np.nan_to_num(rows, nan=0.0).mean(axis=0), float(np.isnan(rows).any(axis=1).mean())
