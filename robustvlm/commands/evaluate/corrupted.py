"""What an evaluation finds on corrupted images: answers as they come, a row for each, and the numbers made of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from robustvlm.data.corruptions import NAMES, SEVERITIES, Corruption, parse_corruptions, weights_of
from robustvlm.report import sections as doc
from robustvlm.report.words import DASH, as_rate, interval, percent
from robustvlm.stats import Mean, Rate, mean_share, rate, worth_of


class Labelled(Protocol):
    """An image of a known class: its place in source order, its id and its label."""

    @property
    def index(self) -> int: ...
    @property
    def image_id(self) -> str: ...
    @property
    def label(self) -> int: ...


class Answer(NamedTuple):
    """What the model says of one image: class and softmax probability; `accepted` of a model that may refuse."""

    prediction: int
    confidence: float
    accepted: bool | None = None

    def right(self, label: int) -> bool:
        """Whether it is the label, and accepted."""
        return self.prediction == label and self.accepted is not False


Answers = dict[str, dict[int, Answer]]
"""Answers by corruption (`fog:3`) and by the image's place in source order."""


class Corrupted(BaseModel):
    """The labelled images under one corruption: the share that is right (and accepted), and that is rejected.

    Of a model that abstains, what is rejected is what it gives no answer to; of one that may do both, either.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    severity: int
    accuracy: Rate
    rejected: Rate | None = None


class Corruptions(BaseModel):
    """Accuracy under common corruptions.

    Args:
        side: severities are those defined for images of this side.
        accuracy: mean corruption accuracy: over the severities of a kind, then over the kinds. Its interval is
            Student's over images, each with its own mean; exact where every image is right under all or under none.
            rejected: likewise, of a model that may refuse.
        found: every kind at every severity, in the order of the kinds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    side: int
    accuracy: Mean
    rejected: Mean | None = None
    found: list[Corrupted]


SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("image_id", pa.string()),
        ("label", pa.int32()),
        ("corruption", pa.string()),
        ("severity", pa.int32()),
        ("prediction", pa.int32()),
        ("correct", pa.bool_()),
        ("confidence", pa.float64()),
        ("accepted", pa.bool_()),
    ]
)


def as_fact(answers: Answers) -> dict[str, Any]:
    """Return a batch's answers as a line of the journal holds them."""
    index = sorted({place for of in answers.values() for place in of})
    columns = {
        text: {field: [getattr(of[place], field) for place in index] for field in Answer._fields}
        for text, of in answers.items()
    }
    return {"kind": "corrupted", "index": index, "answers": columns}


def from_fact(fact: dict[str, Any]) -> Answers:
    """Return the answers of a journal's line.

    Example:
        >>> answers = {"fog:3": {7: Answer(2, 0.5)}}
        >>> from_fact(as_fact(answers)) == answers
        True
    """
    return {
        text: dict(
            zip(
                fact["index"],
                (Answer(*values) for values in zip(*(columns[field] for field in Answer._fields), strict=True)),
                strict=True,
            )
        )
        for text, columns in fact["answers"].items()
    }


@dataclass(frozen=True)
class _Column:
    """All labelled images under one corruption, in source order."""

    name: str
    severity: int
    answers: list[Answer]


def _columns(rows: Sequence[Labelled], answers: Answers) -> Iterator[_Column]:
    order = parse_corruptions(",".join(answers)) if answers else ()
    for one in order:
        yield _Column(one.name, one.severity, [answers[one.text][row.index] for row in rows])


def measured(
    known: Sequence[Labelled], answers: Answers, side: int, *, group: Callable[[str], str] = str
) -> Corruptions | None:
    """Return the numbers of the labelled images' answers; None where nothing was corrupted.

    Images of one `group` of ids are no independent evidence, and count once in intervals.

    Example:
        >>> from robustvlm.commands.evaluate.record import ImageRow
        >>> rows = [ImageRow(0, "a", 1, correct=True), ImageRow(1, "b", 0, correct=True)]
        >>> found = measured(rows, {"fog:1": {0: Answer(1, 0.9), 1: Answer(1, 0.9)}}, 64)
        >>> found.accuracy.value, found.found[0].accuracy.successes
        (0.5, 1)
    """
    columns = list(_columns(known, answers))
    if not columns or not known:
        return None
    weights = np.array(weights_of([Corruption(column.name, column.severity) for column in columns]))
    hits = np.array([[answer.right(row.label) for row, answer in zip(known, column.answers, strict=True)]
                     for column in columns])  # fmt: skip
    refused = np.array([[answer.accepted is False for answer in column.answers] for column in columns])
    refuses, worth = columns[0].answers[0].accepted is not None, worth_of(group(row.image_id) for row in known)
    found = [
        Corrupted(
            name=column.name,
            severity=column.severity,
            accuracy=rate(int(hits[row].sum()), len(known), independent=worth),
            rejected=rate(int(refused[row].sum()), len(known), independent=worth) if refuses else None,
        )
        for row, column in enumerate(columns)
    ]
    return Corruptions(
        side=side,
        accuracy=mean_share((weights @ hits).tolist(), independent=worth),
        rejected=mean_share((weights @ refused).tolist(), independent=worth) if refuses else None,
        found=found,
    )


def table_of(known: Sequence[Labelled], answers: Answers) -> pa.Table:
    """Return a row for each labelled image and corruption."""
    rows = [
        {
            "index": row.index, "image_id": row.image_id, "label": row.label, "corruption": column.name,
            "severity": column.severity, "prediction": answer.prediction, "correct": answer.right(row.label),
            "confidence": answer.confidence, "accepted": answer.accepted,
        }
        for column in _columns(known, answers)
        for row, answer in zip(known, column.answers, strict=True)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)


# What is said of them


def sentence(found: Corruptions, clean: Rate) -> str:
    """Return in a sentence what is left of the accuracy, and where the least is."""
    worst = min(found.found, key=lambda one: one.accuracy.value or 0.0)
    kinds = len({one.name for one in found.found})
    over = f"{kinds} kinds of corruption" if kinds > 1 else found.found[0].name.replace("-", " ")
    least = f", the least under {worst.name.replace('-', ' ')} at severity {worst.severity}: "
    said = f"Under {over} it is right on {_percent(found.accuracy)} on average, where it is on {percent(clean.value)} "
    return f"{said}without{least}{percent(worst.accuracy.value)}."


def _percent(found: Mean) -> str:
    if found.value is None or found.low is None or found.high is None:
        return percent(found.value)
    return f"{percent(found.value)} ({interval(as_rate(found))})"


def blocks(
    found: Corruptions | None, clean: Rate, refused: Rate | None, *, what: str = "Refused"
) -> Iterator[doc.Block]:
    """Yield the tables: kinds by severities, of right answers and, of a model that may refuse, of refusals (`what`)."""
    if found is None:
        return
    of = f"Severities are those of images of {found.side} pixels. Intervals of single figures are in summary.json."
    accuracy = {(one.name, one.severity): one.accuracy for one in found.found}
    yield _table("Right under common corruptions", accuracy, clean, found.accuracy, of)
    if refused is not None and found.rejected is not None:
        rejected = {(one.name, one.severity): one.rejected for one in found.found if one.rejected is not None}
        yield _table(f"{what} under common corruptions", rejected, refused, found.rejected, "Of the labelled images.")


def _table(title: str, cells: dict[tuple[str, int], Rate], clean: Rate, over: Mean, caption: str) -> doc.Table:
    severities = [level for level in SEVERITIES if any(level == at for _, at in cells)]
    several = len(severities) > 1
    rows: list[doc.Row] = [("none", *[""] * len(severities[:-1]), doc.Measure.of(clean))]
    if several:
        rows = [("none", *[""] * len(severities), doc.Measure.of(clean))]
    for name in NAMES:
        own = [cells.get((name, level)) for level in severities]
        values = [one.value for one in own if one is not None and one.value is not None]
        if values:
            shown = [DASH if one is None else doc.Measure.bare(one) for one in own]
            rows.append(
                (name.replace("-", " "), *shown, *([doc.Measure.bare(sum(values) / len(values))] if several else []))
            )
    rows.append(("mean", *[""] * (len(severities) - 1 + several), doc.Measure.of(as_rate(over))))
    heads = [doc.Column(str(level), number=True, group="severity") for level in severities]
    columns = [doc.Column("Corruption"), *heads, *([doc.Column("mean", number=True)] if several else [])]
    return doc.Table(columns, rows, title=title, caption=caption, strong=frozenset({len(rows) - 1}))
