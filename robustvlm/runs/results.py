"""Result rows: a row per image, attack and eps, from the facts in the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robustvlm.runs.files import replacing

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("image_id", pa.string()),
        ("label", pa.int32()),
        ("clean_prediction", pa.int32()),
        ("attack", pa.string()),
        ("norm", pa.string()),
        ("eps", pa.float64()),
        ("outcome", pa.string()),
        ("adversarial_prediction", pa.int32()),
        ("steps", pa.int32()),
        ("passes", pa.int32()),
        ("linf", pa.float64()),
        ("l2", pa.float64()),
        ("clean_margin", pa.float64()),
        ("margin", pa.float64()),
        ("clean_confidence", pa.float64()),
        ("confidence", pa.float64()),
        ("restart", pa.int32()),
        ("seconds", pa.float64()),
    ]
)

CLEAN_WRONG, SKIPPED = "clean_wrong", "skipped"


@dataclass(frozen=True)
class CleanFact:
    """What the model says of an unperturbed image; `targets` are the likeliest wrong classes."""

    index: int
    image_id: str
    label: int
    prediction: int
    margin: float
    confidence: float
    targets: list[int]

    @property
    def correct(self) -> bool:
        return self.prediction == self.label


@dataclass(frozen=True)
class AttackFact:
    """What one attack found for one image at one eps."""

    index: int
    attack: str
    eps: float
    outcome: str
    prediction: int
    steps: int
    passes: int
    linf: float
    l2: float
    margin: float
    confidence: float
    run: int
    seconds: float


def make_rows(
    clean: Sequence[CleanFact], found: Sequence[AttackFact], *, norm: str, eps: Sequence[float], attacks: Sequence[str]
) -> pa.Table:
    """Return the full table, ordered by eps, attack and image, with a row also for what needed no attack.

    Images that were wrong when clean are "clean_wrong"; images fooled by an earlier attack or at a smaller eps are
    "skipped"; neither was attacked, so their measured columns hold what is known of the clean image.
    """
    by_stage = {(fact.eps, fact.attack, fact.index): fact for fact in found}
    rows = [
        _row(image, by_stage.get((value, attack, image.index)), norm=norm, eps=value, attack=attack)
        for value in eps
        for attack in attacks
        for image in sorted(clean, key=lambda fact: fact.index)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _row(image: CleanFact, fact: AttackFact | None, *, norm: str, eps: float, attack: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "index": image.index,
        "image_id": image.image_id,
        "label": image.label,
        "clean_prediction": image.prediction,
        "attack": attack,
        "norm": norm,
        "eps": eps,
        "outcome": SKIPPED if image.correct else CLEAN_WRONG,
        "adversarial_prediction": -1,
        "steps": 0,
        "passes": 0,
        "linf": 0.0,
        "l2": 0.0,
        "clean_margin": image.margin,
        "margin": image.margin,
        "clean_confidence": image.confidence,
        "confidence": image.confidence,
        "restart": -1,
        "seconds": 0.0,
    }
    if fact is not None:
        measured = asdict(fact)
        row |= {key: measured[key] for key in ("outcome", "steps", "passes", "linf", "l2", "margin", "confidence")}
        row |= {"adversarial_prediction": fact.prediction, "restart": fact.run, "seconds": fact.seconds}
    return row


def write_rows(path: Path, table: pa.Table) -> None:
    """Write the rows as Parquet, atomically."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
