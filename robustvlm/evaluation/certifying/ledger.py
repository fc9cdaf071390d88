"""All facts of a certify run: kept in memory, and appended to the run's journal as they come."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from robustvlm.evaluation.journal_ledger import JournalLedger, cost_of
from robustvlm.runs.certify_rows import CertifyFact
from robustvlm.runs.folder import RunFolder


class CertifyLedger(JournalLedger):
    """The facts of a certify run: what was certified for each image."""

    def __init__(self, folder: RunFolder, *, rank: int = 0, session: str | None = None) -> None:
        self.found: dict[int, CertifyFact] = {}
        super().__init__(folder, rank=rank, session=session)

    @property
    def seen(self) -> set[str]:
        """Ids of the images that are finished or cannot be read."""
        return {fact.image_id for fact in self.found.values()} | {image.id for image in self._unreadable.values()}

    def add_image(self, fact: CertifyFact) -> None:
        """Record what was certified for an image."""
        self._add({"kind": "image", **asdict(fact)})

    def add_cost(self, *, passes: int, seconds: float, model_seconds: float) -> None:
        """Record what this session has cost so far."""
        self._add_cost(cost_of(forward=passes, seconds=seconds, model_seconds=model_seconds))

    def _take_own(self, kind: str, fact: dict[str, Any]) -> None:
        if kind != "image":
            raise ValueError(f"unknown kind of fact '{kind}'")
        self.found[fact["index"]] = CertifyFact(**fact)
