"""All facts of a run: kept in memory, and appended to the run's journal as they come."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Any

from robustvlm.attacks import FAILED, FOOLED, Result
from robustvlm.attacks.oracle import Passes
from robustvlm.data.source import DataSource, Unreadable, select
from robustvlm.errors import UserError
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.journal import Journal, read_journal
from robustvlm.runs.results import AttackFact, CleanFact
from robustvlm.runs.summary import Check, Cost, UnreadableImage


class Ledger:
    """The facts of a run folder; opening it reads those of earlier sessions.

    A fact that is added is in the journal before the call returns.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.clean: dict[int, CleanFact] = {}
        self.found: dict[tuple[float, str, int], AttackFact] = {}
        self.fooled: set[int] = set()
        self._unreadable: dict[int, UnreadableImage] = {}
        self._checks: dict[str, Check] = {}
        self._costs: dict[str, Cost] = {}
        self._session = uuid.uuid4().hex[:8]
        for number, fact in enumerate(read_journal(folder.journal_path), start=1):
            self._take_from_disk(number, fact)
        self._journal = Journal(folder.journal_path)

    def close(self) -> None:
        """Force all facts to the disk."""
        self._journal.close()

    @property
    def seen(self) -> set[str]:
        """Ids of the images of which the clean pass knows the answer."""
        return {fact.image_id for fact in self.clean.values()} | {image.id for image in self._unreadable.values()}

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
        """Passes and time over all sessions; a killed one counts up to its last note of them."""
        parts = self._costs.values()
        forward, backward = sum(part.forward_passes for part in parts), sum(part.backward_passes for part in parts)
        seconds = sum(part.seconds for part in parts)
        return Cost(
            forward_passes=forward,
            backward_passes=backward,
            seconds=seconds,
            model_seconds=sum(part.model_seconds for part in parts),
            passes_per_second=(forward + backward) / seconds if seconds else 0.0,
        )

    def count_images(self, source: DataSource, limit: int | None) -> int | None:
        """Return how many images the run covers, or None when only streaming can tell."""
        ids = source.ids()
        return len(select(ids, limit)) if ids is not None else limit

    def remaining(self, eps: float, attack: str) -> dict[str, CleanFact]:
        """Return, by image id, the images this stage has still to attack."""
        return {
            fact.image_id: fact
            for index, fact in sorted(self.clean.items())
            if fact.correct and index not in self.fooled and (eps, attack, index) not in self.found
        }

    def attacked(self, eps: float, attack: str) -> int:
        """Return how many images this stage has finished."""
        return sum(1 for known_eps, known_attack, _ in self.found if (known_eps, known_attack) == (eps, attack))

    def add_clean(self, fact: CleanFact) -> None:
        """Record what the model says of an unperturbed image."""
        self._add({"kind": "clean", **asdict(fact)})

    def add_unreadable(self, index: int, item: Unreadable) -> None:
        """Record an image that could not be decoded; streams name damaged shards every time they are read."""
        if self._unreadable.get(index) != UnreadableImage(id=item.id, reason=item.reason):
            self._add({"kind": "unreadable", "index": index, "id": item.id, "reason": item.reason})

    def add_result(self, result: Result, attack: str, eps: float) -> None:
        """Record the answer of one attack for one image."""
        fact = AttackFact(
            index=result.job.index,
            attack=attack,
            eps=eps,
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
        )
        self._add({"kind": "attack", **asdict(fact)})

    def add_lost(self, clean: CleanFact, attack: str, eps: float, reason: str) -> None:
        """Record an image that was readable in the clean pass and is no longer: the attack could not be made."""
        nothing = AttackFact(
            clean.index, attack, eps, FAILED, -1, 0, 0, 0.0, 0.0, clean.margin, clean.confidence, -1, 0.0
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
        self._add({"kind": "cost", "session": self._session, **cost.model_dump()})

    def _add(self, fact: dict[str, Any]) -> None:
        self._journal.append(fact)
        self._take(dict(fact))

    def _take_from_disk(self, number: int, fact: dict[str, Any]) -> None:
        try:
            self._take(dict(fact))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"line {number} of '{self.folder.journal_path}' is no entry of this version: "
                "use the version that wrote it, or start over with --fresh"
            ) from None

    def _take(self, fact: dict[str, Any]) -> None:
        kind = fact.pop("kind")
        if kind == "clean":
            self.clean[fact["index"]] = CleanFact(**fact)
        elif kind == "unreadable":
            self._unreadable[fact["index"]] = UnreadableImage(id=fact["id"], reason=fact["reason"])
        elif kind == "attack":
            row = AttackFact(**fact)
            self.found[row.eps, row.attack, row.index] = row
            if row.outcome == FOOLED:
                self.fooled.add(row.index)
        elif kind == "check":
            self._checks[fact["name"]] = Check(**fact)
        elif kind == "cost":
            session = fact.pop("session")
            self._costs[session] = Cost(**fact)
        else:
            raise ValueError(f"unknown kind of fact '{kind}'")
