"""The rows of a certify run, one per image: `results.parquet`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

COLUMNS = (
    "paper_radius",
    "paper_s",
    "fcsb_radius",
    "fcsb_s",
    "cone_radius",
    "cdf_radius",
    "direction_radius",
    "deployed_radius",
    "mean_radius",
    "votes",
    "score",
    "ball",
    "variance",
)
"""Radii and bounds of other methods and claims from the same samples; null where a run has none."""

CERTIFY_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("image_id", pa.string()),
        ("label", pa.int32()),
        ("prediction", pa.int32()),
        ("correct", pa.bool_()),
        ("claim", pa.string()),
        ("radius", pa.float64()),
        ("abstained", pa.bool_()),
        ("stop", pa.string()),
        ("n", pa.int64()),
        ("n_pilot", pa.int64()),
        ("failed", pa.int64()),
        ("r", pa.float64()),
        *((name, pa.float64()) for name in COLUMNS),
        ("resize_norm", pa.float64()),
        ("passes", pa.int64()),
        ("seconds", pa.float64()),
        ("certificate", pa.string()),
    ]
)


@dataclass(frozen=True)
class CertifyFact:
    """What was certified for one image.

    Args:
        prediction: class of the deployed rule (of the mean feature for feature claims); 1 accepted, 0 rejected for
            open-set claims; -1 where there is none.
        correct: whether the prediction is right; None for an image of no known class.
        radius: certified, not rounded; 0 is ABSTAIN.
        resize_norm: 1 where the radius is one at the source image too, which was not resized; else None (withheld).
        columns: by name of `COLUMNS`.
        certificate: the record as JSON (`robustvlm.certify.Certificate`).
    """

    index: int
    image_id: str
    label: int
    prediction: int
    correct: bool | None
    claim: str
    radius: float
    stop: str
    n: int
    n_pilot: int
    failed: int
    r: float | None
    resize_norm: float | None
    passes: int
    seconds: float
    certificate: str
    columns: dict[str, float] = field(default_factory=dict)


def make_certify_rows(facts: Iterable[CertifyFact]) -> pa.Table:
    """Return the table, a row per image in source order.

    Example:
        >>> fact = CertifyFact(0, "a", 1, 1, True, "class", 0.2, "fixed", 900, 100, 0, None, 1.0, 1000, 0.5, "{}")
        >>> make_certify_rows([fact]).column("abstained").to_pylist()
        [False]
    """
    rows = [_row(fact) for fact in sorted(facts, key=lambda fact: fact.index)]
    return pa.Table.from_pylist(rows, schema=CERTIFY_SCHEMA)


def _row(fact: CertifyFact) -> dict[str, Any]:
    row = {name: getattr(fact, name) for name in CertifyFact.__dataclass_fields__ if name != "columns"}
    return row | {name: fact.columns.get(name) for name in COLUMNS} | {"abstained": fact.radius == 0.0}
