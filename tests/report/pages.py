"""A strict reader of pages, and texts that try to be more than text."""

from __future__ import annotations

import io
from collections import Counter
from html.parser import HTMLParser

from rich.console import Console

from robustvlm.commands.attack.record import AttackedRun
from robustvlm.commands.attack.report import attack_report
from robustvlm.report.screen import show

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; DROP TABLE runs; --",
    "{{ 7 * 7 }}",
    "$\\frac{1}{2}",
    "\x1b[31mred\x07",
    "\u202eesrever",
    "</style><style>*{display:none}",
    "x" * 5000,
    "a&b < c",
]


class Page(HTMLParser):
    """Collects tags, attributes and text; insists that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text.append(data)


def terminal(run: AttackedRun, width: int = 120, *, colour: bool = False) -> str:
    """Return what the terminal shows of an attack run, without the places of its files."""
    stream = io.StringIO()
    show(Console(file=stream, width=width, force_terminal=colour), attack_report(run, drawn=False))
    return stream.getvalue()
