"""What a claim is: a certificate's statement, its bounds, its columns, and the quantity that an audit attacks.

A claim is one frozen object. The command, the journal, the tables, the report and the audit ask it what they need to
know and compare its name with nothing, so that another claim is another object (docs/certify.md has one of 30 lines).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify.certifier import Certifier, Finding
from robustvlm.certify.limits import best_class_radius, best_tangent_radius, samples_needed
from robustvlm.certify.means import betting_lower
from robustvlm.certify.normal import Array, check_cos0
from robustvlm.certify.openset import OpensetRule
from robustvlm.certify.record import Source, StopRule
from robustvlm.certify.wordings import Wordings
from robustvlm.core import MOST_WORDS
from robustvlm.errors import UserError, nearest, setting
from robustvlm.text import format_exact, format_up

# Radii that a certify run may have beside its own, each in a column of its own, and what tables call them


@dataclass(frozen=True)
class Column:
    """What a column of radii is called, and which claim it is about if not the run's own."""

    title: str
    about: str = ""


_COLUMN_PILOT = "cosine to the pilot's direction, another claim"

RADII: dict[str, Column] = {
    "radius": Column("this certificate"),
    "deployed_radius": Column("deployed copies", "what finitely many fresh copies keep of this claim"),
    "cone_radius": Column("cone", "the same claim, closed form"),
    "paper_radius": Column("paper's bound", "cosine to the image's own feature f(x), another claim"),
    "fcsb_radius": Column("corrected FCSB", "cosine to the pilot's direction, or what that says of the class"),
    "cdf_radius": Column("distribution", _COLUMN_PILOT),
    "direction_radius": Column("distribution and covariance", _COLUMN_PILOT),
    "norm_radius": Column("mean alone", "the same claim by the bound of the claim feature"),
    "mean_radius": Column("mean margins only", "the same claim from means alone"),
    "noise_radius": Column("noise level", "the noise level that was chosen for the image stays the same"),
    **{
        f"words{count}_radius": Column(
            f"changed words: {count}", "this claim, with so many changed words of the prompts"
        )
        for count in range(MOST_WORDS + 1)
    },
    "level_radius": Column("class at that level", "this claim at that noise level, if it did not change"),
}
"""By the name of the column in `results.parquet`."""


# What an audit attacks: a quantity of the smoothed model that a certificate bounds from below inside its radius


class Quantity(ABC):
    """A quantity of the smoothed model that a certificate bounds from below inside a radius."""

    words: ClassVar[str]
    """As in "cosine between the smoothed features"."""

    @abstractmethod
    def bound(self, eps: float) -> float:
        """Return what is certified at distance `eps`; -1 where nothing is."""

    @abstractmethod
    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        """Return a smooth stand-in [R] for the quantity from noisy features [R, n, D]; rows may differ in `aim` [R]."""

    @abstractmethod
    def value(self, features: Array) -> float:
        """Return the plug-in estimate of the quantity from features [n, D] of fresh noise."""

    @abstractmethod
    def upper(self, features: Array, alpha: float) -> float:
        """Return an upper confidence bound of the quantity, from fresh features [n, D] that chose nothing."""


def mean_cosine(features: Tensor, direction: Array, aim: Tensor) -> Tensor:
    """Return cosines [R] between the means of features [R, n, D] and `direction` [D]; every row has the same aim."""
    del aim
    u = torch.as_tensor(direction, dtype=features.dtype, device=features.device)[None]
    return torch.nn.functional.cosine_similarity(features.mean(dim=1), u, dim=-1)


def upper_mean(values: Array, alpha: float) -> float:
    """Return an upper confidence bound of the mean of independent values in [-1, 1].

    A value that is NaN (a failed pass) counts as 1: failures must not look like a broken bound.

    Example:
        >>> round(upper_mean(np.zeros(4096), 0.001), 3)
        0.002
    """
    scores = 0.5 * (1.0 - np.nan_to_num(values, nan=1.0))
    return 1.0 - 2.0 * float(betting_lower(scores, alpha))


def choose_and_judge(features: Array, entries: int, alpha: float) -> tuple[Array, Array, float]:
    """Return features that choose some of so many entries, features that bound theirs, and the level of each bound.

    Features that chose nothing can bound at alpha, whichever was chosen; all features can bound each entry at alpha
    over their number, whatever is chosen. What needs fewer features is taken: the second below 1 / alpha entries.

    Example:
        >>> [len(part) for part in choose_and_judge(np.zeros((8, 2)), 10, 0.01)[:2]]
        [8, 8]
        >>> [len(part) for part in choose_and_judge(np.zeros((8, 2)), 1000, 0.01)[:2]]
        [4, 4]
    """
    if entries < 1.0 / alpha:
        return features, features, alpha / entries
    half = len(features) // 2
    return features[:half], features[half:], alpha


# What a claim is: the statement of a certificate, how it is bounded, and all that the rest of the program asks of it

_PILOT = 200


class Asked(Protocol):
    """The settled settings of a run, as far as claims read them; see `runs.certify_config.CertifyConfig`."""

    @property
    def sigma(self) -> float: ...
    @property
    def samples(self) -> int: ...
    @property
    def n_pilot(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def min_cos(self) -> float | None: ...
    @property
    def radius(self) -> float | None: ...
    @property
    def tau(self) -> float | None: ...
    @property
    def weight(self) -> float: ...
    @property
    def deployed(self) -> int | None: ...
    @property
    def abstains_at(self) -> float | None: ...
    @property
    def top(self) -> int | None: ...
    @property
    def threat(self) -> str | None: ...
    @property
    def prompts(self) -> str | None: ...
    @property
    def n_candidates(self) -> int | None: ...


class Given(Protocol):
    """The settings as a command gives them, as far as they are some claims' own."""

    @property
    def model(self) -> str: ...
    @property
    def min_cos(self) -> float: ...
    @property
    def tau(self) -> float | None: ...
    @property
    def antibodies(self) -> object | None: ...
    @property
    def weight(self) -> float: ...
    @property
    def radius(self) -> float | None: ...
    @property
    def deployed(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What a claim is about beside the image.

    Args:
        text: unit class vectors [K, D], or those of a gallery's entries. entries: classes of these.
        against: vectors of the antibodies that were given [A, D].
        rule: open-set rule of a model with thresholds of its own.
        rounding: bound of the rounding of kept features, in l2.
        baselines: whether the columns of other bounds are wanted that need the clean feature.
        logit_scale: the model's factor on cosines.
        tokens: features are so many unit tokens side by side, over the root of their number.
        width: numbers of such a feature; 0 for any other.
        wordings: all texts that the classes may be written with, where a claim is about all of them.
    """

    text: Array | None = None
    against: Array | None = None
    rule: OpensetRule | None = None
    rounding: float = 0.0
    baselines: bool = True
    logit_scale: float = 1.0
    tokens: int = 1
    width: int = 0
    entries: tuple[int, ...] | None = None
    wordings: Wordings | None = None

    @property
    def classes(self) -> Array:
        """The class vectors, of a claim that needs them."""
        if self.text is None:
            raise UserError("the claim is about classes: at least two are needed")
        return self.text


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One claim, ready to be decided for any number of images.

    Args:
        statement: what a certificate says, in words. rule: whose answer that is, in words.
        theorem, bound, stop_rule, alpha_split, label_source, direction_source: as in the record of a certificate.
        best: radius that so many samples per image give at best.
        certifier: makes the certifier of one image. by_label: makes it for an image of this class, of claims that are
            about the image's own class; the label is known before any noise is drawn.
        deployed: whether it states anything of the deployed model where its claim does.
    """

    statement: str
    rule: str
    theorem: str
    bound: str
    stop_rule: StopRule
    alpha_split: dict[str, float]
    best: Callable[[int], float]
    certifier: Callable[[], Certifier]
    by_label: Callable[[int], Certifier] | None = None
    label_source: Source = "none"
    direction_source: Source = "none"
    deployed: bool = True

    def certifier_of(self, label: int) -> Certifier:
        """Return the certifier of an image of this class, -1 where it has none of the list."""
        return self.certifier() if self.by_label is None else self.by_label(label)


@dataclass(frozen=True, kw_only=True)
class ClaimFacts:
    """What tables and reports must know of a claim: plain data, so that a run can be shown without its claim's code.

    Args:
        name: of the claim.
        kept: what is certified, as the end of "for 3 of 5 images ..."; `{min_cos}` stands for the cosine asked for.
        about_class: a certificate says that the predicted class stays; certified and right is what counts then.
        needs_classes: the claim depends on the class list and its prompts.
        names_class: the prediction is the index of a class (else 1 accepted, 0 rejected).
        columns: names of `RADII` that its runs may have, "radius" first and the deployed model's next.
        curve: `Finding.r` is a lower bound of the norm of the smoothed feature, from which cosines follow.

    Raises:
        UserError: a column that results do not have.
    """

    name: str
    kept: str
    about_class: bool = False
    needs_classes: bool = True
    names_class: bool = True
    columns: tuple[str, ...] = ("radius",)
    curve: bool = False

    def __post_init__(self) -> None:
        unknown = [column for column in self.columns if column not in RADII]
        if unknown:
            raise UserError(
                f"claim '{self.name}': no column '{unknown[0]}' in the results: {nearest(unknown[0], RADII)}"
            )
        if self.columns[:1] != ("radius",):
            raise UserError(f"claim '{self.name}': its first column is 'radius', got {list(self.columns)}")


@dataclass(frozen=True, kw_only=True)
class Claim(ClaimFacts, ABC):
    """A kind of statement that `robustvlm certify` can certify; subclasses say how in `plan`.

    Args:
        rule: the deployed rule that it is about, in words: an ideal one, of which finitely many copies keep less (T10).
        deployed: what the column `deployed_radius` says of so many copies (`{n0:,}`); "": it has no such column.
        deployed_at_radius: that column is there too where only one radius is asked about.
        options: settings that are its own, of "min_cos", "tau", "antibodies", "weight" and "top".
        head: what it takes of a model with a head of its own: its class vectors, its open-set rule, or its votes.
        known_best: the settings alone say the best radius, before a model is loaded.
        tests_radius: it can also decide one radius with as few samples as that takes (`--radius`).
        early_pilot: a test that may stop early needs a pilot; pilot_counts: pilot samples are evidence as well.
        needs_clean: other bounds need the feature of the image without noise (`Materials.baselines`).
        any_prompts: kept features can be judged for prompts that were chosen by looking at them.
        bounds_rounding: the rounding of kept features is part of the bound.
        quantity: what an audit measures, in words; "": its certificates cannot be audited.
    """

    rule: str
    deployed: str = ""
    deployed_at_radius: bool = False
    options: tuple[str, ...] = ()
    head: Literal["vectors", "rule", "votes"] | None = "vectors"
    known_best: bool = False
    tests_radius: bool = False
    early_pilot: bool = True
    pilot_counts: bool = False
    needs_clean: bool = False
    any_prompts: bool = False
    bounds_rounding: bool = False
    quantity: str = ""

    @property
    def facts(self) -> ClaimFacts:
        """What reports have to know of it."""
        return ClaimFacts(**{field.name: getattr(self, field.name) for field in fields(ClaimFacts)})

    @abstractmethod
    def plan(self, asked: Asked, materials: Materials) -> Plan:
        """Return how it is bounded under these settings, and the certifier of an image."""

    def check(self, given: Given, *, refuses: bool) -> None:
        """Refuse settings that the claim cannot be made with.

        Args:
            refuses: the model has prototypes, antibodies and thresholds of its own.

        Raises:
            UserError: what is missing, or for another claim.
        """
        del refuses
        if "min_cos" in self.options:
            check_cos0(given.min_cos)
        if given.radius is not None and not self.tests_radius:
            raise UserError(f"the claim '{self.name}' has no test of one radius: leave out {setting('radius')}")
        if given.deployed is not None and not self.deployed:
            raise UserError(
                f"the claim '{self.name}' states nothing of finitely many copies: leave out {setting('deployed')}"
            )
        if (given.tau is not None and "tau" not in self.options) or (
            given.antibodies is not None and "antibodies" not in self.options
        ):
            raise UserError(f"{setting('tau')} and {setting('antibodies')} are for {setting('claim', 'openset')}")

    def pilot(self, samples: int, *, early: bool) -> int:
        """Return how many of the samples make choices."""
        return pilot_size(samples, early=early) if self.early_pilot or not early else 0

    def correct(self, label: int, prediction: int) -> bool | None:
        """Whether a prediction is right; None where that is unknown. A label of -1 is no class of the list."""
        return prediction == label if label >= 0 and prediction >= 0 else None

    def outcome(self, prediction: int, class_names: Sequence[str]) -> str:
        """Return what a prediction of a claim about classes is called."""
        return class_names[prediction]

    def deployed_columns(self, found: Finding, asked: Asked, *, sigma: float) -> dict[str, float]:
        """Return the columns of the deployed model that follow from a finding under noise `sigma` and are not in it."""
        del found, asked, sigma
        return {}

    def thresholds(self, asked: Asked, rule: OpensetRule | None) -> dict[str, float] | None:
        """Return the thresholds that a certificate's record names; None where there are none."""
        del asked, rule
        return None

    def audited(
        self, row: Mapping[str, Any], asked: Asked, materials: Materials, *, steering: Array, evidence: Array
    ) -> Quantity:
        """Return the quantity that an audit attacks, of an image's row of results.

        Args:
            steering, evidence: features [n, D] of the clean image under fresh noise; the first may steer the search.
        """
        del row, asked, materials, steering, evidence
        raise UserError(
            f"the claim '{self.name}' names a quantity for audits and makes none: write its method `audited` "
            "(docs/certify.md), or leave its quantity empty"
        )

    def deployed_rule(self, asked: Asked, *, stated: bool = True) -> str:
        """Say what the deployed columns state, of how many copies, or why there are none; "" if none are asked for.

        Args:
            stated: whether the plan states anything of it, as `Plan.deployed`.
        """
        if asked.deployed is None:
            return ""
        if asked.abstains_at is not None:
            return self._abstaining_rule(asked, asked.deployed, asked.abstains_at, stated)
        n0 = f"{asked.deployed:,}"
        early = asked.radius is not None and not self.deployed_at_radius
        if not self.deployed or asked.prompts == "adaptive" or early or not stated:
            # What abstains keeps a certified class or side, and nothing else that a claim may be about.
            keeps = bool(self.deployed) or self.head == "rule"
            return (
                f"of the model as it is deployed, with {n0} copies, this run states nothing"
                + (": leave out --radius" if self.deployed and asked.radius and stated else "")
                + ("; the abstaining prediction from fresh copies keeps the certificate (docs/certify.md)" * keeps)
            )
        what = self.deployed.replace("{n0:,}", n0)
        return (
            f"within the radius in the column deployed_radius, {what} with probability 1 - {format_exact(asked.alpha)} "
            "over their noise, at any image chosen without knowing it; 0: nothing is certified of it"
        )

    def _abstaining_rule(self, asked: Asked, n0: int, alpha0: float, stated: bool) -> str:
        """Say what a certificate means for a model that answers only where its copies decide the class (T10)."""
        never = (
            f"within the radius, at any image chosen without knowing its noise, the model as it is deployed ({n0:,} "
            f"copies, no answer where they do not decide at alpha {format_exact(alpha0)}) answers another class than "
            f"the certified one with probability at most {format_exact(alpha0)} over its copies"
        )
        if asked.prompts == "adaptive" or asked.radius is not None or not stated:
            return never
        return (
            f"{never}; within the radius in the column deployed_radius it does answer, and that class, with "
            f"probability 1 - {format_exact(asked.alpha)} over them"
        )

    def rest(self, asked: Asked, n: int) -> int:
        """Return how many of `n` samples are left to estimate with."""
        return n - self.pilot(n, early=asked.radius is not None)

    def linear_best(self, asked: Asked, target: float) -> Callable[[int], float]:
        """Return the radius at best of n samples, for a mean score in [0, 1] that must stay above `target`."""

        def best(n: int) -> float:
            rest = self.rest(asked, n)
            if rest < 1:
                return 0.0
            if asked.radius is None:
                return best_class_radius(rest, asked.alpha, asked.sigma, target=target)
            return best_tangent_radius(rest, asked.alpha, asked.sigma, target=target)

        return best


def sampling_of(asked: Asked) -> dict[str, Any]:
    """Return what every certifier with a pilot is told of the noise and its size."""
    return {"sigma": asked.sigma, "alpha": asked.alpha, "n": asked.samples, "n_pilot": asked.n_pilot}


def require_rank(k: int | None, entries: int) -> int:
    """Return how many of the entries an entry shall stay among; refuse a number that says nothing.

    Raises:
        UserError: it is not below the number of entries, or not positive.
    """
    if k is None or not 1 <= k < entries:
        usual = max(1, min(5, entries - 1))
        raise UserError(
            f"to stay among the first {k} of {entries} says nothing: pass {setting('top', usual)}, or another number "
            f"from 1 to {entries - 1}"
        )
    return k


def pilot_size(samples: int, *, early: bool) -> int:
    """Return how many of the samples make choices: a tenth, at least 200, at most half; 200 where it may stop early.

    Example:
        >>> [pilot_size(n, early=False) for n in (200, 1000, 10_000)], pilot_size(10_000, early=True)
        ([100, 200, 1000], 200)
    """
    least = min(_PILOT, samples // 2)
    return least if early else max(least, samples // 10)


def require_possible(plan: Plan, asked: Asked) -> float:
    """Return the largest radius that the settings can give; refuse settings under which every image must abstain."""
    best = plan.best(asked.samples)
    wanted = asked.radius if asked.radius is not None else 0.0
    if best > 0.0 and best >= wanted:
        return best
    needed = samples_needed(plan.best, wanted if wanted else 1e-9)
    goal = f"a radius of {format_exact(wanted)}" if wanted else "any radius"
    cure = (
        f"pass {setting('samples', needed)} or more (without any spread in the samples; real images need more), a "
        "larger sigma or a larger alpha"
        if needed is not None
        else "no number of samples does it: pass a smaller radius or a larger sigma"
    )
    have = f"{asked.samples} samples at sigma {format_exact(asked.sigma)} and alpha {format_exact(asked.alpha)}"
    most = format_up(best, 4)
    raise UserError(f"{have} can certify {goal} for no image, whatever the model (at best {most}): {cure}")
