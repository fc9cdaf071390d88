"""One more class for an immunised model: its prototype, antibodies and threshold, and a short vaccination."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
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
    open_held_out,
    read_features,
    source_spec,
    write_features,
)
from robustvlm.commands.immunize.record import judged, measure
from robustvlm.commands.immunize.run import ImmunizeObserver, check_config, save_model, vaccine_settings
from robustvlm.commands.immunize.view import load_immunize_run, write_immunize_report
from robustvlm.core.device import resolve_device
from robustvlm.data import DataSource, open_data
from robustvlm.defenses.immunity import (
    Immunity,
    Labelled,
    Prototypes,
    fit_prototypes,
    immunise,
    text_only,
    text_prototypes,
)
from robustvlm.defenses.immunity.antibodies import Band, Proposal, filter_antibodies, open_source
from robustvlm.defenses.immunity.classifier import ImmunisedModel
from robustvlm.defenses.pipeline import saved_model
from robustvlm.defenses.prompts import Features
from robustvlm.errors import UserError, nearest
from robustvlm.llm import LlmClient
from robustvlm.models import VLM
from robustvlm.models.saved import CARD_NAME
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import Manifest, make_manifest
from robustvlm.stats import mcnemar_exact, rate
from robustvlm.text import name_key

WARM_STEPS = 100
_CLEAR = 0.05
Record = dict[str, Any]


@dataclass(frozen=True)
class Earlier:
    """The run that a class is added to: its model, record and settings."""

    model: ImmunisedModel
    record: Record
    config: ImmunizeConfig
    manifest: Manifest

    def features(self, name: str) -> Features:
        """Return the features that the run has kept of its images."""
        return read_features(self.model.folder / "features" / f"{name}.safetensors", self.manifest)

    def prototypes(self) -> Prototypes:
        """Return the prototypes with what the record knows of them."""
        rows = self.record["classes"]
        return Prototypes(
            self.model.immunity.prototypes,
            torch.tensor([row["alpha"] for row in rows]),
            torch.tensor([row["kappa"] for row in rows]),
            torch.tensor([row["images"] for row in rows]),
            math.radians(self.record["xi_degrees"]),
        )


@dataclass(frozen=True)
class PreparedExtension:
    """A class that is ready to be added, in a run of its own; the earlier run stays as it is."""

    config: ImmunizeConfig
    folder: RunFolder
    manifest: Manifest
    vlm: VLM
    source: DataSource
    earlier: Earlier
    client: LlmClient | None = None
    observer: ImmunizeObserver = field(default_factory=ImmunizeObserver)

    def run(self, observer: ImmunizeObserver | None = None, *, fresh: bool = False) -> Record:
        """Make the larger model and return its record, with what became of the other classes under `added`."""
        with self.folder.opened(self.manifest, fresh=fresh) as manifest:
            work = replace(self, observer=observer or self.observer, manifest=manifest)
            path = self.folder.path / RECORD
            if path.exists() and (self.folder.path / CARD_NAME).exists() and self.folder.sealed:
                found: Record = load_immunize_run(self.folder.path).record
            else:
                began = time.monotonic()
                made, found = work._from_images() if self.config.images else work._from_texts()
                found["seconds"] = round(time.monotonic() - began, 3)
                base = self.earlier.model.card.base
                assert base is not None  # its base was loaded
                save_model(self.folder.path, made, found, base, self.vlm, manifest)
            if not self.folder.report_path.exists():
                write_immunize_report(self.folder.path)
            return found

    @property
    def name(self) -> str:
        """The class that is added, as the data spell it."""
        return self.source.class_names[self._label]

    @property
    def _label(self) -> int:
        wanted = name_key(self.config.add_class or "")
        return [name_key(name) for name in self.source.class_names].index(wanted)

    @property
    def _names(self) -> tuple[str, ...]:
        return (*self.earlier.model.immunity.class_names, self.name)

    def _text(self) -> Tensor:
        return embedder(self.vlm, self.earlier.record["templates"])(self._names)

    def _from_texts(self) -> tuple[Immunity, Record]:
        text = self._text()
        prototypes = text_prototypes(text)
        made = self._antibodies(prototypes)
        immunity = text_only(self._names, text, made.antibodies)
        record = self._common(immunity, prototypes, made)
        return immunity, record | {"measures": {}, "notes": facts.notes_of(record, self.config)}

    def _from_images(self) -> tuple[Immunity, Record]:
        text = self._text()
        before = self.earlier.model.immunity
        folder = self.folder.features_path
        new_fit, new_held = (
            self._new(found)
            for found in encode_both(
                self.vlm, self.config, self.source, folder / "new", self.observer.on_images, owner=self.manifest
            )
        )
        fit, held = _joined(self.earlier.features("fit"), new_fit), _joined(self.earlier.features("held-out"), new_held)
        write_features(folder / "fit.safetensors", fit, self.manifest)
        write_features(folder / "held-out.safetensors", held, self.manifest)
        prototypes = self._prototypes(new_fit, text)
        made = self._antibodies(prototypes)
        margin = self.earlier.record["vaccine"]["margin"]
        done = immunise(
            Labelled(fit.features, fit.labels),
            Labelled(held.features, held.labels),
            prototypes,
            made.antibodies,
            self._names,
            logit_scale=self.vlm.logit_scale,
            kappa=self.config.kappa,
            weight=before.weight,
            miss=self.config.miss,
            min_images=self.config.min_images,
            vaccine=replace(vaccine_settings(self.config, margin), hidden=before.adapter.inner.out_features),
            start=before.adapter,
            on_step=self.observer.on_step,
        )
        record = self._common(done.immunity, prototypes, made)
        record["classes"] = facts.class_rows(done.immunity, prototypes, made, done)
        record["diagnostics"]["eps_align_degrees"] = facts.alignment_error(done.immunity, held)
        pooled = done.thresholds.pooled
        record |= {
            "images": {"fit": len(fit.ids), "held_out": len(held.ids)},
            "vaccine": facts.vaccine_facts(done, margin, made.antibodies.embeddings, fit),
            "pooled_fit": {**pooled.__dict__, "threshold": pooled.threshold(self.config.miss)},
            "measures": measure(done.immunity, text, self.vlm.logit_scale, held, {}),
            "added": self._added(before, done.immunity, new_held),
        }
        return done.immunity, record | {"notes": [*facts.notes_of(record, self.config), *self._warnings(record)]}

    def _new(self, found: Features) -> Features:
        """Keep the images of the new class, under its number in the larger model."""
        rows = (found.labels == self._label).nonzero().flatten()
        if not len(rows):
            raise UserError(
                f"'{self.config.data}' has no image of '{self.name}' to "
                "learn from and to hold out: pass more images, or --no-images"
            )
        index = rows.tolist()
        return Features(
            found.features[rows],
            torch.full((len(rows),), len(self._names) - 1),
            tuple(found.ids[i] for i in index),
            tuple(found.groups[i] for i in index),
        )

    def _prototypes(self, new: Features, text: Tensor) -> Prototypes:
        old = self.earlier.prototypes()
        own = fit_prototypes(
            new.features,
            torch.zeros(len(new.ids), dtype=torch.int64),
            text[-1:],
            xi=old.xi,
            per_class=old.vectors.shape[1],
            seed=self.config.seed,
        )
        return Prototypes(
            torch.cat([old.vectors, own.vectors]),
            torch.cat([old.alpha, own.alpha]),
            torch.cat([old.kappa, own.kappa]),
            torch.cat([old.counts, own.counts]),
            old.xi,
        )

    def _antibodies(self, prototypes: Prototypes) -> Made:
        """Keep the antibodies that do not mean the new class, and add those that guard it."""
        old, found = self.earlier.model.immunity.antibodies, self.earlier.record["antibodies"]["band"]
        if found is None:
            return Made(old, (), None)
        proposal = Proposal(())
        if self.config.antibodies not in ("none", "noise"):
            proposal = open_source(
                self.config.antibodies, client=self.client, on_classes=self.observer.on_classes
            ).propose([self.name])
        both = Proposal((*old.texts, *proposal.texts), proposal.kin)
        band = Band(found["safe"], found["risk"])
        embed = embedder(self.vlm, self.earlier.record["templates"])
        filtered = filter_antibodies(both, embed, prototypes.vectors, self._names, band=band)
        return Made(filtered.kept, filtered.dropped, band)

    def _common(self, immunity: Immunity, prototypes: Prototypes, made: Made) -> Record:
        embed = embedder(self.vlm, self.earlier.record["templates"])
        return {
            "format": 1,
            "templates": self.earlier.record["templates"],
            "classes": facts.class_rows(immunity, prototypes, made, None),
            "xi_degrees": math.degrees(prototypes.xi),
            "antibodies": facts.antibody_facts(made, self.config),
            "diagnostics": diagnose(made, prototypes.vectors, embed, None, self.config.seed),
            "weight": immunity.weight,
        }

    def _added(self, before: Immunity, after: Immunity, new: Features) -> Record:
        """Return what the new class costs the others, on the same held-out images, and how well it is known itself."""
        held = self.earlier.features("held-out")
        known = held.labels >= 0
        labels = held.labels[known]
        old_class, old_score = judged(before, held.features[known])
        new_class, new_score = judged(after, held.features[known])
        was, now = old_class == labels, new_class == labels
        own_class, own_score = judged(after, new.features)
        own = own_class == len(after.class_names) - 1
        return {
            "name": self.name,
            "to": str(self.earlier.model.folder),
            "others": mcnemar_exact(was.tolist(), now.tolist()).model_dump() | {"total": len(labels)},
            "others_accepted": mcnemar_exact(
                (was & (old_score > 0)).tolist(), (now & (new_score > 0)).tolist()
            ).model_dump(),
            "accuracy": rate(int(own.sum()), len(own)).model_dump(),
            "accepted": rate(int((own & (own_score > 0)).sum()), len(own)).model_dump(),
        }

    def _warnings(self, record: Record) -> list[str]:
        found = []
        others = record["added"]["others"]
        if others["p_value"] < _CLEAR and others["only_first"] > others["only_second"]:
            found.append(
                f"The other classes lose accuracy to '{self.name}': {others['only_first'] - others['only_second']} of "
                f"{others['total']} held-out images, more than chance explains."
            )
        if self.earlier.model.immunity.noisy:
            found.append("Thresholds behind noise belong to the earlier adapter and are not carried over.")
        return found


def prepare_extension(
    config: ImmunizeConfig,
    *,
    client: LlmClient | None = None,
    out: Path = Path("runs"),
    name: str | None = None,
    command: str = "",
) -> PreparedExtension:
    """Check everything and return an extension that is ready to start.

    Of the settings, data, held-out data, the source of antibodies, seed and device are the command's; all others are
    those of the run that the class is added to.

    Raises:
        UserError: MODEL is no immunised run, the class is known already, or the data do not have it.
    """
    if name is not None:
        RunFolder(out, name)
    earlier = _earlier(config.model)
    settings = earlier.config.model_copy(
        update={
            "model": config.model,
            "data": config.data,
            "held_out": config.held_out,
            "classes": config.classes,
            "shots": config.shots,
            "antibodies": source_spec(config.antibodies),
            "llm": config.llm,
            "steps": min(config.steps, WARM_STEPS),
            "add_class": config.add_class,
            "sigmas": [],
            "ood": [],
            "near_names": None,
            "seed": config.seed,
            "device": str(resolve_device(config.device)),
        }
    )
    check_config(settings, client)
    source = open_data(settings.data, classes=None if settings.classes is None else Path(settings.classes))
    _check_class(settings.add_class or "", source, earlier.model.immunity.class_names)
    if settings.images:
        open_held_out(settings, source)
    vlm = earlier.model.base(resolve_device(config.device))
    model_facts = {"spec": config.model, "fingerprint": vlm.fingerprint, "classes": len(earlier.record["classes"])}
    data_facts = describe_data(source)
    identity = settings.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("immunize", config.model, config.add_class or "", identity))
    if folder.path.resolve() == earlier.model.folder.resolve():
        raise UserError(f"'{folder.path}' is the run that the class is added to: choose another --name")
    manifest = make_manifest(
        kind="immunize",
        name=folder.name,
        command=command,
        config=settings,
        model=model_facts,
        data=data_facts,
        probe=probe_of(vlm, source.class_names, source.templates),
    )
    manifest["remarks"] = remarks_of(source, vlm)
    return PreparedExtension(settings, folder, manifest, vlm, source, earlier, client)


def _earlier(spec: str) -> Earlier:
    model = saved_model(spec)
    if not isinstance(model, ImmunisedModel):
        raise UserError(f"--add-class takes the folder of a run of `robustvlm immunize`, '{spec}' is none")
    run = load_immunize_run(model.folder)
    if "templates" not in run.record:
        raise UserError(f"the record of '{spec}' lacks its prompts: make that run again")
    return Earlier(model, run.record, ImmunizeConfig.model_validate(run.manifest["config"]), run.manifest)


def _check_class(name: str, source: DataSource, known: tuple[str, ...]) -> None:
    if name_key(name) in map(name_key, known):
        raise UserError(f"the model knows '{name}' already: --add-class takes a class that it does not have")
    if name_key(name) not in map(name_key, source.class_names):
        raise UserError(f"'{source.spec}' has no class '{name}': {nearest(name, source.class_names)}")


def _joined(old: Features, new: Features) -> Features:
    return Features(
        torch.cat([old.features, new.features]),
        torch.cat([old.labels, new.labels]),
        (*old.ids, *new.ids),
        (*old.groups, *new.groups),
    )
