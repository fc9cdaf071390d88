"""Predictions as they are written: a row for each image, as a table, CSV, JSON, JSON lines or Parquet."""

import csv
import io
import json
import math
import os
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from robustvlm.core.files import replacing
from robustvlm.report.sections import Code, Column, Inline, Line, Name, Row, Small, Table, Verdict, numbers
from robustvlm.report.words import count_of, percent, plain
from robustvlm.text import visible, visible_json

ANSWERED, REJECTED, ABSTAINED = "answered", "rejected", "abstained"
UNREADABLE, FAILED = "unreadable", "failed"

_ROWS_PER_GROUP = 8192
# What a spreadsheet takes for a formula, behind any number of the quotes that keep it from doing so.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: its path, or its id in the data.
        status: "answered"; "rejected" by a model that may refuse; "abstained" where the draws of a smoothed one do not
            decide; "unreadable"; "failed" where the model's output is not finite.
        class_name: the answer, None without one.
        confidence: softmax probability of the answer, of the likeliest class where there is none.
        top: the likeliest classes and their probabilities, also of an image that is rejected.
        score, threshold: of a model that may refuse, which accepts an image exactly if score > threshold.
        reason: why there is no answer, of an image that is unreadable or failed.
    """

    image: str
    status: str
    class_name: str | None = None
    confidence: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    score: float | None = None
    threshold: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class About:
    """What all predictions have in common: the model, its rule in words, its classes, how many of them a row names."""

    model: str
    fingerprint: str
    rule: str
    class_names: tuple[str, ...]
    refuses: bool = False
    top: int = 1


@dataclass
class Counts:
    """How many images ended in which way, and how many answers each class got."""

    status: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    first_fault: Prediction | None = None

    def add(self, row: Prediction) -> None:
        """Count a row."""
        self.status[row.status] += 1
        if row.class_name is not None:
            self.classes[row.class_name] += 1
        if row.reason is not None and self.first_fault is None:
            self.first_fault = row

    @property
    def images(self) -> int:
        """All images."""
        return self.status.total()

    @property
    def faults(self) -> int:
        """Images that could not be read, or of which the model says nothing."""
        return self.status[UNREADABLE] + self.status[FAILED]


def plain_row(row: Prediction) -> dict[str, object]:
    """Return a row as JSON has it.

    Example:
        >>> plain_row(Prediction("a.png", UNREADABLE, reason="empty file"))["reason"]
        'empty file'
    """
    return {
        "image": row.image,
        "status": row.status,
        "class": row.class_name,
        "confidence": row.confidence,
        "top": [{"class": name, "probability": value} for name, value in row.top],
        "score": _finite(row.score),
        "threshold": _finite(row.threshold),
        "reason": row.reason,
    }


def inert(text: str) -> str:
    r"""Return a text as a cell that no spreadsheet computes and no terminal obeys.

    Control characters are written as escapes; before what would be a formula stands a quote, as before a text that
    looks like one so quoted, so that taking one quote away gives the text back. Numbers stay numbers.

    Example:
        >>> inert("=1+2"), inert("'=1"), inert("-5"), inert("a\x1b[2J"), inert("'tis")
        ("'=1+2", "''=1", '-5', 'a\\x1b[2J', "'tis")
    """
    text = visible(text, lines=False)
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def table_of(rows: Sequence[Prediction], about: About) -> Table:
    """Return rows as a table for the terminal."""
    columns = [Column("Image"), Column("Answer"), *numbers("Confidence")]
    columns += numbers("Score", "Threshold") if about.refuses else []
    columns += [Column("Likeliest")] if about.top > 1 else []
    return Table(columns, [_cells(row, about) for row in rows], only="terminal")


def verdict_of(counts: Counts, about: About) -> Verdict:
    """Return the closing sentences: how many images, which answers, and by which rule."""
    said = [f"{counts.status[ANSWERED]:,} answered"]
    said += [f"{counts.status[what]:,} {what}" for what in (REJECTED, ABSTAINED, UNREADABLE, FAILED)]
    ended = ", ".join(text for number, text in enumerate(said) if number == 0 or not text.startswith("0 "))
    lines: list[Line] = [f"{count_of(counts.images, 'images')}: {ended}."]
    if counts.classes:
        most = counts.classes.most_common(6)
        words: list[Inline] = ["Classes: "]
        for number, (name, count) in enumerate(most):
            words += [", " if number else "", f"{count:,} ", Name(name)]
        left = len(counts.classes) - len(most)
        words.append(f", and {left} other{'s' * (left > 1)}." if left else ".")
        lines.append(words)
    lines.append(f"Rule: {about.rule}.")
    if 0 < counts.status[ABSTAINED] == counts.images - counts.faults:
        lines.append("No image was decided: more draws (+smooth:SIGMA:N0) or a larger alpha decide more.")
    return Verdict(lines)


class Sink(ABC):
    """Where rows are written as they come."""

    def __init__(self, about: About, file: BinaryIO) -> None:
        self.about, self.file = about, file

    @abstractmethod
    def write(self, rows: Sequence[Prediction]) -> None:
        """Write some rows."""

    def close(self, counts: Counts) -> None:
        """Write what comes behind the last row."""
        del counts

    def _say(self, text: str) -> None:
        self.file.write(text.encode("utf-8"))


class JsonLines(Sink):
    """A JSON object a line, each with the rule."""

    def write(self, rows: Sequence[Prediction]) -> None:
        self._say("".join(_json(plain_row(row) | {"rule": self.about.rule}) + "\n" for row in rows))


class Json(Sink):
    """One JSON object: the model, its rule and classes, the rows, and how many images ended in which way."""

    def __init__(self, about: About, file: BinaryIO) -> None:
        super().__init__(about, file)
        head = {"model": about.model, "fingerprint": about.fingerprint, "rule": about.rule}
        self._say(_json(head | {"classes": list(about.class_names)})[:-1] + ', "predictions": [')
        self._between = "\n"

    def write(self, rows: Sequence[Prediction]) -> None:
        for row in rows:
            self._say(self._between + _json(plain_row(row)))
            self._between = ",\n"

    def close(self, counts: Counts) -> None:
        self._say(f'\n], "counts": {_json({"images": counts.images, **counts.status})}}}\n')


class Csv(Sink):
    """Comma-separated values, UTF-8, with a heading; texts as `inert` makes them."""

    def __init__(self, about: About, file: BinaryIO) -> None:
        super().__init__(about, file)
        top = [f"{what}_{place}" for place in range(1, about.top + 1) for what in ("top", "probability")]
        self._cells(["image", "status", "class", "confidence", "score", "threshold", *top, "rule", "reason"])

    def write(self, rows: Sequence[Prediction]) -> None:
        for row in rows:
            top: list[str | float | None] = [part for pair in row.top for part in pair]
            top += [None] * (2 * self.about.top - len(top))
            score, threshold = _finite(row.score), _finite(row.threshold)
            start = [row.image, row.status, row.class_name, row.confidence, score, threshold]
            self._cells([*start, *top, self.about.rule, row.reason])

    def _cells(self, cells: Sequence[str | float | None]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(inert(cell) if isinstance(cell, str) else cell for cell in cells)
        self._say(line.getvalue())


class Parquet(Sink):
    """A Parquet file; `top` is a list of class and probability, the model stands in the schema's metadata."""

    def __init__(self, about: About, file: BinaryIO) -> None:
        super().__init__(about, file)
        self._schema = schema_of(about)
        self._writer = pq.ParquetWriter(file, self._schema)
        self._waiting: list[Prediction] = []

    def write(self, rows: Sequence[Prediction]) -> None:
        self._waiting += rows
        if len(self._waiting) >= _ROWS_PER_GROUP:
            self._flush()

    def close(self, counts: Counts) -> None:
        del counts
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(arrow_of(self._waiting, self.about))
        self._waiting = []


SINKS: dict[str, type[Sink]] = {"csv": Csv, "json": Json, "jsonl": JsonLines, "parquet": Parquet}


def schema_of(about: About) -> pa.Schema:
    """Return the columns of predictions in Arrow's terms."""
    top = pa.list_(pa.struct([("class", pa.string()), ("probability", pa.float64())]))
    texts, values = pa.dictionary(pa.int32(), pa.string()), pa.float64()
    kinds = [("image", pa.string()), ("status", texts), ("class", texts), ("confidence", values), ("top", top)]
    kinds += [("score", values), ("threshold", values), ("reason", pa.string()), ("rule", texts)]
    facts = {"model": about.model, "fingerprint": about.fingerprint, "classes": json.dumps(about.class_names)}
    return pa.schema(kinds, metadata={f"robustvlm.{key}": value for key, value in facts.items()})


def arrow_of(rows: Sequence[Prediction], about: About) -> pa.Table:
    """Return predictions as an Arrow table."""
    return pa.Table.from_pylist([plain_row(row) | {"rule": about.rule} for row in rows], schema=schema_of(about))


@contextmanager
def opened(form: str, to: Path | None, about: About, counts: Counts) -> Iterator[Sink]:
    """Yield a sink for rows; at the end `counts` is written behind them where the format has a place for it.

    A file is there when it is whole, and not before; None is standard output, and what is no regular file (a pipe) is
    written as the rows come.
    """
    if to is None:
        sys.stdout.flush()
        with _closed(SINKS[form](about, sys.stdout.buffer), counts) as sink:
            yield sink
        sys.stdout.buffer.flush()
    elif to.exists() and not to.is_file():
        with to.open("wb") as file, _closed(SINKS[form](about, file), counts) as sink:
            yield sink
    else:
        # A link stays one, and what it leads to is replaced.
        with (
            replacing(Path(os.path.realpath(to))) as temporary,
            temporary.open("wb") as file,
            _closed(SINKS[form](about, file), counts) as sink,
        ):
            yield sink


@contextmanager
def _closed(sink: Sink, counts: Counts) -> Iterator[Sink]:
    yield sink
    sink.close(counts)


def _cells(row: Prediction, about: About) -> Row:
    answer: Line = Name(row.class_name or "")
    if row.status in (REJECTED, ABSTAINED):
        answer = Small(row.status)
    elif row.reason is not None:
        answer = [f"{row.status}: ", Small(plain(row.reason))]
    cells: list[Line] = [Code(row.image), answer, "" if row.confidence is None else percent(row.confidence)]
    if about.refuses:
        cells += ["" if value is None else f"{value:.4g}" for value in (row.score, row.threshold)]
    if about.top > 1:
        cells.append(", ".join(f"{plain(name)} {percent(value)}" for name, value in row.top))
    return cells


def _json(value: object) -> str:
    return visible_json(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
