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

from robustvlm.commands.common.inputs import describe_data, probe_of, remarks_of
from robustvlm.commands.immunize import record as facts
from robustvlm.commands.immunize.config import RECORD, ImmunizeConfig
from robustvlm.commands.immunize.images import (
    Made,
    diagnose,
    embedder,
    encode_both,
    encode_unknown,
    held_back,
    make_antibodies,
    open_held_out,
    source_spec,
)
from robustvlm.commands.immunize.record import measure
from robustvlm.commands.immunize.view import load_immunize_run, write_immunize_report
from robustvlm.core.device import resolve_device
from robustvlm.core.files import write_text
from robustvlm.core.ranks import current_ranks
from robustvlm.core.seeds import derive_seed
from robustvlm.data import DataSource, Sample, open_data, to_pixels
from robustvlm.data.source import UNKNOWN
from robustvlm.data.specs import Unlabelled, open_unlabelled
from robustvlm.data.splits import copies
from robustvlm.defenses import SmoothedVLM, load_pipeline
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
from robustvlm.defenses.immunity.antibodies import Band, open_source
from robustvlm.defenses.immunity.recipe import KAPPAS, thresholds_of
from robustvlm.defenses.immunity.state import card_settings, save_tensors
from robustvlm.defenses.immunity.vaccine import automatic_margin
from robustvlm.defenses.prompts import Features
from robustvlm.defenses.smoothing import smooth
from robustvlm.errors import UserError, nearest
from robustvlm.llm import LlmClient
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import CARD_NAME, Card, write_card
from robustvlm.models.zero_shot import require_distinct
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import Manifest, forget_checksums, make_manifest, write_checksums
from robustvlm.text import without_secrets

# Thresholds for a smoothed model: the score of the mean adapted feature under noise, on held-out images

MOST_IMAGES = 512


def noisy_means(
    vlm: VLM,
    source: DataSource,
    sigma: float,
    *,
    draws: int,
    seed: int,
    keep: Callable[[str], bool] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean features [N, D] of noisy copies of the labelled images, not normalised, and the labels [N].

    That mean is what certificates of smoothed models are about. Noise is drawn per image from (seed, id, sigma).

    Args:
        vlm: the adapted encoder, not smoothed. draws: noisy copies of an image. keep: which ids to use; of these at
            most `MOST_IMAGES`.

    Raises:
        UserError: no image of a known class.
    """
    smoothed = smooth(vlm, sigma, draws)
    means: list[Tensor] = []
    labels: list[int] = []
    cuda = [vlm.device] if vlm.device.type == "cuda" else []
    for item in source.samples(limit=_limit(source, keep), keep=keep):
        if not isinstance(item, Sample) or item.label == UNKNOWN:
            continue
        pixels = to_pixels(item.image, vlm.framing)[None].to(vlm.device)
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            torch.manual_seed(derive_seed(seed, "noisy thresholds", repr(sigma), item.id))
            means.append(smoothed.mean_feature(pixels, draws).float().cpu())
        labels.append(item.label)
        if on_images is not None:
            on_images(len(labels))
        if len(labels) == MOST_IMAGES:
            break
    if not means:
        raise UserError(f"'{source.spec}' has no image of a known class to set thresholds under noise with")
    return torch.cat(means), torch.tensor(labels)


def _limit(source: DataSource, keep: Callable[[str], bool] | None) -> int | None:
    """Choose by hash among many images, where all of them may be used."""
    ids = source.ids() if keep is None else None
    return MOST_IMAGES if ids is not None and len(ids) > MOST_IMAGES else None


# A run of immunisation: encode once, make prototypes and antibodies, vaccinate, set thresholds, measure, save

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


# From the words of a command to an immunize run; every mistake is found before any work begins


def prepare_immunize(
    config: ImmunizeConfig,
    *,
    client: LlmClient | None = None,
    out: Path = Path("runs"),
    name: str | None = None,
    command: str = "",
) -> PreparedImmunize:
    """Check all settings, open the data, load the model and return a run that is ready to start.

    Example:
        >>> import tempfile
        >>> config = ImmunizeConfig(data="emoji?split=train&styles=noto,fxemoji&copies=1", steps=10, min_images=5)
        >>> record = prepare_immunize(config, out=Path(tempfile.mkdtemp())).run()
        >>> len(record["classes"])
        101
    """
    config = config.model_copy(update={"antibodies": source_spec(config.antibodies)})
    check_config(config, client)
    if name is not None:
        RunFolder(out, name)
    place = resolve_device(config.device)
    config = config.model_copy(update={"device": str(place)})
    source = open_data(
        config.data, classes=_path(config.classes), templates=_path(config.templates), tree=_path(config.tree)
    )
    held = open_held_out(config, source) if config.images else None
    unknown = [open_unlabelled(spec, source.class_names) for spec in config.ood]
    vlm = load_pipeline(config.model, device=place)
    require_bare(vlm, config.model)
    model_facts = {"spec": vlm.spec, "fingerprint": vlm.fingerprint, "logit_scale": vlm.logit_scale}
    data_facts = describe_data(source)
    if isinstance(held, DataSource):
        data_facts |= {"held out": held.fingerprint()}
    if unknown:
        data_facts |= {"ood": [other.fingerprint() for other in unknown]}
    identity = config.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("immunize", config.model, config.data, identity))
    manifest = make_manifest(
        kind="immunize",
        name=folder.name,
        command=command,
        config=config,
        model=model_facts,
        data=data_facts,
        probe=probe_of(vlm, source.class_names, source.templates),
    )
    manifest["remarks"] = remarks_of(source, vlm)
    return PreparedImmunize(config, folder, manifest, vlm, source, client, unknown)


def require_bare(vlm: VLM, spec: str) -> None:
    """Refuse a smoothed model: an adapter behind the averaging is not inside the expectation."""
    if isinstance(vlm, SmoothedVLM):
        raise UserError(
            f"'{spec}' is smoothed: immunise the model below (--sigma {vlm.sigma:g} sets thresholds for the noise), "
            "and put +smooth behind the result"
        )


def check_config(config: ImmunizeConfig, client: LlmClient | None) -> None:
    """Refuse settings that make no sense on their own.

    Raises:
        UserError: what is wrong, and what to pass.
    """
    if current_ranks().size > 1:
        raise UserError("`robustvlm immunize` works in one process: start it without torchrun")
    if config.antibodies not in ("noise", "none"):
        open_source(config.antibodies, client=client)
    if config.kappa not in KAPPAS:
        raise UserError(f"unknown --kappa '{config.kappa}': {nearest(config.kappa, KAPPAS)}")
    for option, value in (("--prototypes-per-class", config.per_class), ("--min-images", config.min_images)):
        if value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
    if config.xi is not None and not 0.0 <= config.xi <= 180.0:
        raise UserError(f"--xi is an angle between 0 and 180 degrees, got {config.xi:g}")
    if not 0.0 < config.miss < 0.5:
        raise UserError(f"--miss must lie between 0 and 0.5, got {config.miss:g}: pass for example 0.05")
    if not (config.weight >= 0.0 and math.isfinite(config.weight)):
        raise UserError(f"--lambda-inf must not be negative, got {config.weight:g}")
    for sigma in config.sigmas:
        if not 0.0 < sigma <= 10.0:
            raise UserError(f"--sigma must be above 0 and at most 10, got {sigma:g}: pass 0.25")
    if config.safe is not None and config.risk is not None:
        Band(config.safe, config.risk)
    vaccine_settings(config, config.margin if config.margin is not None else 0.0)
    if not config.images:
        _check_text_only(config)


def _check_text_only(config: ImmunizeConfig) -> None:
    if config.antibodies in ("none", "noise"):
        raise UserError(
            f"without images, antibodies alone tell the unknown, and --antibodies {config.antibodies} has none that "
            "mean anything: pass bank, a file, llm or wordnet"
        )
    if config.sigmas or config.ood or config.shots is not None or config.per_class > 1:
        raise UserError("--sigma, --ood, --shots and --prototypes-per-class need images: leave out --no-images")


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
