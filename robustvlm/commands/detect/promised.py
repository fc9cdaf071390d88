"""Answers that are right as often as was promised: which images every score answers, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustvlm.commands.detect import measures
from robustvlm.commands.detect.measures import Scored
from robustvlm.commands.detect.summary import DetectSummary, LowestClass, Promised, PromisedScore, WrongAnswers
from robustvlm.data.source import select
from robustvlm.detect import Promise, promise
from robustvlm.errors import BadSetting
from robustvlm.report import sections as doc
from robustvlm.report.words import DASH, count_of, percent, plain
from robustvlm.runs.records import Check
from robustvlm.stats import Rate

CONFIDENCE = 0.95
BY_CLASS = "class"


@dataclass(frozen=True)
class Level:
    """What is promised: a share of right answers, of all answers together or of those of each class that is said.

    Example:
        >>> read_level("90%:class")
        Level(value=0.9, by_class=True)
    """

    value: float
    by_class: bool

    @property
    def text(self) -> str:
        """As the manifest has it."""
        return f"{self.value:g}:{BY_CLASS}" if self.by_class else f"{self.value:g}"


def read_level(text: str) -> Level:
    """Read `LEVEL[:class]`, the level a share such as 0.9 or 90%.

    Raises:
        UserError: it is none.
    """
    share, colon, of = text.strip().partition(":")
    try:
        value = float(share.strip().removesuffix("%")) / (100 if share.strip().endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1 or (colon and of.strip() != BY_CLASS):
        raise BadSetting("promise", "takes a share between 0 and 1 with or without ':class', as 0.9:class", got=text)
    return Level(value, bool(colon))


@dataclass(frozen=True, eq=False)
class Rules:
    """The promise of every score, and which images made and judge it: rows of the known images, one of each group."""

    level: Level
    calibration: NDArray[np.int64]
    judged: NDArray[np.int64]
    of: Mapping[str, Promise]


def rules_of(known: Scored, level: Level, classes: int) -> Rules:
    """Return the rules that half of the known images set, chosen by a hash; the other half says where to look.

    Images of one group are no independent evidence, and a promise needs such: one image of each group is used, chosen
    by a hash too, as the first of all groups may be alike.
    """
    order = one_of_each(known)
    calibration, judged = (np.array(sorted(order[start::2]), dtype=np.int64) for start in (0, 1))
    said, right = np.array(known.predictions), np.array(known.predictions) == np.array(known.labels)
    found = {
        name: promise(
            values[calibration],
            said[calibration],
            right[calibration],
            level=level.value,
            confidence=CONFIDENCE,
            classes=classes if level.by_class else None,
            looks=(values[judged], said[judged]),
        )
        for name, values in known.scores.items()
    }
    return Rules(level, calibration, judged, found)


def one_of_each(part: Scored) -> list[int]:
    """Return a row of every group of a set, in an order and by a choice that follow from hashes of the ids."""
    row_of = {name: row for row, name in enumerate(part.ids)}
    chosen: dict[str, int] = {}
    for name in select(row_of, None):
        chosen.setdefault(part.groups[row_of[name]], row_of[name])
    return list(chosen.values())


def summarise(
    rules: Rules,
    known: Scored,
    unknown: Sequence[Scored],
    class_names: Sequence[str],
    attacked: Mapping[str, WrongAnswers],
) -> Promised:
    """Return what the answers of every score are worth on the half of the known images that judges them."""
    return Promised(
        level=rules.level.value,
        confidence=CONFIDENCE,
        by_class=rules.level.by_class,
        calibration=len(rules.calibration),
        judged=len(rules.judged),
        scores=[
            _of_score(name, rule, rules.judged, known, unknown, class_names, attacked.get(name))
            for name, rule in rules.of.items()
        ],
    )


def _of_score(
    name: str,
    rule: Promise,
    judged: NDArray[np.int64],
    known: Scored,
    unknown: Sequence[Scored],
    class_names: Sequence[str],
    attacked: WrongAnswers | None,
) -> PromisedScore:
    said, labels = np.array(known.predictions)[judged], np.array(known.labels)[judged]
    answered = rule.answered(known.scores[name][judged], said)
    shares = {k: measures.share((labels == k)[answered & (said == k)]) for k in np.unique(said[answered]).tolist()}
    worst = min(shares, key=lambda k: (shares[k].value or 0.0, k), default=None)
    return PromisedScore(
        name=name,
        title=measures.title_of(name),
        thresholds=[None if math.isinf(value) else value for value in rule.thresholds],
        answered=measures.share(answered),
        right=measures.share((said == labels)[answered]) if answered.any() else None,
        lowest=None if worst is None else LowestClass(class_name=class_names[worst], right=shares[worst]),
        unknown={part.name: _answered(name, rule, part) for part in unknown},
        attacked=attacked,
    )


def _answered(name: str, rule: Promise, part: Scored) -> Rate:
    rows = np.array(one_of_each(part), dtype=np.int64)
    return measures.share(rule.answered(part.scores[name][rows], np.array(part.predictions)[rows]))


def promise_of(found: Promised, name: str) -> Promise | None:
    """Return the rule of a score out of a finished run's summary; None where the run has no such score."""
    for score in found.scores:
        if score.name == name:
            thresholds = tuple(math.inf if value is None else value for value in score.thresholds)
            return Promise(found.level, found.confidence, thresholds)
    return None


# What is said of it


def remarks(found: Promised | None) -> Iterator[Check]:
    """Yield the scores whose promise answers nothing."""
    if found is None:
        return
    silent = [score.title for score in found.scores if all(value is None for value in score.thresholds)]
    if silent:
        message = (
            f"{count_of(found.calibration, 'independent images')} cannot show {percent(found.level)} right "
            f"{_whose(found)} for {plain(', '.join(silent), 300)}: nothing is answered. Pass more images, or promise "
            "less."
        )
        yield Check(name="no promise", level="warning", message=message)


def _whose(found: Promised) -> str:
    return "in any class" if found.by_class else "among the answers"


def _fullest(found: Promised) -> PromisedScore:
    """Return the score that answers the most of the known images; of equal ones the one with fewer strangers."""
    return max(found.scores, key=lambda one: (one.answered.successes, -sum(r.successes for r in one.unknown.values())))


def sentence(summary: DetectSummary) -> str:
    """Say which score answers most under the promise, how right it is and what attacks make of it."""
    found = summary.promised
    if found is None:
        return ""
    best = _fullest(found)
    what = f"Promised {percent(found.level)} right {'in each class' if found.by_class else 'of all answers'}"
    within = f", in {best.promised} of {len(best.thresholds)} classes" if found.by_class else ""
    if best.right is None:
        return f"{what}, no score answers any image."
    strangers = ", ".join(f"{percent(one.value)} of {plain(name, 40)}" for name, one in best.unknown.items())
    under = best.attacked
    attacked = ""
    if under is not None and under.attacked.successes > under.clean.successes:
        attacked = (
            f" Under attack the promise is void: wrong answers from {percent(under.clean.value)} to "
            f"{percent(under.attacked.value)} of the images."
        )
    return (
        f"{what}, {best.title} answers most: {percent(best.answered.value)} of the known images{within}, "
        f"{percent(best.right.value)} of these right, and of the unknown ones, which no promise covers, {strangers}."
        f"{attacked}"
    )


def section(summary: DetectSummary) -> Iterator[doc.Section]:
    """Yield the section of the report: what every score answers, and how right it is."""
    found = summary.promised
    if found is None:
        return
    whose = "the answers of each class" if found.by_class else "all answers together"
    lead = (
        f"From which score on a prediction is an answer, so that of {whose} {percent(found.level)} are right or more, "
        f"with confidence {percent(found.confidence)}. {count_of(found.calibration, 'known images')} set the "
        f"thresholds, by exact binomial tests in a fixed sequence; {count_of(found.judged, 'others')} are judged here."
    )
    under = any(score.attacked is not None for score in found.scores)
    columns = [doc.Column("Score"), *doc.numbers("answered", "right of these"), doc.Column("lowest class", number=True)]
    columns += [doc.Column("classes with a threshold", number=True)] if found.by_class else []
    columns += [doc.Column(plain(part.name, 40), number=True, group="unknown, answered") for part in summary.unknown]
    if under:
        columns += [doc.Column(when, number=True, group="wrong answers") for when in ("clean", "attacked")]
    rows: list[doc.Row] = [_row(score, found.by_class, under) for score in found.scores]
    caption = (
        "Nothing is promised of images drawn otherwise, of unknown classes, or of attacked ones. One image of each "
        "drawing counts. The confidence is that of each score by itself, not of the best of several. Lowest class: of "
        "those said, the one with the smallest share of answers right, and how many of how many."
    )
    if under:
        caption += " Attacked: by somebody who knows score and thresholds and wants a wrong answer."
    blocks: list[doc.Block] = [doc.Text(lead, kind="lead"), doc.Table(columns, rows, caption=caption)]
    title = f"Answers promised to be {percent(found.level)} right"
    yield doc.Section(title, blocks, key="promise", short="Promise")


def _row(score: PromisedScore, by_class: bool, under: bool) -> doc.Row:
    lowest = (
        DASH
        if score.lowest is None
        else f"{percent(score.lowest.right.value)} {plain(score.lowest.class_name, 30)} "
        f"({score.lowest.right.successes} of {score.lowest.right.total})"
    )
    cells: list[doc.Line] = [
        doc.Measure.of(score.answered),
        doc.Measure.of(score.right),
        lowest,
        *([f"{score.promised} of {len(score.thresholds)}"] if by_class else []),
        *(doc.Measure.bare(one) for one in score.unknown.values()),
    ]
    if under:
        pair = (None, None) if score.attacked is None else (score.attacked.clean, score.attacked.attacked)
        cells += [DASH if one is None else doc.Measure.of(one) for one in pair]
    return (score.title, *cells)
