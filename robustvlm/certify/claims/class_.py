"""The class claim: the class nearest to the mean feature stays, for fixed prompts or for any; and its certifiers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from robustvlm.certify import classes
from robustvlm.certify.bands import LEAST_LEVEL, ell_band
from robustvlm.certify.certifier import Certifier, Finding, Stage, Stop, mean_feature, unit_rows
from robustvlm.certify.claims.base import (
    Asked,
    Claim,
    Materials,
    Plan,
    Quantity,
    choose_and_judge,
    sampling_of,
    upper_mean,
)
from robustvlm.certify.core import best_core_shift, copies_needed, core_of
from robustvlm.certify.deployed import (
    answered_margin_needed,
    class_margin_needed,
)
from robustvlm.certify.limits import best_class_radius
from robustvlm.certify.means import Decision
from robustvlm.certify.normal import Array, check_radius
from robustvlm.certify.shapes import halfspace_shift
from robustvlm.errors import UserError

# Certifiers for classes: the class of the mean feature (P1-CDF, T8), any prompts (T2, T7), and the hard vote


class Labelled(Certifier):
    """Chooses the label in the pilot; the estimation samples have no say in it."""

    def __init__(
        self,
        *,
        text: ArrayLike,
        sigma: float,
        alpha: float,
        n: int,
        n_pilot: int,
        radius: float | None = None,
        settings: tuple[object, ...] = (),
    ) -> None:
        self.text = np.asarray(text, dtype=np.float64)
        self.radius = None if radius is None else check_radius(radius)
        super().__init__(
            ("pilot", n_pilot),
            ("estimation", n - n_pilot),
            sigma=sigma,
            alpha=alpha,
            settings=(self.text, self.radius, *settings, *self._extra()),
            looks=() if radius is None else ("estimation",),
        )
        if n_pilot < 1:
            raise UserError("the label is chosen by pilot samples: pass n_pilot of at least 1")
        self.label = -1
        self._rows: dict[Stage, Array] = {}

    def _extra(self) -> tuple[object, ...]:
        """Return what else decides the claim, of kinds that know more than the texts."""
        return ()

    def _absorb(self, stage: Stage, rows: Array) -> None:
        self._rows[stage] = rows
        if stage == "pilot":
            self.label = self._choose(rows)

    @property
    def _at(self) -> float:
        """The radius in question, of a claim that stops early."""
        assert self.radius is not None
        return self.radius

    def _choose(self, pilot: Array) -> int:
        return int(np.argmax(mean_feature(pilot)[0] @ self.text.T))

    def _found(self, radius: float, columns: dict[str, float], stop: Stop = "fixed") -> Finding:
        return Finding(
            radius=radius,
            stop=stop,
            n=self.counts["estimation"],
            n_pilot=self.counts["pilot"],
            failed=self.failed,
            prediction=self.label,
            mean=self.mean,
            columns=columns,
        )


class ClassRadius(Labelled):
    """The largest radius at which the mean feature keeps the pilot's class, from a fixed number of samples (P1-CDF).

    Columns, each at its own alpha: `mean_radius`, the same claim from the mean margins alone (betting); `fcsb_radius`,
    the same from the cosine to the pilot's direction; `deployed_radius`, where the mean of `deployed` fresh samples
    keeps the class with probability 1 - alpha over these (same event); of a model that abstains at `abstains_at`, where
    it answers with that class.

    Args:
        text: [K, D] class embeddings, fixed before the noise was drawn or without looking at what it gave.
        rounding: bound of the distance between the features handed over and those of the encoder (a cache in half
            precision); the claim is about the encoder's.

    Example:
        >>> certifier = ClassRadius(text=[[1.0, 0.0], [0.0, 1.0]], sigma=0.25, alpha=0.001, n=1000, n_pilot=200)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.8, 0.6], [1.0, 0.0]] * (wanted.sure // 2))
        >>> certifier.finding().prediction, round(certifier.finding().radius, 2)
        (0, 0.31)
    """

    def __init__(
        self,
        *,
        text: ArrayLike,
        sigma: float,
        alpha: float,
        n: int,
        n_pilot: int,
        rounding: float = 0.0,
        deployed: int | None = None,
        abstains_at: float | None = None,
        baselines: bool = True,
    ) -> None:
        super().__init__(text=text, sigma=sigma, alpha=alpha, n=n, n_pilot=n_pilot)
        self.abstains_at = abstains_at
        self.rounding, self.deployed, self._baselines = check_rounding(rounding), deployed, baselines

    def finding(self) -> Finding:
        rows = self._rows["estimation"]
        band = ell_band(len(rows), self.alpha)
        normals = self._normals()

        def radius(margin: float) -> float:
            # <m of the rounded features, v> >= rounding implies <m of the encoder's, v> >= 0, at x' as everywhere.
            least = margin + self.rounding
            return 0.0 if normals is None else self.sigma * halfspace_shift(rows, normals, lambda _: least, band)

        columns: dict[str, float] = {}
        if self.deployed is not None:
            columns["deployed_radius"] = radius(self._margin_needed(self.deployed))
        if self._baselines and not self.rounding:
            columns["mean_radius"] = classes.mean_margin_radius(rows, self.text, self.label, self.sigma, self.alpha)
            columns["fcsb_radius"] = classes.cosine_class_radius(
                rows, mean_feature(self._rows["pilot"])[0], self.text, self.label, self.sigma, self.alpha
            )
        return self._found(radius(0.0), columns)

    def _normals(self) -> Array | None:
        """Return unit directions [M, D] along which the mean feature must stay positive; None where it cannot."""
        return classes.rival_normals(self.text, self.label)

    def _margin_needed(self, n0: int) -> float:
        rivals = len(self.text) - 1
        if self.abstains_at is None:
            return class_margin_needed(rivals, n0, self.alpha)
        return answered_margin_needed(rivals, n0, self.abstains_at, self.alpha)


class VocabularyRadius(Labelled):
    """The radius at which the mean feature keeps its class, for prompts chosen at any time (T21).

    The claim holds at once for every prompt set, chosen before or after the samples were seen: the events behind a
    `Core` cover all directions. Columns: `ball`, `variance` and `outside` of the core; `needed`, about how many samples
    would certify some radius for these prompts (0: no number would).

    Args:
        rounding: as in `ClassRadius`.

    Example:
        >>> certifier = VocabularyRadius(text=[[1.0, 0.0], [0.0, 1.0]], sigma=0.25, alpha=0.001, n=1000, n_pilot=200)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.8, 0.6], [1.0, 0.0]] * (wanted.sure // 2))
        >>> round(certifier.finding().radius, 2)
        0.21
    """

    def __init__(
        self, *, text: ArrayLike, sigma: float, alpha: float, n: int, n_pilot: int, rounding: float = 0.0
    ) -> None:
        super().__init__(text=text, sigma=sigma, alpha=alpha, n=n, n_pilot=n_pilot)
        self.rounding = check_rounding(rounding)

    def finding(self) -> Finding:
        normals, pilot = classes.rival_normals(self.text, self.label), self._rows["pilot"]
        if normals is None or not np.isfinite(pilot).all(axis=1).any():
            return self._found(0.0, {})
        core = core_of(pilot, self._rows["estimation"], self.alpha)
        needed = copies_needed(core, normals, self.alpha) or 0
        columns = {"ball": core.ball, "variance": core.variance, "outside": core.outside, "needed": float(needed)}
        return self._found(self.sigma * core.shift(normals, least=self.rounding), columns)


class ClassAtRadius(Labelled):
    """Does the mean feature keep the pilot's class within this radius? Samples until yes, hopeless, or n (T6, T8).

    Example:
        >>> certifier = ClassAtRadius(text=[[1.0, 0.0], [0.0, 1.0]], radius=0.1, sigma=0.25, alpha=0.001, n=5000,
        ...                           n_pilot=200)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.8, 0.6], [1.0, 0.0]] * (wanted.sure // 2))
        >>> certifier.finding().radius, certifier.finding().n < 200
        (0.1, True)
    """

    def __init__(self, *, text: ArrayLike, radius: float, sigma: float, alpha: float, n: int, n_pilot: int) -> None:
        super().__init__(text=text, sigma=sigma, alpha=alpha, n=n, n_pilot=n_pilot, radius=radius)
        self._test: classes.ClassTest | None = None

    def _absorb(self, stage: Stage, rows: Array) -> None:
        if stage == "pilot":
            self.label = self._choose(rows)
            a = self._at / self.sigma
            self._test = classes.ClassTest(rows, self.text, self.label, a=a, alpha=self.alpha)
        elif self._test is not None:
            self._test.update(rows)

    def _decided(self) -> bool:
        return self._test is not None and self._test.decision != "open"

    def finding(self) -> Finding:
        decision: Decision = "open" if self._test is None else self._test.decision
        return self._found(self._at if decision == "certified" else 0.0, {}, stop_of(decision))


def check_rounding(rounding: float) -> float:
    """Return a bound of how far kept features lie from the encoder's, if it is one; a negative one would add radius."""
    if not (rounding >= 0.0 and np.isfinite(rounding)):
        raise UserError(f"the bound of the features' rounding must be a finite number >= 0, got {rounding}")
    return float(rounding)


def stop_of(decision: Decision) -> Stop:
    """Return how sampling ended, of a test's decision.

    Example:
        >>> stop_of("open")
        'exhausted'
    """
    return "exhausted" if decision == "open" else decision


# The class claim: the class nearest to the mean feature stays (T5, T6, T8), for fixed prompts or for any (T7)

_STATEMENT = "the mean feature of the noisy copies keeps its class"


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassQuantity(Quantity):
    """The smoothed feature is closer to the text of `label` than to any other: the least margin is above zero (P1)."""

    text: Array
    label: int
    radius: float

    words = "least margin of the certified class, <m(x'), v> over unit directions v to its rivals"

    @cached_property
    def normals(self) -> Array:
        """Unit directions [K-1, D] from rivals to the label."""
        found = classes.rival_normals(self.text, self.label)
        assert found is not None  # such a certificate would have abstained
        return found

    @cached_property
    def _nearest(self) -> npt.NDArray[np.int64]:
        """Rivals in order of nearness to the label's text: where an attack is likeliest to end."""
        return np.argsort(self.normals @ self.text[self.label]).astype(np.int64)

    def bound(self, eps: float) -> float:
        return 0.0 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        normals = torch.as_tensor(self.normals, dtype=features.dtype, device=features.device)
        margins = features.mean(dim=1) @ normals.T
        # Aim 0 follows the smallest margin wherever it is; the others pursue one of the nearest rivals each.
        pursued = torch.as_tensor(self._nearest, device=features.device)[(aim - 1).clamp_min(0) % len(normals)]
        return torch.where(aim == 0, margins.amin(dim=1), margins.gather(1, pursued[:, None])[:, 0])

    def value(self, features: Array) -> float:
        return float((self.normals @ mean_feature(features)[0]).min())

    def upper(self, features: Array, alpha: float) -> float:
        """Some features choose a rival; its margin is at least the least."""
        first, rest, level = choose_and_judge(features, len(self.normals), alpha)
        rival = int((self.normals @ mean_feature(first)[0]).argmin())
        return upper_mean(unit_rows(rest) @ self.normals[rival], level)


@dataclass(frozen=True, kw_only=True)
class _Class(Claim):
    def plan(self, asked: Asked, materials: Materials) -> Plan:
        if asked.prompts == "adaptive":
            return self._any_prompts(asked, materials)
        if asked.prompts == "candidates":
            return self._any_candidates(asked, materials)
        common = {"text": materials.classes, **sampling_of(asked)}
        early = asked.radius is not None
        certifier: Callable[[], Certifier]
        if early:
            certifier = partial(ClassAtRadius, **common, radius=asked.radius or 0.0)
        else:
            certifier = partial(
                ClassRadius,
                **common,
                rounding=materials.rounding,
                deployed=asked.deployed,
                abstains_at=asked.abstains_at,
            )
        tool = "anytime test" if early else "ELL band"
        return Plan(
            statement=_STATEMENT,
            rule=self.rule,
            theorem="T6" if early else "T5",
            bound="tangent" if early else "ell",
            stop_rule="anytime" if early else "fixed",
            alpha_split={f"margin to each rival ({tool}; no correction for their number, T8)": asked.alpha},
            best=self.linear_best(asked, 0.5),
            certifier=certifier,
            label_source="pilot",
        )

    def _any_prompts(self, asked: Asked, materials: Materials) -> Plan:
        alpha, sigma = asked.alpha, asked.sigma
        return Plan(
            statement=f"{_STATEMENT}, for prompts chosen at any time",
            rule=self.rule,
            theorem="T21",
            bound="pinelis+kl",
            stop_rule="fixed",
            alpha_split=dict.fromkeys(
                ("ball around the mean", "covariance of the core", "spread of the core", "share outside"), 0.25 * alpha
            ),
            best=lambda n: sigma * best_core_shift(self.rest(asked, n), alpha),
            certifier=partial(
                VocabularyRadius, text=materials.classes, **sampling_of(asked), rounding=materials.rounding
            ),
            label_source="pilot",
        )

    def _any_candidates(self, asked: Asked, materials: Materials) -> Plan:
        """The bound of `ClassRadius` for all pairs of candidates at once, of which the class list has some."""
        assert asked.n_candidates is not None
        pairs = asked.n_candidates * (asked.n_candidates - 1)
        level = asked.alpha / pairs
        common = sampling_of(asked) | {"alpha": level, "text": materials.classes, "rounding": materials.rounding}
        return Plan(
            statement=f"{_STATEMENT}, for classes drawn at any time from {asked.n_candidates:,} candidates",
            rule=self.rule,
            theorem="T5",
            bound="ell" if level >= LEAST_LEVEL else "index",
            stop_rule="fixed",
            alpha_split={f"margin of each of {pairs:,} pairs of candidates (union)": asked.alpha},
            best=lambda n: best_class_radius(self.rest(asked, n), level, asked.sigma),
            certifier=partial(
                ClassRadius, **common, deployed=asked.deployed, abstains_at=asked.abstains_at, baselines=False
            ),
            label_source="pilot",
        )

    def audited(
        self, row: Mapping[str, Any], asked: Asked, materials: Materials, *, steering: Array, evidence: Array
    ) -> Quantity:
        del asked, steering, evidence
        return ClassQuantity(text=materials.classes, label=row["prediction"], radius=row["radius"])


CLASS = _Class(
    name="class",
    kept="the smoothed model's class is right and certified to stay",
    about_class=True,
    columns=("radius", "deployed_radius", "mean_radius", "fcsb_radius", "noise_radius", "level_radius"),
    rule="the class whose text is nearest to the mean feature m over the noise, of infinitely many copies",
    deployed="the class nearest to the mean of {n0:,} fresh copies is the certified one",
    known_best=True,
    tests_radius=True,
    any_prompts=True,
    bounds_rounding=True,
    quantity=ClassQuantity.words,
)
