"""All facts of a run: kept in memory, and appended to the run's journal as they come."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robustvlm.attacks import FAILED, FOOLED, Result
from robustvlm.attacks.oracle import Passes
from robustvlm.data.source import DataSource, Unreadable, select
from robustvlm.errors import UserError
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.journal import Journal, JournalReader
from robustvlm.runs.results import NO_ANSWER, AttackFact, CleanFact
from robustvlm.runs.summary import Check, Cost, Estimate, UnreadableImage


def new_session() -> str:
    """Return a name that no other session has."""
    return uuid.uuid4().hex[:8]


class Ledger:
    """The facts of a run folder; opening it reads those of earlier sessions, of however many processes.

    A fact that is added is in the journal before the call returns.

    Args:
        rank: number of this process; each writes a journal of its own, so that none waits for another.
        session: name of the session, the same for all its processes.
    """

    def __init__(self, folder: RunFolder, *, rank: int = 0, session: str | None = None) -> None:
        self.folder, self.rank = folder, rank
        self.session = session or new_session()
        self.clean: dict[int, CleanFact] = {}
        self.found: dict[tuple[float, str, str, int], AttackFact] = {}
        self.fooled: set[tuple[str, int]] = set()
        self.left_out: dict[int, str] = {}
        self._unreadable: dict[int, UnreadableImage] = {}
        self._checks: dict[str, Check] = {}
        self._costs: dict[tuple[str, int], Cost] = {}
        self._stops: dict[str, str] = {}
        self.estimate: Estimate | None = None
        self._readers: dict[Path, JournalReader] = {}
        self._read()
        self._journal = Journal(folder.journal_of(rank))

    def close(self) -> None:
        """Force all facts to the disk."""
        self._journal.close()

    def sync(self) -> None:
        """Take in what the other processes have found since."""
        own = self.folder.journal_of(self.rank)
        self._read(skip=own)

    def _read(self, *, skip: Path | None = None) -> None:
        for path in self.folder.journals():
            if path != skip:
                reader = self._readers.setdefault(path, JournalReader(path))
                for number, fact in reader.new():
                    self._take_from_disk(path, number, fact)

    @property
    def seen(self) -> set[str]:
        """Ids of the images of which the clean pass knows the answer."""
        named = {image.id for image in self._unreadable.values()} | set(self.left_out.values())
        return {fact.image_id for fact in self.clean.values()} | named

    @property
    def unreadable(self) -> list[UnreadableImage]:
        """Images that could not be decoded, in source order."""
        return [self._unreadable[index] for index in sorted(self._unreadable)]

    @property
    def checks(self) -> list[Check]:
        """Findings about the evaluation itself."""
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
        seconds = sum(part.seconds for part in slowest.values())
        return Cost(
            forward_passes=forward,
            backward_passes=backward,
            seconds=seconds,
            model_seconds=sum(part.model_seconds for part in slowest.values()),
            passes_per_second=(forward + backward) / seconds if seconds else 0.0,
        )

    def count_images(self, source: DataSource, limit: int | None) -> int | None:
        """Return how many images the run covers, or None when only streaming can tell."""
        ids = source.ids()
        return len(select(ids, limit)) if ids is not None else limit

    def remaining(
        self, eps: float, goal: str, attack: str, *, leave: bool = True, everyone: bool = False
    ) -> dict[str, CleanFact]:
        """Return, by image id, the images this stage has still to attack.

        Args:
            leave: images that the goal has been reached on before are not attacked again.
            everyone: images are attacked also where the goal is reached unperturbed.
        """
        return {
            fact.image_id: fact
            for index, fact in sorted(self.clean.items())
            if (fact.exposed or (everyone and fact.prediction != NO_ANSWER))
            and not (leave and (goal, index) in self.fooled)
            and (eps, goal, attack, index) not in self.found
        }

    def attacked(self, eps: float, goal: str, attack: str) -> int:
        """Return how many images this stage has finished."""
        return sum(1 for *stage, _ in self.found if tuple(stage) == (eps, goal, attack))

    def add_clean(self, fact: CleanFact) -> None:
        """Record what the model says of an unperturbed image."""
        self._add({"kind": "clean", **asdict(fact)})

    def add_left_out(self, index: int, image_id: str) -> None:
        """Record an image that the goal is not about, such as one of an unknown class."""
        self._add({"kind": "left out", "index": index, "image_id": image_id})

    def add_unreadable(self, index: int, item: Unreadable) -> None:
        """Record an image that could not be decoded; streams name damaged shards every time they are read."""
        if self._unreadable.get(index) != UnreadableImage(id=item.id, reason=item.reason):
            self._add({"kind": "unreadable", "index": index, "id": item.id, "reason": item.reason})

    def add_result(self, result: Result, attack: str, eps: float, goal: str) -> None:
        """Record the answer of one attack for one image."""
        fact = AttackFact(
            index=result.job.index,
            attack=attack,
            eps=eps,
            goal=goal,
            outcome=result.outcome,
            prediction=result.prediction,
            steps=result.steps,
            passes=result.passes,
            linf=result.linf,
            l2=result.l2,
            margin=result.margin,
            confidence=result.confidence,
            run=result.run,
            seconds=result.seconds,
            cosine=result.cosine,
        )
        self._add({"kind": "attack", **asdict(fact)})

    def add_lost(self, clean: CleanFact, attack: str, eps: float, goal: str, reason: str) -> None:
        """Record an image that was readable in the clean pass and is no longer: the attack could not be made."""
        nothing = AttackFact(
            index=clean.index,
            attack=attack,
            eps=eps,
            goal=goal,
            outcome=FAILED,
            prediction=NO_ANSWER,
            steps=0,
            passes=0,
            linf=0.0,
            l2=0.0,
            margin=clean.margin,
            confidence=clean.confidence,
            run=-1,
            seconds=0.0,
            cosine=clean.cosine,
        )
        self._add({"kind": "attack", **asdict(nothing)})
        message = f"image '{clean.image_id}' could not be read again for the attack: {reason}"
        self.add_checks([Check(name=f"lost image {clean.index}", level="warning", message=message)])

    def add_checks(self, checks: list[Check]) -> None:
        """Record findings; one of the same name replaces the earlier one."""
        for check in checks:
            if self._checks.get(check.name) != check:
                self._add({"kind": "check", **check.model_dump()})

    def add_cost(self, passes: Passes, seconds: float) -> None:
        """Record what this session has cost so far."""
        total = passes.forward + passes.backward
        cost = Cost(
            forward_passes=passes.forward,
            backward_passes=passes.backward,
            seconds=seconds,
            model_seconds=passes.seconds,
            passes_per_second=total / seconds if seconds else 0.0,
        )
        self._add({"kind": "cost", "session": self.session, "rank": self.rank, **cost.model_dump()})

    def add_stop(self, reason: str) -> None:
        """Record that this session stops before all is decided, and why."""
        self._add({"kind": "stop", "session": self.session, "reason": reason})

    @property
    def stopped(self) -> str | None:
        """Why this session has stopped before all was decided, on whichever process; None if it has not."""
        return self._stops.get(self.session)

    def add_estimate(self, estimate: Estimate) -> None:
        """Record what the run was expected to cost before its first stage; later estimates are of what is left."""
        if self.estimate is None:
            self._add({"kind": "estimate", **estimate.model_dump()})

    def _add(self, fact: dict[str, Any]) -> None:
        self._journal.append(fact)
        self._take(dict(fact))

    def _take_from_disk(self, path: Path, number: int, fact: dict[str, Any]) -> None:
        try:
            self._take(dict(fact))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"line {number} of '{path}' is no entry of this version: "
                "use the version that wrote it, or start over with --fresh"
            ) from None

    def _take(self, fact: dict[str, Any]) -> None:
        kind = fact.pop("kind")
        if kind == "clean":
            self.clean[fact["index"]] = CleanFact(**fact)
        elif kind == "left out":
            self.left_out[fact["index"]] = fact["image_id"]
        elif kind == "unreadable":
            self._unreadable[fact["index"]] = UnreadableImage(id=fact["id"], reason=fact["reason"])
        elif kind == "attack":
            row = AttackFact(**fact)
            self.found[row.eps, row.goal, row.attack, row.index] = row
            if row.outcome == FOOLED:
                self.fooled.add((row.goal, row.index))
        elif kind == "check":
            self._checks[fact["name"]] = Check(**fact)
        elif kind == "cost":
            key = fact.pop("session"), fact.pop("rank", 0)
            self._costs[key] = Cost(**fact)
        elif kind == "stop":
            self._stops[fact["session"]] = fact["reason"]
        elif kind == "estimate":
            self.estimate = Estimate(**fact)
        else:
            raise ValueError(f"unknown kind of fact '{kind}'")
