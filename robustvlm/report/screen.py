"""A report in the terminal: rich draws its blocks so that no word is broken and no column lost at 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text as RichText

from robustvlm.report import sections as doc
from robustvlm.report.words import Finding, plain

COLOURS = {"fault": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}
_GAP = 3  # characters between columns
# Longer than this a word is a path or a digest, and may be folded where there is no room for it; in a row's name later.
_WORD, _NAME = 36, 47
# Sentences in a cell are no narrower than this, as long as there is room for it in a part of the table.
_PROSE = 28


def show(console: Console, what: doc.Report | Iterable[doc.Block | doc.Verdict], *closing: doc.Closing) -> None:
    """Print a report, or single blocks, the verdicts before all others, and the closing lines.

    Example:
        >>> from robustvlm.report.sections import Column, Table, Text
        >>> show(Console(width=40), [Table([Column("a"), Column("b", number=True)], [("one", "1")], title="Two")])
        Two
        <BLANKLINE>
         a     b
         ───────
         one   1
        <BLANKLINE>
    """
    blocks = list(doc.terminal_blocks(what) if isinstance(what, doc.Report) else doc.flat(what))
    said = [line for block in blocks if isinstance(block, doc.Verdict) for line in block.lines]
    for i, line in enumerate(said):
        console.print(text(line, "" if i else "bold"))
    drawn = [part for block in blocks if not isinstance(block, doc.Verdict | doc.Closing) for part in _drawn(block)]
    if said and drawn:
        console.print()
    for part in drawn:
        console.print(part)
    for block in (*blocks, *closing):
        if isinstance(block, doc.Closing):
            width = max(map(len, block.places), default=0) + 1
            for name, place in block.places.items():
                console.print(RichText(f"{name + ':':<{width}} {place}"), soft_wrap=True)


def _drawn(block: doc.Block) -> Iterable[RichText | FittedTable]:
    if isinstance(block, doc.Checks):
        yield from (_finding(finding) for finding in block.findings if finding.level != "ok")
    elif isinstance(block, doc.Chart) and block.text:
        yield text(block.text)
    elif isinstance(block, doc.Text) and block.only != "page" and block.kind != "lead":
        yield text(block.line, "dim" if block.kind == "small" else "")
    elif isinstance(block, doc.Facts) and block.only != "page":
        columns = [doc.Column(""), doc.Column("")]
        yield FittedTable(doc.Table(columns, block.rows, title=block.title), heads=False)
    elif isinstance(block, doc.Table) and block.only != "page" and block.rows:
        yield FittedTable(block)


def text(line: doc.Line, style: str = "") -> RichText:
    """Return a line with the weights of its words."""
    made = RichText(style=style)
    for part in doc.parts_of(line):
        if isinstance(part, doc.Measure):
            made.append(doc.straight(part.text))
            if part.interval:
                made.append(f"  {doc.straight(part.interval)}", "dim")
        elif isinstance(part, (doc.Code, doc.Name)):
            made.append(plain(part.text, part.limit))
        elif isinstance(part, doc.Small):
            made.append(doc.straight(part.text), "dim")
        else:
            made.append(doc.straight(part))
    return made


def _finding(finding: Finding) -> RichText:
    said = f"{finding.name}: {finding.message}" if finding.name else finding.message
    return RichText.assemble(
        (f"{finding.sign} {doc.straight(finding.word)}: ", COLOURS[finding.level]), doc.straight(said)
    )


class FittedTable:
    """A table that is cut between columns, each part with the rows' names, where it is wider than the terminal."""

    def __init__(self, table: doc.Table, *, heads: bool = True) -> None:
        self._table, self._shows_heads = table, heads
        self._heads = [_head(column) for column in table.columns]
        self._rows = [row if isinstance(row, str) else [text(cell) for cell in row] for row in table.rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts of the table."""
        cells = [
            [head, *(row[i] for row in self._rows if not isinstance(row, str))] for i, head in enumerate(self._heads)
        ]
        cells[0] += [RichText(plain(row, _WORD)) for row in self._rows if isinstance(row, str)]
        words = [max(_longest_word(cell, _WORD if i else _NAME) for cell in column) for i, column in enumerate(cells)]
        whole = [max(width, self._unbroken(k)) for k, width in enumerate(words)]
        wished = [
            max(width, *(cell_len(cell.plain) for cell in column)) for width, column in zip(whole, cells, strict=True)
        ]
        if self._table.title:
            yield RichText(doc.straight(self._table.title), style="bold")
        for part in split(whole, options.max_width):
            floors = [[widths[k] for k in part] for widths in (whole, words)]
            yield self._part(part, narrowed([wished[k] for k in part], *floors, room=options.max_width))
        if self._table.caption:
            yield text(self._table.caption, "dim")

    def _unbroken(self, column: int) -> int:
        """Return the width in which a column is read easily: names, numbers with their intervals, short sentences."""
        most = _WORD if self._table.columns[column].number or not column else _PROSE
        rows = [row for row in self._table.rows if not isinstance(row, str)]
        parts = (part for row in rows for part in doc.parts_of(row[column]) if isinstance(part, doc.Measure))
        measures = (cell_len(text(part).plain) for part in parts)
        cells = (cell_len(row[column].plain) for row in self._rows if not isinstance(row, str))
        return max([0, *measures, *(min(width, most) for width in cells)])

    def _part(self, part: Sequence[int], widths: Sequence[int]) -> RichTable:
        table = self._table
        drawn = RichTable(box=box.SIMPLE_HEAD, show_header=self._shows_heads, pad_edge=False)
        for k, width in zip(part, widths, strict=True):
            justify = "right" if table.columns[k].number else "left"
            drawn.add_column(self._heads[k], justify=justify, width=width, overflow="fold")  # type: ignore[arg-type]
        for i, row in enumerate(self._rows):
            if isinstance(row, str):
                drawn.add_row(RichText(plain(row, _WORD), style="bold"))
            else:
                drawn.add_row(*(row[k] for k in part), style="bold" if i in table.strong else "")
        return drawn


def split(least: Sequence[int], room: int) -> list[list[int]]:
    """Return the columns of each part of a table: as many as have room at their least widths, the first in every part.

    Example:
        >>> split([10, 5, 5, 5], room=30), split([10, 5, 5, 5], room=22)
        ([[0, 1, 2], [0, 3]], [[0, 1], [0, 2], [0, 3]])
    """
    parts: list[list[int]] = [[]]
    for k, width in enumerate(least):
        taken = _width([least[i] for i in parts[-1]] + [width])
        if taken > room and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(k)
    return parts


def narrowed(wished: Sequence[int], *floors: Sequence[int], room: int) -> list[int]:
    """Return the columns' widths: the wished ones, the widest narrowed as far as need be, none below the first floor.

    Where even that has no room the next floor counts, and at last the widest are folded.

    Example:
        >>> narrowed([10, 3], [4, 3], room=13), narrowed([10, 3], [9, 3], [4, 3], room=13)
        ([5, 3], [5, 3])
    """
    widths = list(wished)
    for floor in (*floors, [1] * len(widths)):
        while _width(widths) > room:
            wide = [k for k, width in enumerate(widths) if width > floor[k]]
            if not wide:
                break
            widths[max(wide, key=lambda k: widths[k])] -= 1
    return widths


def _width(widths: Sequence[int]) -> int:
    """Return what columns take: their widths, the gaps between them, and a space at either end."""
    return sum(widths) + _GAP * (len(widths) - 1) + 2


def _longest_word(cell: RichText, most: int) -> int:
    return min(most, max((cell_len(word) for word in cell.plain.split()), default=0))


def _head(column: doc.Column) -> RichText:
    title = text(column.title)
    return RichText(f"{plain(column.group, 60)} ").append_text(title) if column.group else title
