"""A run of immunisation: encode once, make prototypes and antibodies, vaccinate, set thresholds, measure, save."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustvlm.core.foreign_text import without_secrets
from robustvlm.data import DataSource
from robustvlm.data.unlabelled import Unlabelled
from robustvlm.defenses.immunity import (
    AdaptedVLM,
    Immunised,
    Immunity,
    Labelled,
    Prototypes,
    VaccineSettings,
    fit_prototypes,
    immunise,
    text_only,
    text_prototypes,
)
from robustvlm.defenses.immunity.files import card_settings, save_tensors
from robustvlm.defenses.immunity.losses import automatic_margin
from robustvlm.defenses.immunity.recipe import thresholds_of
from robustvlm.defenses.prompts import Features
from robustvlm.evaluation.detecting.scoring import copies
from robustvlm.evaluation.immunizing import record as facts
from robustvlm.evaluation.immunizing.images import encode_both, encode_unknown, held_back, open_held_out
from robustvlm.evaluation.immunizing.measuring import measure
from robustvlm.evaluation.immunizing.noise import noisy_means
from robustvlm.evaluation.immunizing.texts import Made, diagnose, embedder, make_antibodies
from robustvlm.llm import LlmClient
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import CARD_NAME, Card, write_card
from robustvlm.models.zero_shot import require_distinct
from robustvlm.report.immunize_html import load_immunize_run, write_immunize_report
from robustvlm.runs.checksums import forget_checksums, write_checksums
from robustvlm.runs.files import write_text
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.immunize_config import RECORD, ImmunizeConfig
from robustvlm.runs.manifest import Manifest

Record = dict[str, Any]


@dataclass(frozen=True)
class ImmunizeObserver:
    """Told how a run goes; every part may be left out. on_images: (which, done); on_step: steps; on_classes: asked."""

    on_images: Callable[[str, int], None] | None = None
    on_step: Callable[[int], None] | None = None
    on_classes: Callable[[int], None] | None = None


@dataclass(frozen=True)
class PreparedImmunize:
    """A run of immunisation that is ready to start."""

    config: ImmunizeConfig
    folder: RunFolder
    manifest: Manifest
    vlm: VLM
    source: DataSource
    client: LlmClient | None = None
    unknown: Sequence[Unlabelled] = ()
    observer: ImmunizeObserver = field(default_factory=ImmunizeObserver)

    def run(self, observer: ImmunizeObserver | None = None, *, fresh: bool = False) -> Record:
        """Make the model and return its record; a finished run only returns its record.

        Raises:
            UserError: images, antibodies or settings that nothing can be made of, or an earlier run under others.
        """
        with self.folder.opened(self.manifest, fresh=fresh) as manifest:
            work = replace(self, observer=observer or self.observer, manifest=manifest)
            path = self.folder.path / RECORD
            if path.exists() and (self.folder.path / CARD_NAME).exists() and self.folder.sealed:
                found: Record = load_immunize_run(self.folder.path).record
            else:
                began = time.monotonic()
                made, found = work._make()
                found["seconds"] = round(time.monotonic() - began, 3)
                save_model(self.folder.path, made, found, self.config.model, self.vlm, manifest)
            if not self.folder.report_path.exists():
                write_immunize_report(self.folder.path)
            return found

    def _make(self) -> tuple[Immunity, Record]:
        embed = embedder(self.vlm, self.source.templates)
        text = embed(self.source.class_names)
        require_distinct(self.vlm, self.source.class_names, self.source.templates, text)
        if not self.config.images:
            return self._from_texts(text)
        fit, held = encode_both(
            self.vlm,
            self.config,
            self.source,
            self.folder.features_path,
            self.observer.on_images,
            owner=self.manifest,
        )
        xi = None if self.config.xi is None else math.radians(self.config.xi)
        prototypes = fit_prototypes(
            fit.features, fit.labels, text, xi=xi, per_class=self.config.per_class, seed=self.config.seed
        )
        made = self._antibodies(prototypes, text)
        margin = self.config.margin
        if margin is None:
            margin = automatic_margin(fit.features[fit.labels >= 0], made.antibodies.embeddings)
        done = immunise(
            Labelled(fit.features, fit.labels),
            Labelled(held.features, held.labels),
            prototypes,
            made.antibodies,
            self.source.class_names,
            logit_scale=self.vlm.logit_scale,
            kappa=self.config.kappa,
            weight=self.config.weight,
            miss=self.config.miss,
            min_images=self.config.min_images,
            vaccine=vaccine_settings(self.config, margin),
            on_step=self.observer.on_step,
        )
        immunity = self._told_of_noise(done.immunity)
        return immunity, self._record(replace(done, immunity=immunity), prototypes, made, margin, text, fit, held)

    def _antibodies(self, prototypes: Prototypes, text: Tensor) -> Made:
        return make_antibodies(
            self.config,
            self.source,
            embedder(self.vlm, self.source.templates),
            prototypes.vectors,
            text,
            unknown=self.unknown,
            client=self.client,
            on_classes=self.observer.on_classes,
        )

    def _from_texts(self, text: Tensor) -> tuple[Immunity, Record]:
        prototypes = text_prototypes(text)
        made = self._antibodies(prototypes, text)
        immunity = text_only(self.source.class_names, text, made.antibodies)
        record = self._common(immunity, prototypes, made, None) | {"measures": {}}
        return immunity, record | {"notes": facts.notes_of(record, self.config)}

    def _told_of_noise(self, immunity: Immunity) -> Immunity:
        """Add thresholds for each noise level that was asked for."""
        other, keep = open_held_out(self.config, self.source), None
        if isinstance(other, float):
            keep = partial(_in_share, self.source, other, self.config.seed)
        source = self.source if isinstance(other, float) else other
        found: dict[float, Tensor] = {}
        for sigma in self.config.sigmas:
            means, labels = noisy_means(
                AdaptedVLM(self.vlm.at_noise(sigma), immunity.adapter),
                source,
                sigma,
                draws=self.config.noise_draws,
                seed=self.config.seed,
                keep=keep,
                on_images=partial(self._encoded, f"noise {sigma:g}"),
            )
            thresholds = thresholds_of(
                means,
                labels,
                immunity.prototypes,
                immunity.antibodies.embeddings,
                immunity.weight,
                miss=self.config.miss,
                min_images=self.config.min_images,
            )
            found[sigma] = torch.tensor(thresholds.values, dtype=torch.float32)
        return replace(immunity, noisy=found)

    def _encoded(self, which: str, done: int) -> None:
        if self.observer.on_images is not None:
            self.observer.on_images(which, done)

    def _unknown(self) -> dict[str, Features]:
        folder = self.folder.features_path
        return {
            without_secrets(spec): encode_unknown(
                self.vlm, source, i, folder, self.observer.on_images, owner=self.manifest
            )
            for i, (spec, source) in enumerate(zip(self.config.ood, self.unknown, strict=True))
        }

    def _common(self, immunity: Immunity, prototypes: Prototypes, made: Made, done: Immunised | None) -> Record:
        embed = embedder(self.vlm, self.source.templates)
        return {
            "format": 1,
            "templates": list(self.source.templates),
            "classes": facts.class_rows(immunity, prototypes, made, done),
            "xi_degrees": math.degrees(prototypes.xi),
            "antibodies": facts.antibody_facts(made, self.config),
            "diagnostics": diagnose(made, prototypes.vectors, embed, self.config.near_names, self.config.seed),
            "weight": immunity.weight,
        }

    def _record(
        self,
        done: Immunised,
        prototypes: Prototypes,
        made: Made,
        margin: float,
        text: Tensor,
        fit: Features,
        held: Features,
    ) -> Record:
        record = self._common(done.immunity, prototypes, made, done)
        record["diagnostics"]["eps_align_degrees"] = facts.alignment_error(done.immunity, held)
        pooled, unknown = done.thresholds.pooled, self._unknown()
        parts = {without_secrets(self.config.data): fit, "the held-out data": held, **unknown}
        record |= {
            "copies": copies(held.features, fit.features),
            "unreadable": {name: part.unreadable for name, part in parts.items() if part.unreadable},
            "images": {"fit": len(fit.ids), "held_out": len(held.ids)},
            "vaccine": facts.vaccine_facts(done, margin, made.antibodies.embeddings, fit),
            "pooled_fit": {**pooled.__dict__, "threshold": pooled.threshold(self.config.miss)},
            "noisy_thresholds": {
                repr(sigma): [float(values.min()), float(values.median()), float(values.max())]
                for sigma, values in done.immunity.noisy.items()
            },
            "measures": measure(done.immunity, text, self.vlm.logit_scale, held, unknown),
        }
        return record | {"notes": facts.notes_of(record, self.config)}


def _in_share(source: DataSource, share: float, seed: int, name: str) -> bool:
    return held_back(source.group(name), share, seed)


def vaccine_settings(config: ImmunizeConfig, margin: float) -> VaccineSettings:
    """Return the settings of the vaccine that a run's settings name."""
    return VaccineSettings(
        hidden=config.hidden,
        steps=config.steps,
        lr=config.lr,
        push_weight=config.push_weight,
        margin=margin,
        decay=config.decay,
        seed=config.seed,
    )


def save_model(folder: Path, immunity: Immunity, record: Record, base: str, vlm: VLM, manifest: Manifest) -> None:
    """Write tensors and record, then the card, without which the folder is no model, and the digests of all."""
    forget_checksums(folder)
    save_tensors(folder, immunity)
    write_text(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_card(folder, Card("immunize", base, vlm.fingerprint, card_settings(immunity), probe_encoder(vlm)))
    write_checksums(folder, manifest)
