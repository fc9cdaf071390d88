"""Result rows: a row per image, attack and eps, from the facts in the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robustvlm.core.reading import first_line, require_regular
from robustvlm.errors import UserError
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


def read_rows(path: Path, wanted: pa.Schema, *, if_absent: str, again: str) -> pa.Table:
    """Return the table of a finished run, all its columns, after a look at those that are `wanted`.

    Args:
        wanted: names and types; a type of the same family (another width) will do. Fields that are not nullable must
            hold a value in every row.
        if_absent: what to say where there is no file; again: how the run is made again.

    Raises:
        UserError: there is no such file, it is damaged, or a column is missing or of another kind.
    """
    try:
        require_regular(path)
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(if_absent) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read '{path}' ({first_line(error)}): {again}") from None
    for field in wanted:
        if field.name not in table.column_names:
            raise UserError(f"'{path}' lacks the column '{field.name}': {again}")
        column = table.column(table.column_names.index(field.name))
        if _family(column.type) != _family(field.type) and not (field.nullable and pa.types.is_null(column.type)):
            raise UserError(f"the column '{field.name}' of '{path}' is {column.type}, expected {field.type}: {again}")
        if column.null_count and not field.nullable:
            raise UserError(f"the column '{field.name}' of '{path}' has rows without a value: {again}")
    return table


def required(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """Return some fields of a schema, as ones that every row has a value of.

    Example:
        >>> required(SCHEMA, ["label"]).field("label").nullable
        False
    """
    return pa.schema([pa.field(name, schema.field(name).type, nullable=False) for name in names])


def _family(kind: pa.DataType) -> str:
    tests = (
        ("whole numbers", pa.types.is_integer),
        ("numbers", pa.types.is_floating),
        ("text", lambda one: pa.types.is_string(one) or pa.types.is_large_string(one)),
        ("truth values", pa.types.is_boolean),
    )
    return next((name for name, test in tests if test(kind)), str(kind))


def write_rows(path: Path, table: pa.Table) -> None:
    """Write the rows as Parquet, atomically."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
