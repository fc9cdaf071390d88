"""Predictions written and read back: nothing is lost, whatever names there are, and nothing is a formula."""

from __future__ import annotations

import csv
import io
import json
import re
import string
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from robustvlm.commands.predict.record import (
    ABSTAINED,
    ANSWERED,
    FAILED,
    REJECTED,
    SINKS,
    UNREADABLE,
    About,
    Counts,
    Prediction,
    inert,
    opened,
    plain_row,
    table_of,
    verdict_of,
)
from robustvlm.report.screen import show
from robustvlm.text import visible

# Names as files and classes may bear them: anything that is text, with what formulas, terminals and CSV hang on.
HOSTILE = "=+-@'\",;\t\r\n\x00\x07\x1b\x7f\x85\x9b\u202e\u2028\ufeff\uff1d\uff20\\ [/b]{}"
NAMES = st.text(st.one_of(st.sampled_from(HOSTILE), st.characters(exclude_categories=["Cs"])), min_size=1, max_size=12)
VALUES = st.floats(0, 1)
ROWS = st.one_of(
    st.builds(
        Prediction,
        NAMES,
        st.sampled_from([ANSWERED, REJECTED, ABSTAINED]),
        st.none() | NAMES,
        VALUES,
        st.tuples(st.tuples(NAMES, VALUES), st.tuples(NAMES, VALUES)),
        st.none() | st.floats(allow_nan=False, allow_infinity=False),
        st.none() | VALUES,
    ),
    st.builds(Prediction, NAMES, st.sampled_from([UNREADABLE, FAILED]), reason=NAMES),
)
ABOUT = About("tiny", "d1", "the class with the largest logit", ("cat", "=dog"), refuses=True, top=2)
STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\ufeff]")


def written(form: str, rows: list[Prediction], pieces: int = 1) -> bytes:
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out"
        with opened(form, path, ABOUT, counts) as sink:
            assert not path.exists()
            for start in range(pieces):
                part = rows[start::pieces] if pieces > 1 else rows
                for row in part:
                    counts.add(row)
                sink.write(part)
        return path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, max_size=5))
def test_json_and_parquet_give_back_what_was_written(rows: list[Prediction]) -> None:
    whole = json.loads(written("json", rows))
    assert whole["predictions"] == [plain_row(row) for row in rows]
    assert whole["counts"].pop("images") == len(rows)
    assert sum(whole["counts"].values()) == len(rows)
    lines = written("jsonl", rows).decode("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [plain_row(row) | {"rule": ABOUT.rule} for row in rows]
    table = pq.read_table(io.BytesIO(written("parquet", rows)))
    assert table.to_pylist() == [plain_row(row) | {"rule": ABOUT.rule} for row in rows]
    assert json.loads(table.schema.metadata[b"robustvlm.classes"]) == list(ABOUT.class_names)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, max_size=5))
def test_no_text_format_steers_a_terminal(rows: list[Prediction]) -> None:
    for form in ("csv", "json", "jsonl"):
        assert not STEERING.search(written(form, rows).decode("utf-8"))


def unquoted(cell: str) -> str:
    """The text of a cell: what `inert` puts before a formula taken away."""
    return cell[1:] if re.match("'+[=+\\-@\uff1d\uff0b\uff0d\uff20]", cell) else cell


@settings(max_examples=100, deadline=None)
@given(st.lists(ROWS, max_size=5))
def test_csv_gives_back_every_text_as_it_is_shown(rows: list[Prediction]) -> None:
    found = list(csv.DictReader(io.StringIO(written("csv", rows).decode("utf-8"), newline="")))
    assert len(found) == len(rows)
    for cells, row in zip(found, rows, strict=True):
        texts = {"image": row.image, "class": row.class_name, "reason": row.reason}
        texts |= {f"top_{place}": name for place, (name, _) in enumerate(row.top, 1)}
        for column, text in texts.items():
            assert unquoted(cells[column]) == ("" if text is None else visible(text, lines=False))
        values = {"confidence": row.confidence, "score": row.score, "threshold": row.threshold}
        values |= {f"probability_{place}": value for place, (_, value) in enumerate(row.top, 1)}
        for column, value in values.items():
            assert (float(cells[column]) if cells[column] else None) == value


@given(NAMES)
def test_no_cell_is_a_formula_and_one_quote_gives_the_text_back(name: str) -> None:
    cell = inert(name)
    try:
        float(cell)
    except ValueError:
        assert cell[0] not in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
    assert unquoted(cell) == visible(name, lines=False)


@given(st.text(string.printable, max_size=8), st.text(string.printable, max_size=8))
def test_two_shown_texts_are_two_cells(one: str, other: str) -> None:
    same = visible(one, lines=False) == visible(other, lines=False)
    assert (inert(one) == inert(other)) == same


@pytest.mark.parametrize("form", SINKS)
def test_rows_in_pieces_are_the_same_rows(form: str) -> None:
    rows = [Prediction(f"{n}.png", ANSWERED, "cat", n / 30, (("cat", n / 30), ("=dog", 0.0))) for n in range(20)]
    order = [row for start in range(3) for row in rows[start::3]]
    if form == "parquet":
        tables = [pq.read_table(io.BytesIO(written(form, *made))) for made in ((rows, 3), (order, 1))]  # type: ignore[misc]
        assert tables[0] == tables[1]
    else:
        assert written(form, rows, 3) == written(form, order)


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("before")
    with pytest.raises(AttributeError), opened("csv", path, ABOUT, Counts()) as sink:
        sink.write([Prediction("a", ANSWERED, "cat", 0.5, (("cat", 0.5),)), None])  # type: ignore[list-item]
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]


def test_what_is_not_finite_is_null() -> None:
    row = Prediction("a", ANSWERED, "cat", 0.5, (("cat", 0.5),), 0.1, float("-inf"))
    assert json.loads(written("jsonl", [row]))["threshold"] is None
    assert pq.read_table(io.BytesIO(written("parquet", [row])))["threshold"].to_pylist() == [None]


@settings(max_examples=40, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_the_table_keeps_to_80_columns(rows: list[Prediction]) -> None:
    stream, counts = io.StringIO(), Counts()
    for row in rows:
        counts.add(row)
    show(Console(file=stream, width=80), [table_of(rows, ABOUT), verdict_of(counts, ABOUT)])
    lines = stream.getvalue().split("\n")
    assert max(map(cell_len, lines)) <= 80
    assert not STEERING.search(stream.getvalue())
    assert f"{len(rows)} image{'s' * (len(rows) > 1)}: {counts.status[ANSWERED]} answered" in stream.getvalue()


def test_the_verdict_counts_every_end() -> None:
    counts = Counts()
    for number in range(8):
        counts.add(Prediction("a", ANSWERED, f"class {number}", 0.5))
    counts.add(Prediction("b", REJECTED, None, 0.5))
    counts.add(Prediction("c", ABSTAINED, None, 0.5))
    counts.add(Prediction("d", UNREADABLE, reason="empty file"))
    counts.add(Prediction("e", FAILED, reason="NaN"))
    first, classes, rule = verdict_of(counts, ABOUT).lines
    assert first == "12 images: 8 answered, 1 rejected, 1 abstained, 1 unreadable, 1 failed."
    assert "".join(getattr(part, "text", part) for part in classes).endswith(", and 2 others.")
    assert rule == f"Rule: {ABOUT.rule}."
    assert (counts.images, counts.faults, counts.first_fault and counts.first_fault.image) == (12, 2, "d")
