"""The zoo's benchmark: figures are of one version of the program, and the most effort makes a row."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo.__main__ import judge
from robustvlm.errors import UserError


def test_a_run_of_two_versions_makes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = SimpleNamespace(model_dump_json=lambda **_: "{}")
    manifest: dict[str, Any] = {"versions": {}, "git_commit": "a" * 40}
    found = SimpleNamespace(summary=summary, manifest=manifest, folder=tmp_path)
    monkeypatch.setattr("robustvlm.judge", lambda *_, **__: found)
    judge("tiny", None, "tiny", "filters", "1/255", limit=1, out=tmp_path)
    assert (tmp_path / "tiny-1of255-filters.json").read_text() == "{}\n"
    manifest["sessions"] = [{"versions": {}, "git_commit": "b" * 40}]
    with pytest.raises(UserError, match=r"several versions, aaaaaaaa and bbbbbbbb: delete it"):
        judge("tiny", None, "other", "filters", "1/255", limit=1, out=tmp_path)
    assert not (tmp_path / "other-1of255-filters.json").exists()


def test_what_is_only_screened_is_marked_and_has_no_p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    little = zoo.Group(2, 0, ("bits:3", "bits:2"), targets=0)
    monkeypatch.setitem(zoo.GROUPS, "filters", zoo.Group(12, 3, ("bits:3",), targets=1, lanes=2))
    with monkeypatch.context() as patched:
        patched.setattr(zoo.Group, "screen", lambda _: little)
        judge("tiny", None, "tiny", "filters", "8/255", limit=2, out=tmp_path, screen=True)
    (shown,) = zoo.tables(tmp_path)
    assert rows_of(shown) == {"none (2 steps, 0 queries) *": "", "`+bits:2` *": "", "`+bits:3` *": ""}
    judge("tiny", None, "tiny", "filters", "8/255", limit=2, out=tmp_path)
    (shown,) = zoo.tables(tmp_path)
    counted: list[list[float]] = []
    monkeypatch.setattr(zoo, "holm", lambda values: counted.append(list(values)) or values)
    assert len(list(zoo.tables(tmp_path))) == 1
    assert counted == [[1.0, 1.0]], "one that was judged, and one that was only screened beside it"
    none = ["none (12 steps, 3 queries)", "none (2 steps, 0 queries) *"]
    assert list(rows_of(shown))[:2] == none
    assert rows_of(shown) == {none[0]: "", none[1]: "", "`+bits:2` *": "", "`+bits:3`": "1"}


def rows_of(table: str) -> dict[str, str]:
    """The rows of a table: what they are called, and their p."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[-2] for row in cells[2:]}


@pytest.mark.parametrize("group", sorted(zoo.GROUPS))
def test_a_screen_is_less_effort_on_the_same_defences(group: str) -> None:
    full = zoo.GROUPS[group]
    screen = full.screen()
    assert screen.defences == full.defences
    assert screen.steps < full.steps
    assert screen.queries < full.queries
    assert screen.targets < full.targets
    assert screen.draws <= full.draws
    assert full.eot is None or (screen.eot is not None and screen.eot <= full.eot)
