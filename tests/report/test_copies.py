"""Tables as Markdown, LaTeX and CSV: read back by other readers, with texts that try to be more than text."""

from __future__ import annotations

import csv
import io
import re

import pytest
from pages import HOSTILE, Page

from robustvlm.report.copies import ROWS, copies, latex
from robustvlm.report.page import page_of
from robustvlm.report.sections import Bars, Block, Column, Facts, Measure, Name, Report, Row, Section, Table, numbers
from robustvlm.report.words import RANGE, bar, plain
from robustvlm.stats import rate

TEXTS = [
    *HOSTILE,
    "=SUM(A1)",
    "-1+cmd",
    "@x",
    "a|b",
    "c\\|d",
    "[1] b",
    r"\end{tabular} \\",
    "50 % & 1_2 #3 $x$ ~ ^",
    "`x`",
]


def cells_of(line: str) -> list[str]:
    """Read a row of Markdown: a bar ends a cell unless a backslash stands before it."""
    cells, at = [""], 0
    while at < len(line):
        if line[at] == "|":
            cells.append("")
        elif line[at] == "\\":
            at += 1
            cells[-1] += line[at]
        else:
            cells[-1] += line[at]
        at += 1
    return [cell.strip() for cell in cells[1:-1]]


def table(text: str) -> Table:
    return Table([Column(text), *numbers("n")], [(text, "1"), (Name(text, 600), "2")])


@pytest.mark.parametrize("text", TEXTS)
def test_markdown_and_csv_give_the_words_back(text: str) -> None:
    found = dict(copies(table(text)))
    wanted = plain(text, 600)
    lines = found["Markdown"].splitlines()
    assert [cells_of(line) for line in (lines[0], *lines[2:])] == [[wanted, "n"], [wanted, "1"], [wanted, "2"]]
    rows = list(csv.reader(io.StringIO(found["CSV"])))
    assert [[cell.removeprefix("'") for cell in row] for row in rows[1:]] == [
        [wanted.removeprefix("'"), "1"],
        [wanted.removeprefix("'"), "2"],
    ]
    assert not any(cell[:1] in "=+-@" for row in rows for cell in row if len(cell) > 1)


@pytest.mark.parametrize("text", TEXTS)
def test_latex_has_no_command_of_a_text(text: str) -> None:
    body = latex(table(text))
    known = r"\\(?:text\w+\{\}|[{}$&#%_]|dots\{\}|toprule|midrule|bottomrule|\\|(?:begin|end)\{tabular\}(?:\{[lr]+\})?)"
    rest = re.sub(rf"% \\usepackage\{{booktabs\}}|\$\\?[a-z_\-0-9]+\$|{known}|\{{\}}", "", body)
    assert not set(rest) & set("\\{}$#%_^~")
    assert rest.count("&") == 3  # one between two cells, in every row


def test_groups_parts_and_intervals_are_kept() -> None:
    columns = [Column("Score"), Column("clean", group="AUROC"), Column("attacked", group="AUROC"), Column("n", True)]
    rows: list[Row] = [("a", Measure("90%", f"80{RANGE}95%"), Measure("0.1"), "5"), "Part", ("b", "-", "0.2", "6")]
    found = dict(copies(Table(columns, rows)))
    assert "AUROC: clean" in found["Markdown"]
    assert f"90% (80{RANGE}95%)" in found["Markdown"]
    assert r" & \multicolumn{2}{c}{AUROC} &  \\" in found["LaTeX"]
    assert r"\multicolumn{4}{l}{\textbf{Part}} \\" in found["LaTeX"]
    assert list(csv.reader(io.StringIO(found["CSV"]))) == [
        ["Part", "Score", "AUROC: clean", "AUROC: clean, 95% interval: low", "AUROC: clean, 95% interval: high",
         "AUROC: attacked", "n"],
        ["", "a", "90%", "80%", "95%", "0.1", "5"],
        ["Part", "b", "-", "", "", "0.2", "6"],
    ]  # fmt: skip


def test_every_table_of_a_page_can_be_copied_and_a_long_one_in_part() -> None:
    long = Table([Column("a")], [(f"row{i}.",) for i in range(5 * ROWS)])
    bars = Bars([bar(f"c{i}", rate(1, 2)) for i in range(9)], "Nine")  # drawn as two tables
    some: list[Block] = [
        long,
        table("x"),
        bars,
        Facts([("a", "b")], kind="sentences"),
        Facts([("a", "b")], kind="settings"),
    ]
    text = page_of(Report("k", "n", "k", "f", [], [Section("s", some)]))
    page = Page(text)
    assert page.tags["pre"] == 3 * len(some)
    assert page.tags["table"] == len(some) + 1
    assert page.tags["script"] == 0
    assert text.count("row0.") == 4
    assert text.count(f"row{ROWS}.") == 1
    assert "The first 100 rows." in text
    alone = len(page_of(Report("k", "n", "k", "f", [], [Section("s", [Table([Column("a")], [])])])))
    assert len(text) - alone < 1.6 * (len(long.rows) * len('<tr><th scope="row" class="name">row100.</th></tr>\n'))
