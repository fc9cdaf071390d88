"""The facts of a run as they come: an append-only journal a process, and what all kinds of run keep in it."""

from __future__ import annotations

import json
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from robustvlm.core.files import NotRegular, open_own, parse_json, require_regular
from robustvlm.core.ranks import Ranks
from robustvlm.data.source import Unreadable
from robustvlm.errors import UserError, setting
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import run_identity
from robustvlm.runs.records import Check, Cost, Passes, UnreadableImage

# The append-only record of a run: one JSON object per line, written as soon as a fact is known

# A line reaches the operating system at once, which survives the death of the process; it is forced to the disk, which
# survives a power cut, at most this often.
_SYNC_SECONDS = 2.0

# Network folders remember for up to a minute what they hold.
_SEEN_SECONDS = 90.0


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
        return self.size == 0

    @property
    def size(self) -> int:
        """How many bytes have been written, by earlier sessions too."""
        return os.fstat(self._file.fileno()).st_size

    def force(self) -> None:
        """Force everything to the disk, and so to the server of a network's folder."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force everything to the disk and close the file."""
        if not self._file.closed:
            self.force()
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
            raise UserError(
                f"{error}: put the run's journal back, or start over with {setting('fresh', True)}"
            ) from None
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
            raise UserError(
                f"line {self._lines} of '{self.path}' is damaged: repair it, or start over with "
                f"{setting('fresh', True)}"
            )
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


# What the ledgers of all kinds of run share: journals of several processes, unreadable images, findings, cost

_OWNER = "run"


def new_session() -> str:
    """Return a name that no other session has."""
    return uuid.uuid4().hex[:8]


class JournalLedger(ABC):
    """The facts of a run folder; opening it reads those of earlier sessions, of however many processes.

    A fact that is added is in the journal before the call returns. A subclass creates what it keeps its own facts in
    before it calls this constructor, and takes them in with `_take_own`.

    Args:
        rank: number of this process; each writes a journal of its own, so that none waits for another.
        session: name of the session, the same for all its processes.

    Attributes:
        owner: identity of the run, which every journal begins with; None for runs from before there were identities.

    Raises:
        UserError: a journal is damaged, or another run's.
    """

    def __init__(self, folder: RunFolder, *, rank: int = 0, session: str | None = None) -> None:
        self.folder, self.rank = folder, rank
        self.session = session or new_session()
        self._unreadable: dict[int, UnreadableImage] = {}
        self._checks: dict[str, Check] = {}
        self._costs: dict[tuple[str, int], Cost] = {}
        self._readers: dict[Path, JournalReader] = {}
        self._written: dict[Path, int] = {}
        self.owner = run_identity(folder.manifest() or {})
        self._read()
        self._journal = Journal(folder.journal_of(rank))
        if self.owner is not None and self._journal.empty:
            self._journal.append({"kind": _OWNER, "id": self.owner})

    @abstractmethod
    def _take_own(self, kind: str, fact: dict[str, Any]) -> None:
        """Take in a fact of this kind of run; ValueError for a kind that it does not know."""

    def close(self) -> None:
        """Force all facts to the disk."""
        self._journal.close()

    def meet(self, ranks: Ranks) -> None:
        """Wait for the other processes, and learn how much they have written; for all of them at once."""
        if ranks.size > 1:
            self._journal.force()
            sizes = ranks.gathered(str(self._journal.size))
            self._written = {self.folder.journal_of(rank): int(size) for rank, size in enumerate(sizes)}

    def sync(self) -> None:
        """Take in what the other processes have found since, all of what they had written when they met.

        Raises:
            UserError: it does not come to be seen here, as in a folder that the machines do not share.
        """
        own = self.folder.journal_of(self.rank)
        for path, size in self._written.items():
            if path != own:
                _wait_for_bytes(path, size)
        self._read(skip=own)

    @property
    def unreadable(self) -> list[UnreadableImage]:
        """Images that could not be decoded, in source order."""
        return [self._unreadable[index] for index in sorted(self._unreadable)]

    @property
    def checks(self) -> list[Check]:
        """Findings about the run itself."""
        return list(self._checks.values())

    @property
    def cost(self) -> Cost:
        """Passes and time over all sessions; a killed one counts up to its last note of them.

        Passes are those of all processes; the seconds of a session are those of its slowest process.
        """
        parts = self._costs.values()
        forward, backward = sum(part.forward_passes for part in parts), sum(part.backward_passes for part in parts)
        slowest: dict[str, Cost] = {}
        for (session, _), part in self._costs.items():
            slowest[session] = max(slowest.get(session, part), part, key=lambda cost: cost.seconds)
        return cost_of(
            forward=forward,
            backward=backward,
            seconds=sum(part.seconds for part in slowest.values()),
            model_seconds=sum(part.model_seconds for part in slowest.values()),
            passes=_sum_of_passes(list(parts)),
        )

    def add_unreadable(self, index: int, item: Unreadable) -> None:
        """Record an image that could not be decoded; streams name damaged shards every time they are read."""
        if self._unreadable.get(index) != UnreadableImage(id=item.id, reason=item.reason):
            self._add({"kind": "unreadable", "index": index, "id": item.id, "reason": item.reason})

    def add_checks(self, checks: list[Check]) -> None:
        """Record findings; one of the same name replaces the earlier one.

        All in one line: of findings that were made together a killed session leaves all or none, and the next one asks
        again where there is none.
        """
        new = [check.model_dump() for check in checks if self._checks.get(check.name) != check]
        if new:
            self._add({"kind": "checks", "checks": new})

    def _add_cost(self, cost: Cost) -> None:
        self._add({"kind": "cost", "session": self.session, "rank": self.rank, **cost.model_dump()})

    def _add(self, fact: dict[str, Any]) -> None:
        self._journal.append(fact)
        self._take(dict(fact))

    def _read(self, *, skip: Path | None = None) -> None:
        # A folder of a network may not list yet what another machine has put there.
        for path in dict.fromkeys([*self.folder.journals(), *self._written]):
            if path != skip:
                for number, fact in self._readers.setdefault(path, JournalReader(path)).new():
                    self._take_from_disk(path, number, fact)

    def _take_from_disk(self, path: Path, number: int, fact: dict[str, Any]) -> None:
        if number == 1 or fact.get("kind") == _OWNER:
            found = fact.get("id") if fact.get("kind") == _OWNER else None
            if found != self.owner:
                raise UserError(
                    f"'{path}' is the journal of another run than '{self.folder.manifest_path}' says: "
                    f"put the run's own back, or start over with {setting('fresh', True)}"
                )
            if found is not None:
                return
        try:
            self._take(dict(fact))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"line {number} of '{path}' is no entry of this version: "
                f"use the version that wrote it, or start over with {setting('fresh', True)}"
            ) from None

    def _take(self, fact: dict[str, Any]) -> None:
        kind = fact.pop("kind")
        if kind == "unreadable":
            self._unreadable[fact["index"]] = UnreadableImage(id=fact["id"], reason=fact["reason"])
        elif kind == "checks":
            self._checks |= {check["name"]: Check(**check) for check in fact["checks"]}
        elif kind == "check":  # journals of 0.1.0 before its release
            self._checks[fact["name"]] = Check(**fact)
        elif kind == "cost":
            key = fact.pop("session"), fact.pop("rank", 0)
            self._costs[key] = Cost(**fact)
        else:
            self._take_own(kind, fact)


def _wait_for_bytes(path: Path, size: int) -> None:
    """Wait until so much of a file is to be seen: machines that share a folder may learn late of each other's files."""
    until = time.monotonic() + _SEEN_SECONDS
    while (seen := _seen(path)) < size:
        if time.monotonic() > until:
            raise UserError(
                f"'{path}' has {seen:,} of the {size:,} bytes that its process has written: all machines must see one "
                f"folder, see {setting('out')}"
            )
        time.sleep(0.1)


def _seen(path: Path) -> int:
    try:
        with path.open("rb") as handle:  # opening a file of a network asks the server; a look at its size need not
            return os.fstat(handle.fileno()).st_size
    except FileNotFoundError:
        os.listdir(path.parent)
        return 0


def _sum_of_passes(parts: Sequence[Cost]) -> Passes | None:
    """Return what the passes of all sessions were for; None where no session tells."""
    if all(part.passes is None for part in parts):
        return None
    total: Counter[str] = Counter()
    for part in parts:
        total.update(
            part.passes.model_dump() if part.passes else {"untold": part.forward_passes + part.backward_passes}
        )
    return Passes(**total)


def cost_of(
    *, forward: int, backward: int = 0, seconds: float, model_seconds: float, passes: Passes | None = None
) -> Cost:
    """Return a cost with its rate.

    Example:
        >>> cost_of(forward=30, backward=10, seconds=2.0, model_seconds=1.5).passes_per_second
        20.0
    """
    return Cost(
        forward_passes=forward,
        backward_passes=backward,
        seconds=seconds,
        model_seconds=model_seconds,
        passes_per_second=(forward + backward) / seconds if seconds else 0.0,
        passes=passes,
    )
