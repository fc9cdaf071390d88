"""The facts of attacks on scores: kept in memory, and appended to the run's journal as they come."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from robustvlm.evaluation.journal_ledger import JournalLedger, cost_of
from robustvlm.runs.folder import RunFolder

ATTACKED_SCHEMA = pa.schema(
    [
        ("score", pa.string()),
        ("set", pa.string()),
        ("goal", pa.string()),
        ("attack", pa.string()),
        ("index", pa.int32()),
        ("image_id", pa.string()),
        ("clean", pa.float64()),
        ("attacked", pa.float64()),
        ("outcome", pa.string()),
        ("steps", pa.int32()),
        ("passes", pa.int32()),
        ("linf", pa.float64()),
        ("l2", pa.float64()),
        ("seconds", pa.float64()),
    ]
)


@dataclass(frozen=True)
class AttackedFact:
    """What one attack made of one image's score.

    Args:
        score: that was attacked; set: of the image; goal: deny or intrude.
        clean, attacked: the score before, and the worst one met (lowest for deny, highest for intrude).
        outcome: fooled when the threshold was passed, robust, or failed.
    """

    score: str
    set: str
    goal: str
    attack: str
    index: int
    image_id: str
    clean: float
    attacked: float
    outcome: str
    steps: int
    passes: int
    linf: float
    l2: float
    seconds: float


class AttackLedger(JournalLedger):
    """The facts of a detect run's attacks."""

    def __init__(self, folder: RunFolder) -> None:
        self.found: dict[tuple[str, str, str, str], AttackedFact] = {}
        super().__init__(folder)

    def add(self, fact: AttackedFact) -> None:
        """Record what an attack found for an image."""
        self._add({"kind": "attacked", **asdict(fact)})

    def done(self, score: str, set_name: str, attack: str) -> set[str]:
        """Return the ids of the images that a stage is done with."""
        return {key[3] for key in self.found if key[:3] == (score, set_name, attack)}

    def add_cost(self, *, forward: int, backward: int, seconds: float, model_seconds: float) -> None:
        """Record what this session has cost so far."""
        self._add_cost(cost_of(forward=forward, backward=backward, seconds=seconds, model_seconds=model_seconds))

    def table(self) -> pa.Table:
        """Return the facts as a table, in a fixed order."""
        order = sorted(self.found.values(), key=lambda f: (f.score, f.set, f.attack, f.index))
        return pa.Table.from_pylist([asdict(fact) for fact in order], schema=ATTACKED_SCHEMA)

    def _take_own(self, kind: str, fact: dict[str, Any]) -> None:
        if kind != "attacked":
            raise ValueError(f"unknown kind of fact '{kind}'")
        taken = AttackedFact(**fact)
        self.found[taken.score, taken.set, taken.attack, taken.image_id] = taken
