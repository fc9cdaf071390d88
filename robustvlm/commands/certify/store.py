"""All facts of a certify run: from the finding of one image to its row and its journal line."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from robustvlm.certify import Certificate, Finding, OpensetRule, Provenance, Sampled, settings_digest
from robustvlm.certify.claims import Claim, Plan, find_claim
from robustvlm.certify.normal import Array
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.commands.certify.spread import direction
from robustvlm.commands.common.store import JournalLedger, cost_of
from robustvlm.core import MOST_WORDS
from robustvlm.runs.folder import RunFolder

# The rows of a certify run, one per image: `results.parquet`

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
LATER = ("noise_radius", "level_radius", "noise_level", *(f"words{count}_radius" for count in range(MOST_WORDS + 1)))
"""Columns that only some runs have: where the noise is chosen for each image, what its choice and the answer keep and
what was chosen; and what is kept with so many changed words."""
TOKENS = pa.field("token_r", pa.list_(pa.float64()))
"""One column more of the claim about tokens: a bound for each."""


@dataclass(frozen=True)
class CertifyFact:
    """What was certified for one image.

    Args:
        prediction: class of the deployed rule (of the mean feature for feature claims); 1 accepted, 0 rejected for
            open-set claims; -1 where there is none.
        correct: whether the prediction is right; None for an image of no known class.
        radius: certified, not rounded; 0 is ABSTAIN.
        resize_norm: 1 where the radius is one at the source image too, which was not resized; else None (withheld).
        columns: by name of `COLUMNS` and `LATER`.
        direction: of the smoothed feature, where cosines are certified (`spread.direction`).
        certificate: the record as JSON (`robustvlm.certify.Certificate`).
        token_r: lower bounds of the norms of the smoothed image tokens, valid all at once (claim tokens).
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
    direction: str | None = None
    token_r: list[float] | None = None

    def written(self) -> dict[str, Any]:
        """Return the fact for the journal; direction and tokens only where there are any."""
        some = ("direction", TOKENS.name)
        return {name: value for name, value in asdict(self).items() if name not in some or value is not None}


def make_certify_rows(facts: Iterable[CertifyFact]) -> pa.Table:
    """Return the table, a row per image in source order.

    Example:
        >>> fact = CertifyFact(0, "a", 1, 1, True, "class", 0.2, "fixed", 900, 100, 0, None, 1.0, 1000, 0.5, "{}")
        >>> make_certify_rows([fact]).column("abstained").to_pylist()
        [False]
    """
    ordered = sorted(facts, key=lambda fact: fact.index)
    # Tables of other claims are as they were before there were tokens.
    schema = CERTIFY_SCHEMA.append(TOKENS) if any(fact.token_r is not None for fact in ordered) else CERTIFY_SCHEMA
    for name in LATER:
        if any(name in fact.columns for fact in ordered):
            schema = schema.append(pa.field(name, pa.float64()))
    return pa.Table.from_pylist([_row(fact, schema) for fact in ordered], schema=schema)


def _row(fact: CertifyFact, schema: pa.Schema) -> dict[str, Any]:
    row = {name: getattr(fact, name) for name in CertifyFact.__dataclass_fields__ if name in schema.names}
    known = [*COLUMNS, *(name for name in LATER if name in schema.names)]
    return row | {name: fact.columns.get(name) for name in known} | {"abstained": fact.radius == 0.0}


# All facts of a certify run: kept in memory, and appended to the run's journal as they come


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
        self._add({"kind": "image", **fact.written()})

    def add_cost(self, *, passes: int, seconds: float, model_seconds: float) -> None:
        """Record what this session has cost so far."""
        self._add_cost(cost_of(forward=passes, seconds=seconds, model_seconds=model_seconds))

    def _take_own(self, kind: str, fact: dict[str, Any]) -> None:
        if kind != "image":
            raise ValueError(f"unknown kind of fact '{kind}'")
        self.found[fact["index"]] = CertifyFact(**fact)


# From the finding of one image to its row, with the record of its certificate

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}


@dataclass(frozen=True)
class Recorder:
    """Turns what the engine found into rows.

    Args:
        encoder: fingerprint of the encoder with its precision.
        text: class embeddings [K, D] for the class of the mean feature; None: no classes.
        class_names: of the classes, or of the entries of a gallery, whose classes `entries` has.
        prompts: digest of all else that tells them apart (`setup.prompts_of`).
        rule: open-set rule of a model with thresholds of its own.
    """

    config: CertifyConfig
    plan: Plan
    encoder: str
    text: Array | None
    class_names: Sequence[str]
    rule: OpensetRule | None = None
    prompts: str | None = None
    entries: Sequence[int] | None = None

    @cached_property
    def _claim(self) -> Claim:
        return find_claim(self.config.claim)

    def fact(self, sampled: Sampled, *, resize_norm: float | None) -> CertifyFact:
        """Return the row of an image."""
        job, found = sampled.job, sampled.finding
        prediction = self._prediction(found)
        columns = found.columns | self._claim.deployed_columns(found, self.config.bounding, sigma=sampled.sigma)
        return CertifyFact(
            index=job.index,
            image_id=job.image_id,
            label=job.label,
            prediction=prediction,
            correct=self._claim.correct(job.label, self._class_of(prediction)),
            claim=found.claim or self.config.claim,
            radius=found.radius,
            stop=found.stop,
            n=found.n,
            n_pilot=found.n_pilot,
            failed=found.failed,
            r=found.r,
            resize_norm=resize_norm,
            passes=sampled.passes,
            seconds=sampled.seconds,
            certificate=json.dumps(self._certificate(sampled, resize_norm, columns.get("deployed_radius")).to_dict()),
            columns=columns,
            direction=self._direction(found),
            token_r=None if found.parts is None else found.parts.tolist(),
        )

    def _class_of(self, prediction: int) -> int:
        """Return the class that a prediction stands for: itself, or that of an entry of a gallery."""
        return prediction if self.entries is None or prediction < 0 else self.entries[prediction]

    def _direction(self, found: Finding) -> str | None:
        if found.mean is None or not self._claim.curve:
            return None
        parts = 1 if found.parts is None else len(found.parts)
        return direction(found.mean, found.n + found.n_pilot - found.failed, parts)

    def _prediction(self, found: Finding) -> int:
        if found.prediction is not None:
            return found.prediction
        if self.text is None or found.mean is None:
            return -1
        return int(np.argmax(self.text @ found.mean))

    @cached_property
    def _classes(self) -> str:
        return settings_digest(list(self.class_names))

    @cached_property
    def _thresholds(self) -> dict[str, float] | None:
        return self._claim.thresholds(self.config, self.rule)

    def _certificate(self, sampled: Sampled, resize_norm: float | None, deployed: float | None) -> Certificate:
        found, image_id = sampled.finding, sampled.job.image_id
        claim = self._claim
        how = Provenance(
            sigma=sampled.sigma,
            alpha=self.config.alpha,
            alpha_split=self.plan.alpha_split,
            n=found.n + found.n_pilot if claim.pilot_counts else found.n,
            n_pilot=0 if claim.pilot_counts else found.n_pilot,
            stop_rule=self.plan.stop_rule,
            bound=self.plan.bound,
            seeds=sampled.seeds,
            dtype=_DTYPES[self.config.precision],
            encoder=self.encoder,
            resize_norm=resize_norm,
            label_source=self.plan.label_source,
            direction_source=self.plan.direction_source,
            deployed_n0=self.config.deployed,
        )
        by_class = claim.about_class
        named = found.prediction if by_class and found.prediction is not None and found.prediction >= 0 else None
        return Certificate.from_dict(
            {
                "claim": found.claim or self.config.claim,
                "theorem": self.plan.theorem,
                "radius": found.radius,
                "cos0": self.config.min_cos,
                "r": found.r,
                "label": found.prediction if by_class else None,
                "label_name": None if named is None else claim.outcome(named, self.class_names),
                "rule": self.plan.rule,
                "classes": self._classes if claim.needs_classes else None,
                "n_classes": len(self.class_names) if claim.needs_classes else None,
                "prompts": self.prompts,
                "thresholds": self._thresholds,
                "image_id": image_id,
                "image": sampled.image,
                "deployed_radius": deployed,
                "threat": self.config.against.threat.name,
                "provenance": how.__dict__,
            }
        )
