"""The journal: what was appended is read back, whatever byte the process died at."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.commands.common.store import Journal, JournalReader, read_journal
from robustvlm.errors import UserError

# Ids come from file names, which on Linux may hold any byte; undecodable ones arrive as lone surrogates DC80-DCFF.
LETTERS = st.one_of(st.characters(exclude_categories=["Cs"]), st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
TEXT = st.text(LETTERS, max_size=12)
FACTS = st.lists(
    st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.booleans(), st.floats(allow_nan=False)), max_size=3),
    min_size=1,
    max_size=4,
)


def written(path: Path, facts: list[dict[str, Any]]) -> bytes:
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        for fact in facts:
            journal.append(fact)
    return path.read_bytes()


@given(FACTS)
@settings(max_examples=60, deadline=None)
def test_every_fact_is_read_back(tmp_path_factory: pytest.TempPathFactory, facts: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    content = written(path, facts)
    assert list(read_journal(path)) == facts
    assert content.count(b"\n") == len(facts)


@given(FACTS)
@settings(max_examples=10, deadline=None)
def test_cut_at_any_byte_the_whole_lines_survive(
    tmp_path_factory: pytest.TempPathFactory, facts: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    content = written(path, facts)
    with mock.patch("os.fsync"):  # thousands of openings, which no disk would keep up with
        for position in range(len(content) + 1):
            path.write_bytes(content[:position])
            whole = content[:position].count(b"\n")
            assert list(read_journal(path)) == facts[:whole]
            with Journal(path) as journal:
                journal.append({"new": True})
            assert list(read_journal(path)) == [*facts[:whole], {"new": True}]


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    whole = written(path, [{"a": 1}])
    path.write_bytes(whole + b'{"long": "' + b"x" * 200_000)
    with Journal(path):
        pass
    assert path.read_bytes() == whole


def test_numbers_without_a_finite_value_come_back(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    written(path, [{"margin": math.nan, "best": math.inf}])
    (fact,) = read_journal(path)
    assert math.isnan(fact["margin"])
    assert fact["best"] == math.inf


def test_a_missing_journal_holds_nothing(tmp_path: Path) -> None:
    assert list(read_journal(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize(
    "line", [b"{broken}\n", b"\n", b"[1, 2]\n", b"7\n", b"\xff\xfe\n", b"\0\0\0\n", b"[" * 9999 + b"\n"]
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'{"b":2}\n')
    with pytest.raises(UserError, match=r"line 2 of .* is damaged: .*fresh=True") as caught:
        list(read_journal(path))
    assert caught.value.as_typed().endswith("start over with --fresh")


class Filling:
    """A file on a disk with room for `room` more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken: int = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 5, 8])
def test_a_line_that_the_disk_took_only_half_of_is_taken_back(tmp_path: Path, room: int) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.append({"a": 1})
    real = journal._file
    journal._file = Filling(real, room)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        journal.append({"b": 2222})
    journal._file = real
    # The session goes on to record what it has cost, and by then there may be room again.
    journal.append({"c": 3})
    journal.close()
    assert list(read_journal(path)) == [{"a": 1}, {"c": 3}]


def test_partial_writes_are_completed(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    real = journal._file

    class Dribbling(Filling):
        def write(self, data: bytes) -> int:
            taken: int = self.file.write(data[:3])
            return taken

    journal._file = Dribbling(real, 0)  # type: ignore[assignment]
    journal.append({"a": "a longer line than three bytes"})
    journal.close()
    assert list(read_journal(path)) == [{"a": "a longer line than three bytes"}]


def test_a_journal_still_being_written_is_read_on_where_reading_stopped(tmp_path: Path) -> None:
    path = tmp_path / "journal-1.jsonl"
    reader = JournalReader(path)
    assert list(reader.new()) == []
    with Journal(path) as journal:
        journal.append({"n": 1})
        journal.append({"n": 2})
        assert list(reader.new()) == [(1, {"n": 1}), (2, {"n": 2})]
        with path.open("ab") as torn:
            torn.write(b'{"n": ')
        assert list(reader.new()) == [], "a line is read when it is whole"
        with path.open("ab") as torn:
            torn.write(b"3}\n")
        assert list(reader.new()) == [(3, {"n": 3})]
        path.write_bytes(path.read_bytes() + b"no fact\n")
        with pytest.raises(UserError, match=r"line 4 of .*journal-1.jsonl' is damaged"):
            list(reader.new())
