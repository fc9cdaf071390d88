"""The append-only record of a run: one JSON object per line, written as soon as a fact is known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustvlm.core.reading import NotRegular, parse_json, require_regular
from robustvlm.errors import UserError
from robustvlm.runs.files import open_own

# A line reaches the operating system at once, which survives the death of the process; it is forced to the disk, which
# survives a power cut, at most this often.
_SYNC_SECONDS = 2.0


class Journal:
    """Lines of facts that survive the death of the process at any moment.

    A line torn by a crash is cut off when the journal is opened again: its fact is found anew.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
        >>> with Journal(path) as journal:
        ...     journal.append({"kind": "clean", "index": 3})
        >>> [fact["index"] for fact in read_journal(path)]
        [3]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _cut_torn_line(path)
        self._file = open_own(path, "ab")
        self._synced = time.monotonic()

    def append(self, fact: dict[str, Any]) -> None:
        """Write one fact as one line."""
        line = json.dumps(fact, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape") + b"\n"
        about = os.fstat(self._file.fileno())
        if about.st_nlink == 0:
            raise UserError(_gone(self.path))
        start, written = about.st_size, 0
        try:
            # Unbuffered writes may take only a part, for example on a disk that is filling up.
            while written < len(line):
                written += self._file.write(line[written:])
        except BaseException:
            # Half a line must not be left for a later one to be appended to.
            if 0 < written < len(line):
                os.ftruncate(self._file.fileno(), start)
            raise
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            if not self.path.exists():  # moved away together with its folder
                raise UserError(_gone(self.path))
            self._synced = time.monotonic()

    @property
    def empty(self) -> bool:
        """Whether no fact has been written yet."""
        return os.fstat(self._file.fileno()).st_size == 0

    def close(self) -> None:
        """Force everything to the disk and close the file."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the facts of a journal, in order; a missing file holds none, a torn last line is left out."""
    return (fact for _, fact in JournalReader(path).new())


class JournalReader:
    """Reads a journal that another process may still be writing, each fact once.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "journal-1.jsonl"
        >>> reader = JournalReader(path)
        >>> with Journal(path) as journal:
        ...     journal.append({"index": 3})
        ...     first = list(reader.new())
        ...     journal.append({"index": 4})
        >>> first, list(reader.new())
        ([(1, {'index': 3})], [(2, {'index': 4})])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = self._lines = 0

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield number and fact of every whole line that was added since the last call."""
        try:
            require_regular(self.path)
        except FileNotFoundError:
            return
        except NotRegular as error:
            raise UserError(f"{error}: put the run's journal back, or start over with --fresh") from None
        with self.path.open("rb") as handle:
            handle.seek(self._offset)
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._lines += 1
                yield self._lines, self._fact(line)

    def _fact(self, line: bytes) -> dict[str, Any]:
        try:
            fact = parse_json(line.decode("utf-8", "surrogateescape"))
        except ValueError:
            fact = None
        if not isinstance(fact, dict):
            raise UserError(f"line {self._lines} of '{self.path}' is damaged: repair it, or start over with --fresh")
        return fact


def _gone(path: Path) -> str:
    return f"the run's folder was deleted or moved while it was at work: '{path}' is no longer there"


def _cut_torn_line(path: Path) -> None:
    with open_own(path, "r+b") as handle:
        end = handle.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - 65536)
            handle.seek(start)
            newline = handle.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            handle.truncate(keep)
