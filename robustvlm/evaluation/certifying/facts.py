"""From the finding of one image to its row, with the record of its certificate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from robustvlm.certify import (
    Certificate,
    Finding,
    OpensetRule,
    Provenance,
    Sampled,
    settings_digest,
)
from robustvlm.certify.claims import Claim, Plan, find_claim
from robustvlm.certify.normal import Array
from robustvlm.runs.certify_config import CertifyConfig
from robustvlm.runs.certify_rows import CertifyFact

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}


@dataclass(frozen=True)
class Recorder:
    """Turns what the engine found into rows.

    Args:
        encoder: fingerprint of the encoder with its precision.
        text: class embeddings [K, D] for the class of the mean feature; None: no classes.
        class_names: of the classes; prompts: digest of all else that tells them apart (`setup.prompts_of`).
        rule: open-set rule of a model with thresholds of its own.
    """

    config: CertifyConfig
    plan: Plan
    encoder: str
    text: Array | None
    class_names: Sequence[str]
    rule: OpensetRule | None = None
    prompts: str | None = None

    @cached_property
    def _claim(self) -> Claim:
        return find_claim(self.config.claim)

    def fact(self, sampled: Sampled, *, resize_norm: float | None) -> CertifyFact:
        """Return the row of an image."""
        task, found = sampled.task, sampled.finding
        prediction = self._prediction(found)
        columns = found.columns | self._claim.deployed_columns(found, self.config, sigma=sampled.sigma)
        return CertifyFact(
            index=task.index,
            image_id=task.image_id,
            label=task.label,
            prediction=prediction,
            correct=self._claim.correct(task.label, prediction),
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
        )

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
        found, image_id = sampled.finding, sampled.task.image_id
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
        return Certificate.from_dict(
            {
                "claim": found.claim or self.config.claim,
                "theorem": self.plan.theorem,
                "radius": found.radius,
                "cos0": self.config.min_cos,
                "r": found.r,
                "label": found.prediction if by_class else None,
                "label_name": self.class_names[found.prediction] if by_class and found.prediction is not None else None,
                "rule": self.plan.rule,
                "classes": self._classes if claim.needs_classes else None,
                "n_classes": len(self.class_names) if claim.needs_classes else None,
                "prompts": self.prompts,
                "thresholds": self._thresholds,
                "image_id": image_id,
                "image": sampled.image,
                "deployed_radius": deployed,
                "provenance": how.__dict__,
            }
        )
