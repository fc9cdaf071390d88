"""All facts of a certify run: kept in memory, and appended to the run's journal as they come."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from robustvlm.data.source import Unreadable
from robustvlm.errors import UserError
from robustvlm.evaluation.ledger import new_session
from robustvlm.runs.certify_rows import CertifyFact
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.journal import Journal, JournalReader
from robustvlm.runs.summary import Check, Cost, UnreadableImage


class CertifyLedger:
    """The facts of a run folder; opening it reads those of earlier sessions, of however many processes.

    A fact that is added is in the journal before the call returns.

    Args:
        rank: number of this process; each writes a journal of its own.
        session: name of the session, the same for all its processes.
    """

    def __init__(self, folder: RunFolder, *, rank: int = 0, session: str | None = None) -> None:
        self.folder, self.rank = folder, rank
        self.session = session or new_session()
        self.found: dict[int, CertifyFact] = {}
        self._unreadable: dict[int, UnreadableImage] = {}
        self._checks: dict[str, Check] = {}
        self._costs: dict[tuple[str, int], Cost] = {}
        self._readers: dict[str, JournalReader] = {}
        self.sync(own=True)
        self._journal = Journal(folder.journal_of(rank))

    def close(self) -> None:
        """Force all facts to the disk."""
        self._journal.close()

    def sync(self, *, own: bool = False) -> None:
        """Take in what the other processes have found since (with `own`, also what this one's journal holds)."""
        for path in self.folder.journals():
            if own or path != self.folder.journal_of(self.rank):
                for number, fact in self._readers.setdefault(str(path), JournalReader(path)).new():
                    try:
                        self._take(dict(fact))
                    except (KeyError, TypeError, ValueError):
                        raise UserError(
                            f"line {number} of '{path}' is no entry of this version: "
                            "use the version that wrote it, or start over with --fresh"
                        ) from None

    @property
    def seen(self) -> set[str]:
        """Ids of the images that are finished or cannot be read."""
        return {fact.image_id for fact in self.found.values()} | {image.id for image in self._unreadable.values()}

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
        """Passes and time over all sessions; the seconds of a session are those of its slowest process."""
        parts = self._costs.values()
        slowest: dict[str, Cost] = {}
        for (session, _), part in self._costs.items():
            slowest[session] = max(slowest.get(session, part), part, key=lambda cost: cost.seconds)
        forward, seconds = sum(part.forward_passes for part in parts), sum(part.seconds for part in slowest.values())
        return Cost(
            forward_passes=forward,
            seconds=seconds,
            model_seconds=sum(part.model_seconds for part in slowest.values()),
            passes_per_second=forward / seconds if seconds else 0.0,
        )

    def add_image(self, fact: CertifyFact) -> None:
        """Record what was certified for an image."""
        self._add({"kind": "image", **asdict(fact)})

    def add_unreadable(self, index: int, item: Unreadable) -> None:
        """Record an image that could not be decoded; streams name damaged shards every time they are read."""
        if self._unreadable.get(index) != UnreadableImage(id=item.id, reason=item.reason):
            self._add({"kind": "unreadable", "index": index, "id": item.id, "reason": item.reason})

    def add_checks(self, checks: list[Check]) -> None:
        """Record findings; one of the same name replaces the earlier one."""
        for check in checks:
            if self._checks.get(check.name) != check:
                self._add({"kind": "check", **check.model_dump()})

    def add_cost(self, *, passes: int, seconds: float, model_seconds: float) -> None:
        """Record what this session has cost so far."""
        rate = passes / seconds if seconds else 0.0
        cost = Cost(forward_passes=passes, seconds=seconds, model_seconds=model_seconds, passes_per_second=rate)
        self._add({"kind": "cost", "session": self.session, "rank": self.rank, **cost.model_dump()})

    def _add(self, fact: dict[str, Any]) -> None:
        self._journal.append(fact)
        self._take(dict(fact))

    def _take(self, fact: dict[str, Any]) -> None:
        kind = fact.pop("kind")
        if kind == "image":
            self.found[fact["index"]] = CertifyFact(**fact)
        elif kind == "unreadable":
            self._unreadable[fact["index"]] = UnreadableImage(id=fact["id"], reason=fact["reason"])
        elif kind == "check":
            self._checks[fact["name"]] = Check(**fact)
        elif kind == "cost":
            key = fact.pop("session"), fact.pop("rank")
            self._costs[key] = Cost(**fact)
        else:
            raise ValueError(f"unknown kind of fact '{kind}'")
