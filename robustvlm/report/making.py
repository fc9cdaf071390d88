"""What commands without a page of their own say of what they made: soups, tuned prompts and built pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustvlm.report.sections import Block, Checks, Code, Column, Line, Measure, Name, Row, Table, Text, numbers
from robustvlm.report.tables import LEVELS, Finding
from robustvlm.report.wording import percent
from robustvlm.stats import Mean, Rate


def soup_blocks(
    tasted: Sequence[tuple[str, bool, float | None]], measures: Mapping[str, Rate | Mean | float]
) -> list[Block]:
    """Return what became of each ingredient (name, whether it was kept, value of the soup with it) and the measures."""
    valued = any(value is not None for _, _, value in tasted)
    columns = [Column("Ingredient"), Column(""), *(numbers("Soup with it") if valued else [])]
    ingredients: list[Row] = [
        (Code(name), "kept" if kept else "left out", *([percent(value)] if valued else []))
        for name, kept, value in tasted
    ]
    rows: list[Row] = [(name, Measure.of(value)) for name, value in measures.items()]
    return [
        Table(columns, ingredients, title="Ingredients"),
        Table([Column("Measure"), Column("Value, 95% interval")], rows, title="The soup"),
    ]


def prompt_blocks(record: Mapping[str, Any], *, val: str | None, ood: Sequence[str]) -> list[Block]:
    """Return what is said of tuned prompts: how training ended, and their measures beside those of the hand's."""
    loss = record["history"][-1]["loss"]
    blocks: list[Block] = [Text(f"{record['images']:,} images, loss {loss:.3f} in the last epoch.")]
    if "tuned" in record:
        sides = [record[key] for key in ("zero_shot", "tuned")]
        rows: list[Row] = [("accuracy", *(Measure.of(Rate(**side["accuracy"])) for side in sides))]
        for spec in ood:
            label: Line = ["AUROC of the energy change, ", Name(spec)]
            rows.append((label, *(Measure.between(*side["auroc"][spec]) for side in sides)))
        columns = [Column("Measure"), Column("Hand-written prompts"), Column("Tuned")]
        caption: Line = ["On ", Code(str(val)), "; 95% intervals."]
        blocks.append(Table(columns, rows, title="Before and after", caption=caption))
    return [*blocks, Checks([_finding("note", note) for note in record.get("notes", [])])]


def build_blocks(parts: Sequence[str], misfits: Sequence[object]) -> list[Block]:
    """Return the parts of a pipeline in the order in which an image passes them, and what does not fit in it."""
    warnings = Checks([_finding("warning", str(wrong)) for wrong in misfits])
    return [warnings, Text(["Parts: ", Code(" > ".join(parts), 1000)])]


def _finding(level: str, message: str) -> Finding:
    return Finding(level, *LEVELS[level], name="", message=message, meaning="")
