"""Every table of a page once more as text to copy: Markdown, LaTeX and CSV, each escaped for its own readers."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from robustvlm.report import sections as doc
from robustvlm.report.words import DASH, RANGE, plain

ROWS = 100
"""Rows of a table that can be copied: text of all rows of every format would double a big page. The rest is said."""

_LATEX = {
    **{char: f"\\{char}" for char in "{}$&#%_"},
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "ε": r"$\varepsilon$", "∞": r"$\infty$",
    "₂": "$_2$", "Δ": r"$\Delta$", "µ": r"$\mu$", "≤": r"$\le$", "≥": r"$\ge$", "±": r"$\pm$", "…": r"\dots{}",
    "\N{GREEK SMALL LETTER SIGMA}": r"$\sigma$", "\N{GREEK SMALL LETTER ALPHA}": r"$\alpha$",
    "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{MINUS SIGN}": "$-$", "\N{EN DASH}": "--", "\N{EM DASH}": "---",
    "·": r"$\cdot$", "→": r"$\to$", "é": r"\'e",
}  # fmt: skip
"""How LaTeX writes the characters that it takes for commands or does not know; others stand for themselves."""

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&#$])")
_NUMBER = re.compile(r"[+-]?[\d.,]+(e[+-]?\d+)?%?")


def table_of(block: doc.Table | doc.Bars | doc.Facts) -> doc.Table:
    """Return what is drawn as a table on the page as one: bars with their numbers, labels with their values."""
    if isinstance(block, doc.Table):
        return block
    if isinstance(block, doc.Facts):
        return doc.Table([doc.Column("Name"), doc.Column("Value")], block.rows, title=block.title)
    rows = [(doc.Name(bar.name), doc.Measure(bar.text, bar.interval, *bar.shares), bar.count) for bar in block.bars]
    return doc.Table([doc.Column("Name"), *doc.numbers("Rate", "Count")], rows, title=block.title or block.caption)


def cut_to(block: doc.Table | doc.Bars | doc.Facts) -> int:
    """Return how many rows of a table can be copied where that is not all of them; else 0."""
    return ROWS if len(table_of(block).rows) > ROWS else 0


def copies(block: doc.Table | doc.Bars | doc.Facts) -> list[tuple[str, str]]:
    """Return the first `ROWS` rows of a table as (format, text): Markdown, LaTeX (booktabs) and CSV.

    Example:
        >>> table = doc.Table([doc.Column("A|B"), *doc.numbers("Rate")], [("my_model", doc.Measure("50%"))])
        >>> for name, text in copies(table):
        ...     print(text)
        | A\\|B | Rate |
        | --- | ---: |
        | my\\_model | 50% |
        % \\usepackage{booktabs}
        \\begin{tabular}{lr}
        \\toprule
        A\\textbar{}B & Rate \\\\
        \\midrule
        my\\_model & 50\\% \\\\
        \\bottomrule
        \\end{tabular}
        A|B,Rate
        my_model,50%
    """
    table = table_of(block)
    table = replace(table, rows=table.rows[:ROWS])
    return [("Markdown", markdown(table)), ("LaTeX", latex(table)), ("CSV", comma_separated(table))]


def words_of(line: doc.Line, limit: int = 600) -> str:
    """Return a line of text as plain words, an interval in brackets behind its number.

    Example:
        >>> words_of(["a ", doc.Code("b"), " ", doc.Measure("1", "0 to 2")])
        'a b 1 (0 to 2)'
    """
    return plain("".join(_word(part) for part in doc.parts_of(line)), limit)


def _word(part: doc.Inline) -> str:
    if isinstance(part, str):
        return doc.straight(part)
    if isinstance(part, doc.Measure):
        return doc.straight(part.text) + (f" ({doc.straight(part.interval)})" if part.interval else "")
    return plain(part.text, part.limit) if isinstance(part, (doc.Code, doc.Name)) else doc.straight(part.text)


def markdown(table: doc.Table) -> str:
    """Return a table as GitHub's Markdown has it; titles of groups of columns stand before the columns' own."""
    heads = [escape_markdown(title) for title in titles_of(table)]
    lines = [_row(heads), _row(["---:" if column.number else "---" for column in table.columns])]
    for row in table.rows:
        cells = (
            [f"**{escape_markdown(row)}**"]
            if isinstance(row, str)
            else [escape_markdown(words_of(cell)) for cell in row]
        )
        lines.append(_row([*cells, *[""] * (len(heads) - len(cells))]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape_markdown(text: str, limit: int = 600) -> str:
    """Return words as GitHub's Markdown shows them.

    Example:
        >>> print(escape_markdown("a*b <img>"))
        a\\*b \\<img\\>
    """
    return _MARKDOWN.sub(r"\\\1", plain(text, limit))


def latex(table: doc.Table) -> str:
    """Return a table as LaTeX, in the style of the package booktabs."""
    heads, groups = [escape_latex(words_of(column.title)) for column in table.columns], []
    spans = [(group, len(list(some))) for group, some in groupby(column.group for column in table.columns)]
    if any(group for group, _ in spans):
        cells = [f"\\multicolumn{{{n}}}{{c}}{{{escape_latex(g)}}}" if g else " & " * (n - 1) for g, n in spans]
        groups = [" & ".join(cells) + r" \\"]
    lines = [
        r"% \usepackage{booktabs}",
        f"\\begin{{tabular}}{{{''.join('r' if column.number else 'l' for column in table.columns)}}}",
        r"\toprule", *groups, " & ".join(heads) + r" \\", r"\midrule",
    ]  # fmt: skip
    for row in table.rows:
        if isinstance(row, str):
            lines.append(f"\\multicolumn{{{len(heads)}}}{{l}}{{\\textbf{{{escape_latex(row)}}}}} \\\\")
        else:
            lines.append(" & ".join(escape_latex(words_of(cell)) for cell in row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def escape_latex(text: str) -> str:
    """Return words as LaTeX shows them.

    Example:
        >>> print(escape_latex("50% of my_model, L∞"))
        50\\% of my\\_model, L$\\infty$
    """
    escaped = latex_words(plain(text, 600))
    # Behind \\ a bracket would be its argument, and a star its other form.
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def latex_words(text: str) -> str:
    """Return a text as LaTeX shows it, the spaces at its ends kept.

    Example:
        >>> print(latex_words(' a "b" '))
         a ``b''
    """
    opened = re.sub(r'(?<![^\s(])"(?=\S)', "``", text)
    return "".join(_LATEX.get(char, char) for char in opened)


def comma_separated(table: doc.Table) -> str:
    """Return a table as CSV for programs: an interval's ends in columns of their own, headings of rows in a first one.

    Words that a spreadsheet would take for a formula have an apostrophe before them.
    """
    parted = any(isinstance(row, str) for row in table.rows)
    rows = [row for row in table.rows if not isinstance(row, str)]
    spread = [any(_measure(row[i]) is not None for row in rows) for i in range(len(table.columns))]
    heads = ["Part"] if parted else []
    for title, wide in zip(titles_of(table), spread, strict=True):
        heads += [title, *([f"{title}, 95% interval: {end}" for end in ("low", "high")] if wide else [])]
    stream, part = io.StringIO(), ""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([tame(head) for head in heads])
    for row in table.rows:
        if isinstance(row, str):
            part = plain(row, 600)
            continue
        cells = [part] if parted else []
        for cell, wide in zip(row, spread, strict=True):
            found = _measure(cell)
            said = words_of(cell) if found is None else doc.straight(found.text)
            cells.append("" if said == DASH else said)
            cells += [] if not wide else ["", ""] if found is None else _ends(found.interval)
        writer.writerow([tame(cell) for cell in cells])
    return stream.getvalue().rstrip("\n")


def _measure(cell: doc.Line) -> doc.Measure | None:
    """Return the number of a cell that holds one with an interval of two ends, and nothing else."""
    parts = doc.parts_of(cell)
    alone = parts[0] if len(parts) == 1 else None
    return alone if isinstance(alone, doc.Measure) and alone.interval.count(RANGE) == 1 else None


def _ends(interval: str) -> list[str]:
    low, high = (doc.straight(end).strip() for end in interval.split(RANGE))
    return [low + "%" * (high.endswith("%") and not low.endswith("%")), high]


def tame(cell: str) -> str:
    """Return a field of CSV that no spreadsheet takes for a formula."""
    return f"'{cell}" if len(cell) > 1 and cell[0] in "=+-@" and not _NUMBER.fullmatch(cell) else cell


def titles_of(table: doc.Table) -> list[str]:
    """Return the columns' titles in one line, those of groups before them."""
    names = [(plain(column.group), words_of(column.title)) for column in table.columns]
    return [f"{group}: {title}" if group else title for group, title in names]
