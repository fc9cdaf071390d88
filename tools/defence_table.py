"""Write the table of test-time defences into docs/judge.md; a test fails when it is out of date.

python tools/defence_table.py
"""

from __future__ import annotations

from pathlib import Path

from robustvlm.commands.judge.paper import table_of_defences

PAGE = Path(__file__).parents[1] / "docs" / "judge.md"
MARK = "<!-- the table is written by `python tools/defence_table.py` -->\n"


def page(text: str) -> str:
    """Return the page with the present table in the place of its own."""
    head, _, rest = text.partition(MARK)
    return head + MARK + table_of_defences() + "\n\n" + rest.partition("\n\n")[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
