"""From the rows of a certify run to claims that can be attacked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from robustvlm.data.source import DataSource
from robustvlm.evaluation.audit_claims import Array, Claim, ClassClaim, FeatureClaim, VoteClaim
from robustvlm.evaluation.audit_openset import OpensetClaim, RuleClaim
from robustvlm.evaluation.certifying.setup import openset_vectors, rule_of, vectors_of_classes
from robustvlm.models import VLM
from robustvlm.report.certify_record import CertifyRecord

MakeClaim = Callable[[dict[str, Any]], Callable[[Array, Array], Claim]]

CLAIMS: dict[str, type[Claim]] = {
    "feature": FeatureClaim,
    "class": ClassClaim,
    "vote": VoteClaim,
    "openset": OpensetClaim,
}
"""Claims by name."""


def claim_maker(run: CertifyRecord, vlm: VLM, source: DataSource) -> MakeClaim:
    """Return what makes an image's row of results, and two samples of its features, into the claim to attack."""
    config = run.config
    if config.claim == "feature":
        return lambda row: partial(_feature, row, run)
    rule = rule_of(config, source.class_names)
    if rule is not None:
        return lambda row: lambda *_: RuleClaim(rule=rule, accepts=row["prediction"] == 1, radius=row["radius"])
    text = vectors_of_classes(config, vlm, source.class_names, source.templates)
    assert text is not None
    if config.claim == "openset":
        assert config.tau is not None
        vectors, tau = openset_vectors(config, vlm, text, source.templates), config.tau
        return lambda row: (
            lambda *_: OpensetClaim(vectors=vectors, tau=tau, accepts=row["prediction"] == 1, radius=row["radius"])
        )
    if config.claim == "vote":
        return lambda row: (
            lambda *_: VoteClaim(text=text, label=row["prediction"], radius=row["radius"], logit_scale=vlm.logit_scale)
        )
    return lambda row: lambda *_: ClassClaim(text=text, label=row["prediction"], radius=row["radius"])


def _feature(row: dict[str, Any], run: CertifyRecord, steering: Array, evidence: Array) -> FeatureClaim:
    mean = np.nan_to_num(steering).mean(axis=0)
    assert run.config.min_cos is not None
    return FeatureClaim(
        sigma=run.config.sigma,
        cos0=run.config.min_cos,
        radius=row["radius"],
        r=row["r"],
        direction=mean / max(float(np.linalg.norm(mean)), 1e-12),
        clean=evidence,
    )
