"""The results as Markdown: means over seeds, and paired tests against TeCoA."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import markdown
from robustvlm.errors import UserError
from robustvlm.stats import holm, mcnemar_exact

from .kept import VARIANT

Row = dict[str, Any]


class Compared(NamedTuple):
    """A difference on the same images, and the p of its paired test alone."""

    difference: float
    p_value: float


def read_rows(folder: Path) -> dict[str, list[Row]]:
    """Return the rows of every variant, by its key, in order of seed.

    Raises:
        UserError: they were not all made with one model and the same options, so that no table can hold them.
    """
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        found.setdefault(path.stem.rpartition("-seed")[0], []).append(json.loads(path.read_text(encoding="utf-8")))
    rows = [row for seeds in found.values() for row in seeds]
    shared = [{name: value for name, value in row.get("made with", {}).items() if name != VARIANT} for row in rows]
    if any(one != shared[0] for one in shared):
        raise UserError(f"rows in '{folder}' were made with different models or options: pass another --out")
    return found


def tables(found: Mapping[str, list[Row]], order: Sequence[str], cost: Mapping[str, Mapping[str, float]]) -> str:
    """Return all tables of one set."""
    rows = {key: found[key] for key in order if key in found}
    first = next(iter(rows.values()))[0]
    return "\n\n".join(
        [
            _table(rows, _columns(first), cost),
            _table(rows, _superclass_columns(first), {}),
            _paired(rows),
            *([_left_out(rows, first["left out"])] if "left out" in first else []),
        ]
    )


_Column = tuple[str, Callable[[Row], str]]


def _columns(first: Row) -> list[_Column]:
    named: list[_Column] = [
        ("clean", lambda row: row["clean"]),
        ("PGD-20", lambda row: row["pgd"]),
        *([("ensemble", lambda row: row["ensemble"])] if first["ensemble"] else []),
    ]
    for name in first["transfer"]:
        named.append((f"{name}: clean", lambda row, name=name: row["transfer"][name]["clean"]))  # type: ignore[misc]
        named.append((f"{name}: PGD-20", lambda row, name=name: row["transfer"][name]["pgd"]))  # type: ignore[misc]
    return named


def _superclass_columns(first: Row) -> list[_Column]:
    named: list[_Column] = []
    for key in [key for key in first if "superclass" in key]:
        named.append((f"{key}: clean", lambda row, key=key: row[key]["clean"]))  # type: ignore[misc]
        named.append((f"{key}: PGD-20", lambda row, key=key: row[key]["pgd"]))  # type: ignore[misc]
    return named


def _table(rows: Mapping[str, list[Row]], columns: Sequence[_Column], cost: Mapping[str, Mapping[str, float]]) -> str:
    header = ["model", *(name for name, _ in columns), *(("CPU s/step", "MB/step") if cost else ())]
    lines = []
    for key, seeds in rows.items():
        cells = [mean_and_range([share(column(row)) for row in seeds]) for _, column in columns]
        spent = cost.get(key)
        if cost:
            cells += [f"{spent['seconds']:.2f}", f"{spent['megabytes']:.0f}"] if spent else ["-", "-"]
        lines.append([seeds[0]["title"], *cells])
    return markdown(header, lines)


def _paired(rows: Mapping[str, list[Row]]) -> str:
    """Compare every variant with TeCoA on the same images and seeds.

    An image is one observation however many seeds there are: it counts for the variant that is right on it with more
    seeds. The test (exact, of McNemar's kind) is for these two sets of trained models, not for seeds to come.
    """
    reference = {row["seed"]: row for row in rows.get("tecoa", [])}
    lines: list[list[str | Compared]] = []
    for key, seeds in rows.items():
        pairs = [(row, reference[row["seed"]]) for row in seeds if row["seed"] in reference]
        if key in ("tecoa", "zero-shot") or not pairs:
            continue
        cells = [_comparison(pairs, [lambda row, column=column: row[column]]) for column in ("clean", "pgd")]  # type: ignore[misc]
        lines.append([seeds[0]["title"], *cells, str(len(pairs))])
    return markdown(["against TeCoA", "clean", "PGD-20", "seeds"], adjusted(lines))


def _left_out(rows: Mapping[str, list[Row]], sets: Sequence[str]) -> str:
    """Return means over the sets of classes that were not tuned on, and what they are above TeCoA's, in two tables.

    The sets are the same images told among different names, so an image is one observation in the mean over sets too.
    """
    return "\n\n".join(_against(rows, sets, column, shown) for column, shown in (("clean", "clean"), ("pgd", "PGD-20")))


def _against(rows: Mapping[str, list[Row]], sets: Sequence[str], column: str, shown: str) -> str:
    columns: list[Callable[[Row], str]] = [partial(_told, name=name, column=column) for name in sets]
    lines: list[list[str | Compared]] = []
    for key, seeds in rows.items():
        mean = mean_and_range([share("".join(of(row) for of in columns)) for row in seeds])
        each: list[Callable[[Row], str]] = [*columns, partial(_named, column=column)]
        compared = [columns, *([of] for of in each)]
        found = [against(key, seeds, rows.get("tecoa", []), of) for of in compared]
        lines.append([seeds[0]["title"], mean, *found, str(len(seeds))])
    header = [f"{shown}, against TeCoA", "mean over left-out sets", "its difference", *sets]
    return markdown([*header, "tuned half, superclasses by name", "seeds"], adjusted(lines))


def adjusted(lines: Sequence[Sequence[str | Compared]]) -> list[list[str]]:
    """Return the cells of a table as text; where it makes several comparisons, each p also adjusted for all (Holm)."""
    found = [cell for line in lines for cell in line if isinstance(cell, Compared)]
    after = iter(holm([cell.p_value for cell in found]))

    def told(cell: str | Compared) -> str:
        if isinstance(cell, str):
            return cell
        several = f", Holm {next(after):.2g}" if len(found) > 1 else ""
        return f"{cell.difference:+.3f} (p {cell.p_value:.2g}{several})"

    return [[told(cell) for cell in line] for line in lines]


def against(
    key: str, seeds: Sequence[Row], others: Sequence[Row], columns: Sequence[Callable[[Row], str]]
) -> str | Compared:
    """Return what a variant's rows are above TeCoA's of the same seeds, with the paired test."""
    reference = {row["seed"]: row for row in others}
    # A model that is not trained has one row, which is compared with every seed.
    pairs = [(row, reference[row["seed"]]) for row in seeds if row["seed"] in reference]
    pairs = [(seeds[0], other) for other in others] if key == "zero-shot" else pairs
    return _comparison(pairs, columns) if key != "tecoa" and pairs else "-"


def _told(row: Row, name: str, column: str) -> str:
    bits: str = row["transfer"][name][column]
    return bits


def _named(row: Row, column: str) -> str:
    bits: str = row["superclass 1 by name"][column]
    return bits


def _comparison(pairs: Sequence[tuple[Row, Row]], columns: Sequence[Callable[[Row], str]]) -> Compared:
    ours, theirs = (
        [sum(map(int, bits)) for bits in zip(*(of(pair[i]) for pair in pairs for of in columns), strict=True)]
        for i in (0, 1)
    )
    more, less = ([a > b for a, b in zip(x, y, strict=True)] for x, y in ((ours, theirs), (theirs, ours)))
    difference = (sum(ours) - sum(theirs)) / (len(ours) * len(pairs) * len(columns))
    return Compared(difference, mcnemar_exact(more, less).p_value)


def share(bits: str) -> float:
    """Return the share of 1 in outcomes kept as text."""
    return bits.count("1") / len(bits)


def mean_and_range(values: Sequence[float]) -> str:
    """Return the mean over seeds and, if there are several, half their range."""
    mean = sum(values) / len(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {(max(values) - min(values)) / 2:.3f}"
