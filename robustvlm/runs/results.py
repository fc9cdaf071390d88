"""Result rows: a row per image, attack and eps, from the facts in the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robustvlm.runs.files import replacing
from robustvlm.runs.verdicts import NO_ANSWER

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("image_id", pa.string()),
        ("label", pa.int32()),
        ("clean_prediction", pa.int32()),
        ("attack", pa.string()),
        ("norm", pa.string()),
        ("eps", pa.float64()),
        ("goal", pa.string()),
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
        ("clean_cosine", pa.float64()),
        ("cosine", pa.float64()),
        ("restart", pa.int32()),
        ("seconds", pa.float64()),
    ]
)

CLEAN_WRONG, FOOLED, SKIPPED, FAILED, UNDECIDED = "clean_wrong", "fooled", "skipped", "failed", "undecided"


@dataclass(frozen=True)
class CleanFact:
    """What the model says of an unperturbed image, under the run's first goal.

    Args:
        prediction: class, -1 for a rejected image, -2 where the output is not finite.
        margin: the goal's margin, positive as long as the goal is not reached.
        targets: the classes worth aiming at, the likeliest first.
        exposed: the goal is not reached and the output finite, so that there is something to attack.
        cosine: the cosine that a feature goal is about.
    """

    index: int
    image_id: str
    label: int
    prediction: int
    margin: float
    confidence: float
    targets: list[int]
    exposed: bool
    cosine: float | None = None


@dataclass(frozen=True)
class AttackFact:
    """What one attack found for one image at one eps under one goal."""

    index: int
    attack: str
    eps: float
    goal: str
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
    cosine: float | None = None


def make_rows(
    clean: Sequence[CleanFact],
    found: Sequence[AttackFact],
    *,
    norm: str,
    eps: Sequence[float],
    attacks: Sequence[str],
    goals: Sequence[str] = ("misclassify",),
) -> pa.Table:
    """Return the full table, ordered by eps, goal, attack and image, with a row also for what needed no attack.

    Images for which the goal was reached unperturbed are "clean_wrong"; images fooled by an earlier attack or at a
    smaller eps are "skipped"; those that the run did not come to are "undecided". None of these was attacked, so their
    measured columns hold what is known of the clean image.
    """
    by_stage = {(fact.eps, fact.goal, fact.attack, fact.index): fact for fact in found}
    images = sorted(clean, key=lambda fact: fact.index)
    fallen: set[tuple[str, int]] = set()
    rows = []
    for value in eps:
        for goal in goals:
            for attack in attacks:
                stage = {"attack": attack, "norm": norm, "eps": value, "goal": goal}
                for image in images:
                    fact = by_stage.get((value, goal, attack, image.index))
                    rows.append(_row(image, fact, stage, fallen=(goal, image.index) in fallen))
                    if fact is not None and fact.outcome == FOOLED:
                        fallen.add((goal, image.index))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _row(image: CleanFact, fact: AttackFact | None, stage: dict[str, Any], *, fallen: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "index": image.index,
        "image_id": image.image_id,
        "label": image.label,
        "clean_prediction": image.prediction,
        **stage,
        "outcome": CLEAN_WRONG if not image.exposed else SKIPPED if fallen else UNDECIDED,
        "adversarial_prediction": NO_ANSWER,
        "steps": 0,
        "passes": 0,
        "linf": 0.0,
        "l2": 0.0,
        "clean_margin": image.margin,
        "margin": image.margin,
        "clean_confidence": image.confidence,
        "confidence": image.confidence,
        "clean_cosine": image.cosine,
        "cosine": image.cosine,
        "restart": -1,
        "seconds": 0.0,
    }
    if fact is not None:
        measured = asdict(fact)
        row |= {key: measured[key] for key in ("outcome", "steps", "passes", "linf", "l2", "margin", "confidence")}
        prediction = NO_ANSWER if fact.outcome == FAILED else fact.prediction
        row |= {"adversarial_prediction": prediction, "restart": fact.run, "seconds": fact.seconds}
        row["cosine"] = fact.cosine
    return row


def write_rows(path: Path, table: pa.Table) -> None:
    """Write the rows as Parquet, atomically."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
