"""The content of a certify run's `summary.json`, made from its rows in one place, and the conditions put to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import SerializerFunctionWrapHandler, TypeAdapter, model_serializer, model_validator

from robustvlm.certify import VACUOUS, cone_cos, deployed_feature_cos, fcsb_cos, vector_table
from robustvlm.certify.claims import CLAIMS, ClaimFacts, require_known
from robustvlm.certify.threats import Threat, find_threat
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.commands.certify.spread import Spread, compare, margin, vectors_of
from robustvlm.errors import UserError, nearest, setting
from robustvlm.runs.records import Check, Comparison, Cost, Record, UnreadableImage, parse_comparison
from robustvlm.stats import Rate, rate, worth_of
from robustvlm.text import format_exact

# The summary of a certify run: the one place where its rows become the numbers that are shown

CURVE_POINTS = 31
CURVE_SIGMAS = 3.0


class RadiusShare(Record):
    """Images certified at one radius; `correct` counts only those whose prediction is right too (certified accuracy).

    `others` has the shares of the other methods' columns; `apart` those whose attacked feature is certified to stay
    nearer to its own image's than to that of any other image of the run, measured under the same noise.
    """

    radius: float
    certified: Rate
    correct: Rate | None
    others: dict[str, Rate]
    apart: Rate | None = None


class TokenShare(Record):
    """What is certified of every image token at once at one distance, each with its share of the error probability.

    Args:
        radius: the distance. worst: mean over images of the least cosine of a token (-1 where there is none). typical:
            mean over images and tokens. kept: mean share of an image's tokens with the cosine that was asked for.
    """

    radius: float
    worst: float
    typical: float
    kept: float


class MethodSummary(Record):
    """Radii in one column: mean and median over all images (an abstention counts 0), and abstentions."""

    column: str
    mean: float
    median: float
    abstained: Rate


class CosinePoint(Record):
    """Mean certified cosine at one distance; an image without a certificate counts -1.

    `ours` is T4, `cone` T3 on the same event; `paper` and `fcsb` are about cosines to other anchors (f(x), the pilot's
    direction); `deployed` is about the mean of so many fresh samples instead of the ideal smoothed feature. `margin` is
    by how much `ours` exceeds the largest cosine to the nearest other image.
    """

    eps: float
    ours: float
    cone: float
    paper: float | None = None
    fcsb: float | None = None
    deployed: float | None = None
    margin: float | None = None


class SampleCount(Record):
    """Noisy copies used, against the fixed number, and how tests with a stopping rule ended.

    `fixed` is the number without early stopping; `passes` are encoder passes, unused ones included.
    """

    used: int
    fixed: int
    saved: float
    median: float
    largest: int
    passes: int
    stops: dict[str, int]


class Risk(Record):
    """Error probabilities: of one image's certificate, its split, and the expected false certificates of the run."""

    alpha: float
    split: dict[str, float]
    expected_false: float


class CertifySummary(Record):
    """Everything that tables, reports and exit codes are made of.

    Args:
        correct: the share of right predictions; None where no image has a known class.
        certified_correct: the share certified and right: the certified accuracy at radius above zero.
        average_certified_radius: mean of the radius where the prediction is right, else 0 (ACR; Zhai et al. 2020).
        at: the share certified at given radii.
        curve: mean certified cosine over distance, for feature claims.
        rule: whose answer is certified, in words; deployed: what is stated of finitely many copies, `deployed_n0` of
            them, in words; "" where nothing was asked.
        min_cos, asked_radius: cosine and radius that were asked for, where they were.
        looks: at these images in the folder of runs, this one included; None in runs from before they were counted.
        spread: how alike the images are under the noise, where cosines are certified.
        tokens: number of image tokens; at_tokens: what is certified of each, at the radii of `at`. Only of such claims.
        own_claim: what is to be known of a claim of the user's own; left out of runs with a built-in one.
        threat: what the radii are about; left out of runs about l2.
        half_axes: smallest and largest half-axis of the ellipsoid of radius one, of threats that are ellipsoids; their
            geometric mean is one.
        worth: how many independent images they are worth, where copies of one thing are among them; intervals are those
            of so many. None in runs whose intervals count every image.
        resized: images that were resized, of whose source nothing is stated. resize_norm: smallest and largest norm, in
            runs from before that.
    """

    claim: str
    statement: str
    sigma: float
    images: int
    unreadable_images: int
    correct: Rate | None
    abstained: Rate
    certified_correct: Rate | None
    average_certified_radius: float | None
    mean_radius: float
    median_radius: float
    methods: list[MethodSummary]
    at: list[RadiusShare]
    curve: list[CosinePoint]
    samples: SampleCount
    risk: Risk
    failed_samples: int
    resize_norm: tuple[float, float] | None = None
    rule: str = ""
    deployed: str = ""
    deployed_n0: int | None = None
    min_cos: float | None = None
    asked_radius: float | None = None
    looks: int | None = None
    resized: int = 0
    spread: Spread | None = None
    best_radius: float
    cost: Cost
    checks: list[Check]
    unreadable: list[UnreadableImage]
    unfinished: str | None = None
    tokens: int | None = None
    at_tokens: list[TokenShare] | None = None
    own_claim: ClaimFacts | None = None
    threat: str | None = None
    half_axes: tuple[float, float] | None = None
    worth: float | None = None

    @property
    def against(self) -> Threat:
        """What the radii are about."""
        return find_threat(self.threat)

    @property
    def facts(self) -> ClaimFacts:
        """What is to be known of its claim; of an own one as the run kept it, no code is loaded."""
        return CLAIMS[self.claim] if self.own_claim is None else self.own_claim

    @model_validator(mode="after")
    def _claim_is_told(self) -> CertifySummary:
        if (self.claim in CLAIMS) == (self.own_claim is None):
            return self
        try:
            require_known(self.claim)
        except UserError as error:
            raise ValueError(str(error)) from None
        raise ValueError("own_claim is for claims of the form module:callable, which need it")

    @model_serializer(mode="wrap")
    def _own_only(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        for name in ("own_claim", "tokens", "at_tokens", "threat", "half_axes"):
            if getattr(self, name) is None:
                content.pop(name, None)
        return content


def standing(summary: CertifySummary) -> tuple[float, Rate] | None:
    """Return the radius by which a run is judged, and the share that holds there; None where it counted at no radius.

    The radius that was asked for, else the smallest of those counted at (by default a quarter of sigma): a certificate
    at any radius above zero, however small, is not yet worth a colour. Of claims about classes, right ones count.
    """
    wanted = [point for point in summary.at if summary.asked_radius in (None, point.radius)]
    if not wanted:
        return None
    point = wanted[0]
    right = summary.facts.about_class and point.correct is not None
    return point.radius, point.correct if right and point.correct is not None else point.certified


def summarise_certify(
    rows: pa.Table | Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    *,
    cost: Cost | None = None,
    checks: Sequence[Check] = (),
    unreadable: Sequence[UnreadableImage] = (),
    unfinished: str | None = None,
    directions: Mapping[int, str] | None = None,
    group: Callable[[str], str] | None = str,
) -> CertifySummary:
    """Return the summary of the rows of a certify run under its manifest.

    `directions` are those of the smoothed features, by image. Raises ValueError when there is no row. Every rate has
    its exact 95 % interval, in which images of one `group`, by their ids, count once (None: it is not known).
    """
    table = rows.to_pylist() if isinstance(rows, pa.Table) else [dict(row) for row in rows]
    if not table:
        raise ValueError("a certify run without images has no summary")
    config, plan = CertifyConfig(**manifest["config"]), manifest["plan"]
    own = None if config.claim in CLAIMS else TypeAdapter(ClaimFacts).validate_python(plan["claim"])
    facts = own or CLAIMS[config.claim]
    radii = [row["radius"] for row in table]
    known = [row for row in table if row["correct"] is not None]
    tokens = _tokens(table)
    spread, nearest = compare(vectors_of(directions or {}), tokens or 1)
    for row in table:
        row["nearest"], row["group"] = nearest.get(row["index"]), (group or str)(row["image_id"])
    return CertifySummary(
        claim=config.claim,
        statement=plan["statement"],
        sigma=config.sigma,
        images=len(table),
        unreadable_images=len(unreadable),
        correct=_share([row["correct"] for row in known], known) if known else None,
        abstained=_share([row["abstained"] for row in table], table),
        certified_correct=_certified_correct(known, 0.0) if known else None,
        average_certified_radius=fmean(row["radius"] * row["correct"] for row in known) if known else None,
        mean_radius=fmean(radii),
        median_radius=float(median(radii)),
        methods=[_method(table, column) for column in facts.columns if table[0].get(column) is not None],
        at=[_at(table, known, radius, facts.columns[1:], config) for radius in config.at],
        curve=_curve(table, config) if facts.curve else [],
        samples=_samples(table, config),
        risk=Risk(alpha=config.alpha, split=plan["alpha_split"], expected_false=config.alpha * len(table)),
        failed_samples=sum(row["failed"] for row in table),
        rule=plan.get("rule", ""),
        deployed=plan.get("deployed", ""),
        deployed_n0=config.deployed,
        min_cos=config.min_cos,
        asked_radius=config.radius,
        looks=(manifest.get("trail") or {}).get("looks"),
        resized=sum(row["resize_norm"] != 1.0 for row in table),
        spread=spread,
        best_radius=plan["best_radius"],
        cost=cost or Cost(),
        checks=list(checks),
        unreadable=list(unreadable),
        unfinished=unfinished,
        tokens=tokens,
        at_tokens=None if tokens is None else [_at_tokens(table, radius, config) for radius in config.at],
        own_claim=own,
        threat=config.threat,
        half_axes=plan.get("half_axes"),
        worth=None if group is None else worth_of(row["group"] for row in table),
    )


def _share(hits: Iterable[bool], of: Sequence[Mapping[str, Any]]) -> Rate:
    """Return the share of rows, copies of one thing counted once in its interval."""
    return rate(sum(map(bool, hits)), len(of), independent=worth_of(row["group"] for row in of))


def _certified(row: Mapping[str, Any], radius: float, column: str = "radius") -> bool:
    """An abstention is certified at no radius, not even at zero."""
    value = row.get(column)
    return value is not None and value > 0.0 and value >= radius


def _certified_correct(known: Sequence[Mapping[str, Any]], radius: float) -> Rate:
    return _share([row["correct"] and _certified(row, radius) for row in known], known)


def _at(
    table: Sequence[Mapping[str, Any]],
    known: Sequence[Mapping[str, Any]],
    radius: float,
    others: Sequence[str],
    config: CertifyConfig,
) -> RadiusShare:
    margins = _margins(table, radius, config)
    there = [column for column in others if table[0].get(column) is not None]
    return RadiusShare(
        radius=radius,
        certified=_share([_certified(row, radius) for row in table], table),
        correct=_certified_correct(known, radius) if known else None,
        others={name: _share([_certified(row, radius, name) for row in table], table) for name in there},
        apart=None if margins is None else _share(margins > 0, table),
    )


def _tokens(table: Sequence[Mapping[str, Any]]) -> int | None:
    """Return of how many image tokens the rows have bounds; None of claims about something else."""
    return len(table[0]["token_r"]) if table[0].get("token_r") is not None else None


def _at_tokens(table: Sequence[Mapping[str, Any]], radius: float, config: CertifyConfig) -> TokenShare:
    bounds = np.array([row["token_r"] for row in table], dtype=np.float64)
    cosines = vector_table().cos(bounds, radius / config.sigma)
    return TokenShare(
        radius=radius,
        worst=float(cosines.min(axis=1).mean()),
        typical=float(cosines.mean()),
        kept=float((cosines >= (config.min_cos or 0.0)).mean()),
    )


def _margins(table: Sequence[Mapping[str, Any]], eps: float, config: CertifyConfig) -> np.ndarray | None:
    """Return every image's margin to the nearest other at a distance; None where the others are not known."""
    if any(row["nearest"] is None for row in table):
        return None
    nearest = np.array([row["nearest"] for row in table])
    return margin(np.array([_certified_cos(row, eps, config) for row in table]), nearest)


def _certified_cos(row: Mapping[str, Any], eps: float, config: CertifyConfig) -> float:
    """Return the cosine that is certified for an image at a distance, -1 where none is."""
    at_all = -1.0 if row["r"] is None else float(vector_table().cos(row["r"], eps / config.sigma))
    kept = _certified(row, eps) and config.min_cos is not None
    return max(at_all, config.min_cos) if kept and config.min_cos is not None else at_all


def _method(table: Sequence[Mapping[str, Any]], column: str) -> MethodSummary:
    values = [row[column] for row in table]
    return MethodSummary(
        column=column,
        mean=fmean(values),
        median=float(median(values)),
        abstained=_share([value == 0.0 for value in values], table),
    )


def _curve(table: Sequence[Mapping[str, Any]], config: CertifyConfig) -> list[CosinePoint]:
    grid = {round(x, 6) for x in np.linspace(0.0, CURVE_SIGMAS * config.sigma, CURVE_POINTS)} | set(config.at)
    r = np.array([row["r"] for row in table])
    paper, fcsb = (_column(table, name) for name in ("paper_s", "fcsb_s"))
    points = []
    for eps in sorted(grid):
        a = eps / config.sigma
        ours, margins = [_certified_cos(row, eps, config) for row in table], _margins(table, eps, config)
        points.append(
            CosinePoint(
                eps=eps,
                ours=fmean(ours),
                cone=float(cone_cos(r, a).mean()),
                paper=None if paper is None else float(fcsb_cos(paper, a).mean()),
                fcsb=None if fcsb is None else float(fcsb_cos(fcsb, a).mean()),
                deployed=None if config.deployed is None else _deployed(r, a, config, _tokens(table) or 1),
                margin=None if margins is None else float(margins.mean()),
            )
        )
    return points


def _deployed(r: np.ndarray, a: float, config: CertifyConfig, tokens: int) -> float:
    assert config.deployed is not None
    n0, alpha0 = config.deployed, config.bounding.alpha / tokens  # any of them may be the one that few copies turn away
    return fmean(deployed_feature_cos(float(x), a, n0, alpha0) if x > 0.0 else VACUOUS for x in r)


def _column(table: Sequence[Mapping[str, Any]], name: str) -> np.ndarray | None:
    if table[0].get(name) is None:
        return None
    return np.array([row[name] for row in table], dtype=np.float64)


def _samples(table: Sequence[Mapping[str, Any]], config: CertifyConfig) -> SampleCount:
    used = [row["n"] + row["n_pilot"] for row in table]
    stops: dict[str, int] = {}
    for row in table:
        stops[row["stop"]] = stops.get(row["stop"], 0) + 1
    fixed = config.samples * len(table)
    return SampleCount(
        used=sum(used),
        fixed=fixed,
        saved=1.0 - sum(used) / fixed,
        median=float(median(used)),
        largest=max(used),
        passes=sum(row["passes"] for row in table),
        stops=stops,
    )


# Conditions on a certify summary, such as `certified@0.25<50%`, that decide the exit code of a run

_LEFT = re.compile(r"([a-z_]+)(?:@([0-9.eE+-]+))?")
_AT_RADIUS = ("certified", "certified_correct")
_RATES = (*_AT_RADIUS, "abstained", "correct")
_RADII = ("mean_radius", "median_radius")


@dataclass(frozen=True)
class CertifyCondition:
    """A comparison of a rate, of an end of its interval, or of a radius with a threshold.

    Example:
        >>> parse_certify_condition("certified@0.25.low < 50%").radius
        0.25
    """

    comparison: Comparison
    quantity: str
    radius: float | None

    @property
    def text(self) -> str:
        """The condition as it was written."""
        return self.comparison.text

    def holds(self, summary: CertifySummary) -> bool:
        """Whether the condition is true; of a rate over no images every condition is.

        Raises:
            UserError: the radius is none of those that the run counts at.
        """
        if self.quantity in _RADII:
            return self.comparison.holds_for(float(getattr(summary, self.quantity)))
        return self.comparison.holds_for(self._rate(summary))

    def _rate(self, summary: CertifySummary) -> Rate | None:
        if self.quantity in ("abstained", "correct"):
            found: Rate | None = getattr(summary, self.quantity)
            return found
        if self.radius is None:
            return summary.certified_correct if self.quantity == "certified_correct" else _not(summary.abstained)
        for point in summary.at:
            if point.radius == self.radius:
                return point.certified if self.quantity == "certified" else point.correct
        known = ", ".join(format_exact(point.radius) for point in summary.at)
        raise UserError(
            f"'{self.text}' asks about the radius {format_exact(self.radius)}, the run counts at {known}: "
            f"see {setting('at')}"
        )


def parse_certify_condition(text: str) -> CertifyCondition:
    """Return the condition of `QUANTITY[@RADIUS][.low|.high] (>|<|>=|<=) NUMBER[%]`, or raise a UserError."""
    found = parse_comparison(text, _LEFT, example="certified@0.25<50% or mean_radius<0.1")
    match = _LEFT.fullmatch(found.left)
    assert match is not None, "the comparison was read by this pattern"
    quantity, radius = match.groups()
    if quantity not in (*_RATES, *_RADII):
        hint = nearest(quantity, [*_RATES, *_RADII])
        raise UserError(f"unknown quantity '{quantity}' in the condition '{text}': {hint}")
    if radius is not None and quantity not in _AT_RADIUS:
        raise UserError(f"'{quantity}' in the condition '{text}' has no radius: leave out @{radius}")
    if quantity in _RATES:
        found.require_share()
    elif found.part != "value" or found.percent:
        raise UserError(f"'{quantity}' in the condition '{text}' is a radius: compare it with a plain number")
    try:
        return CertifyCondition(found, quantity, None if radius is None else float(radius))
    except ValueError:
        raise UserError(f"the radius '{radius}' in the condition '{text}' is no number") from None


def _not(rate: Rate) -> Rate:
    """Return the rate of the opposite."""
    return Rate(
        successes=rate.total - rate.successes,
        total=rate.total,
        value=None if rate.value is None else 1.0 - rate.value,
        low=1.0 - rate.high,
        high=1.0 - rate.low,
        confidence=rate.confidence,
        method=rate.method,
    )
