"""From a finished certify run to its audit: the same encoder, images and claims, attacked and judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from robustvlm.certify import contrast_vectors
from robustvlm.data import open_data
from robustvlm.data.pixels import to_pixels
from robustvlm.data.source import DataSource, Sample, select
from robustvlm.defenses import SmoothedVLM, load_pipeline
from robustvlm.errors import UserError
from robustvlm.evaluation.audit import Finding, Target, audit_image
from robustvlm.evaluation.audit_claims import Array, Claim, ClassClaim, FeatureClaim, VoteClaim
from robustvlm.evaluation.audit_openset import OpensetClaim
from robustvlm.evaluation.audit_search import Effort
from robustvlm.evaluation.certifying.encoder import NoisyEncoder
from robustvlm.evaluation.certifying.setup import embed_classes, list_of_names
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.report.certify_record import CertifyRecord, load_certify_run
from robustvlm.runs.certify_config import CertifyConfig
from robustvlm.runs.files import write_text

MakeClaim = Callable[[dict[str, Any]], Callable[[Array, Array], Claim]]


class AuditResult(BaseModel):
    """What an audit found: per image and part of its radius, the lowest value reached beside the certified bound.

    Args:
        quantity: what was measured, in words.
        effort: settings of the search. passes: noisy images through the encoder; a gradient counts twice.
        certified: images of the run with a certificate; `findings` may cover fewer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    claim: str
    quantity: str
    certified: int
    effort: dict[str, Any]
    seed: int
    passes: int
    seconds: float
    findings: list[Finding]

    @property
    def broken(self) -> list[Finding]:
        """The findings below a certified bound, Monte-Carlo error excluded."""
        return [finding for finding in self.findings if finding.broken]


class _Deployed(SmoothedVLM):
    """The smoothed encoder of a run: noise at the run's resolution, passes in its precision, counted."""

    def __init__(self, encoder: NoisyEncoder, *, sigma: float, resolution: int, rows_per_pass: int) -> None:
        super().__init__(encoder.vlm, sigma, rows_per_pass=rows_per_pass)
        self.image_size = resolution  # noise is added here; the model's own resize is part of what follows
        self._precision = encoder.precision
        self._encode = encoder.vlm.encode_noisy if isinstance(encoder.vlm, SmoothedVLM) else encoder.vlm.encode_image
        self.rows = 0

    def encode_noisy(self, noisy: Tensor) -> Tensor:
        """Return unit features of noisy images [R, 3, S, S], as the run's encoder does."""
        self.rows += len(noisy) * (2 if torch.is_grad_enabled() else 1)
        wide = noisy.double() if self._precision == "fp64" else noisy
        with torch.autocast(noisy.device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            return self._encode(wide)


def audit_folder(
    folder: Path,
    effort: Effort | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    rows_per_pass: int = 256,
    on_image: Callable[[int, int], None] | None = None,
) -> AuditResult:
    """Attack the certificates of a finished run, write `audit.json` into its folder and return the result.

    Args:
        limit: audit this many of the images that have a certificate, a fixed selection.
        on_image: called with the number of images done and their total.

    Raises:
        UserError: the run has not ended, or model or images are not those that it was made with.
    """
    run = load_certify_run(folder)
    effort = effort or Effort()
    source = open_data(
        run.config.data, classes=_path(run.config.classes), templates=_path(run.config.templates),
        tree=_path(run.config.tree),
    )  # fmt: skip
    vlm = load_pipeline(run.config.model, device=device)
    encoder = NoisyEncoder(vlm, precision=run.config.precision)
    _require_same_model(run, encoder)
    model = _Deployed(encoder, sigma=run.config.sigma, resolution=run.config.resolution, rows_per_pass=rows_per_pass)
    make = claim_maker(run, vlm, source)
    rows = {row["image_id"]: row for row in run.rows.to_pylist() if row["radius"] > 0.0}
    chosen = set(select(rows, limit))
    began = time.monotonic()
    findings: list[Finding] = []
    for done, (row, pixels) in enumerate(_images(run, source, {name: rows[name] for name in chosen}, vlm), start=1):
        target = Target(image_id=row["image_id"], pixels=pixels, radius=row["radius"], claim=make(row))
        findings += audit_image(model, target, effort, alpha=effort.alpha / len(chosen), seed=seed)
        if on_image is not None:
            on_image(done, len(chosen))
    if len({finding.image_id for finding in findings}) < len(chosen):
        raise UserError(f"some images of the run are no longer in '{run.config.data}': audit it on the same data")
    result = AuditResult(
        run=run.name,
        claim=run.config.claim,
        quantity=_CLAIMS[run.config.claim].quantity,
        certified=len(rows),
        effort=asdict(effort),
        seed=seed,
        passes=model.rows,
        seconds=time.monotonic() - began,
        findings=findings,
    )
    write_text(folder / "audit.json", result.model_dump_json(indent=1) + "\n")
    return result


_CLAIMS: dict[str, type[Claim]] = {
    "feature": FeatureClaim,
    "class": ClassClaim,
    "vote": VoteClaim,
    "openset": OpensetClaim,
}


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _require_same_model(run: CertifyRecord, encoder: NoisyEncoder) -> None:
    before = (run.manifest.get("model") or {}).get("fingerprint")
    if before != encoder.vlm.fingerprint:
        raise UserError(f"the model '{run.config.model}' has changed since '{run.folder}' was certified: certify again")


def _images(
    run: CertifyRecord, source: DataSource, rows: dict[str, dict[str, Any]], vlm: VLM
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield the wanted rows with their pixels [1, 3, S, S], in the order of the data."""
    waiting = dict(rows)
    for item in source.samples(keep=lambda name: name in waiting):
        if isinstance(item, Sample) and item.id in waiting:
            pixels = to_pixels(item.image, run.config.resolution, interpolation=vlm.interpolation)
            yield waiting.pop(item.id), pixels[None]
        if not waiting:
            return


def claim_maker(run: CertifyRecord, vlm: VLM, source: DataSource) -> MakeClaim:
    """Return what makes an image's row of results, and two samples of its features, into the claim to attack."""
    config = run.config
    if config.claim == "feature":
        return lambda row: partial(_feature, row, run)
    text = embed_classes(vlm, source.class_names, source.templates)
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


def openset_vectors(config: CertifyConfig, vlm: VLM, text: Array, templates: tuple[str, ...]) -> Array:
    """Return the vectors [K, A, D] of a run's open-set score."""
    against = np.zeros((0, text.shape[1]))
    if config.antibodies is not None:
        names = list_of_names(Path(config.antibodies))
        against = class_embeddings(vlm, names, templates).double().cpu().numpy()
    return contrast_vectors(text, against, config.weight)


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
