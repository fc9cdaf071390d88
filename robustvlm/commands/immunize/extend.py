"""One more class for an immunised model: its prototype, antibodies and threshold, and a short vaccination."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robustvlm.commands.common.inputs import describe_data, named_files_of, probe_of, remarks_of
from robustvlm.commands.immunize import ImmunizeSettings, images
from robustvlm.commands.immunize import record as records
from robustvlm.core.ranks import resolve_device
from robustvlm.data import DataSource, open_data
from robustvlm.data.trees import group_names
from robustvlm.defenses import immunity as immune
from robustvlm.defenses.immunity.antibodies import Band, Proposal, filter_antibodies
from robustvlm.defenses.immunity.saved import ImmunisedModel
from robustvlm.defenses.pipeline import saved_model
from robustvlm.defenses.prompts import Features
from robustvlm.errors import UserError, nearest, setting
from robustvlm.models import VLM
from robustvlm.report.training import counted
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.run import Facts, Session
from robustvlm.runs.settings import Observer
from robustvlm.stats import mcnemar_exact, rate, worth_of
from robustvlm.text import name_key

WARM_STEPS = 100
_ANEW = (
    "model", "data", "held_out", "classes", "shots", "antibodies", "llm", "llm_model", "llm_prices", "add_class", "seed"
)  # fmt: skip
_CLEAR = 0.05


@dataclass(frozen=True)
class Earlier:
    """The run that a class is added to: its model, summary and settings."""

    model: ImmunisedModel
    summary: records.ImmunizeSummary
    settings: ImmunizeSettings
    manifest: Manifest

    def features(self, name: str) -> Features:
        """Return the features that the run has kept of its images."""
        return images.read_features(self.model.folder / "features" / f"{name}.safetensors", self.manifest)

    def prototypes(self) -> immune.Prototypes:
        """Return the prototypes with what the record knows of them."""
        rows = self.summary.classes
        return immune.Prototypes(
            self.model.immunity.prototypes,
            torch.tensor([row["alpha"] for row in rows]),
            torch.tensor([row["kappa"] for row in rows]),
            torch.tensor([row["images"] for row in rows]),
            math.radians(self.summary.xi_degrees),
        )


@dataclass(frozen=True)
class ExtendWork:
    """A class that is ready to be added, in a run of its own; the earlier run stays as it is.

    The settings are those of the earlier run but for what the command says anew. `above` are names of groups that hold
    classes, of either or of the new one: no antibodies.
    """

    facts: Facts
    settings: ImmunizeSettings
    vlm: VLM
    source: DataSource
    earlier: Earlier
    above: tuple[str, ...] = ()

    def run(self, session: Session) -> None:
        """Make the larger model and save it, with what became of the other classes under `added`."""
        began = time.monotonic()
        made, record = self._from_texts(session) if self.settings.no_images else self._from_images(session)
        record["seconds"] = round(time.monotonic() - began, 3)
        base = self.earlier.model.card.base
        assert base is not None  # its base was loaded
        records.save_model(session, made, record, base, self.vlm)

    @property
    def _templates(self) -> list[str]:
        return self.earlier.summary.templates or []

    @property
    def name(self) -> str:
        """The class that is added, as the data spell it."""
        return self.source.class_names[self._label]

    @property
    def _label(self) -> int:
        wanted = name_key(self.settings.add_class or "")
        return [name_key(name) for name in self.source.class_names].index(wanted)

    @property
    def _names(self) -> tuple[str, ...]:
        return (*self.earlier.model.immunity.class_names, self.name)

    def _text(self) -> Tensor:
        return images.embedder(self.vlm, self._templates)(self._names)

    def _from_texts(self, session: Session) -> tuple[immune.Immunity, records.Record]:
        text = self._text()
        prototypes = immune.text_prototypes(text)
        made = self._antibodies(prototypes, session.observer)
        immunity = immune.text_only(self._names, text, made.antibodies)
        record = self._common(immunity, prototypes, made, text)
        return immunity, record | {"measures": records.Measures(), "notes": records.notes_of(record, self.settings)}

    def _from_images(self, session: Session) -> tuple[immune.Immunity, records.Record]:
        text = self._text()
        before = self.earlier.model.immunity
        folder, owner = session.folder.features_path, session.manifest
        new_fit, new_held = (
            self._new(found)
            for found in images.encode_both(
                self.vlm, self.settings, self.source, folder / "new", session.observer, owner=owner
            )
        )
        fit, held = _joined(self.earlier.features("fit"), new_fit), _joined(self.earlier.features("held-out"), new_held)
        images.write_features(folder / "fit.safetensors", fit, owner)
        images.write_features(folder / "held-out.safetensors", held, owner)
        prototypes = self._prototypes(new_fit, text)
        made = self._antibodies(prototypes, session.observer)
        assert self.earlier.summary.vaccine is not None  # it was made from images
        margin = self.earlier.summary.vaccine["margin"]
        session.observer.begin("Vaccinating", self.settings.steps or None)
        done = immune.immunise(
            immune.Labelled(fit.features, fit.labels),
            immune.Labelled(held.features, held.labels),
            prototypes,
            made.antibodies,
            self._names,
            logit_scale=self.vlm.logit_scale,
            kappa=self.settings.kappa,
            deciding=replace(
                records.deciding(self.settings, None if before.floor is None else (before.weight, before.floor)),
                weight=before.weight,
            ),
            text=text,
            vaccine=replace(records.vaccine_settings(self.settings, margin), hidden=before.adapter.inner.out_features),
            start=before.adapter,
            on_step=counted(session.observer),
        )
        record = self._common(done.immunity, prototypes, made, text)
        record["classes"] = records.class_rows(done.immunity, prototypes, made, done)
        record["diagnostics"]["eps_align_degrees"] = records.alignment_error(done.immunity, held)
        record |= {
            "images": {"fit": len(fit.ids), "held_out": len(held.ids)},
            "vaccine": records.vaccine_facts(done, margin, made.antibodies.embeddings, fit),
            "pooled_fit": records.pooled_fit(done.thresholds),
            "measures": records.measure(done.immunity, text, self.vlm.logit_scale, held, {}),
            "added": self._added(before, done.immunity, new_held),
        }
        return done.immunity, record | {"notes": [*records.notes_of(record, self.settings), *self._warnings(record)]}

    def _new(self, found: Features) -> Features:
        """Keep the images of the new class, under its number in the larger model."""
        rows = (found.labels == self._label).nonzero().flatten()
        if not len(rows):
            raise UserError(
                f"'{self.settings.data}' has no image of '{self.name}' to "
                f"learn from and to hold out: pass more images, or {setting('no_images', True)}"
            )
        index = rows.tolist()
        return Features(
            found.features[rows],
            torch.full((len(rows),), len(self._names) - 1),
            tuple(found.ids[i] for i in index),
            tuple(found.groups[i] for i in index),
        )

    def _prototypes(self, new: Features, text: Tensor) -> immune.Prototypes:
        old = self.earlier.prototypes()
        own = immune.fit_prototypes(
            new.features,
            torch.zeros(len(new.ids), dtype=torch.int64),
            text[-1:],
            xi=old.xi,
            per_class=old.vectors.shape[1],
            seed=self.settings.seed,
        )
        return immune.Prototypes(
            torch.cat([old.vectors, own.vectors]),
            torch.cat([old.alpha, own.alpha]),
            torch.cat([old.kappa, own.kappa]),
            torch.cat([old.counts, own.counts]),
            old.xi,
        )

    def _antibodies(self, prototypes: immune.Prototypes, observer: Observer) -> images.Made:
        """Keep the antibodies that do not mean the new class, and add those that guard it."""
        old, found = self.earlier.model.immunity.antibodies, self.earlier.summary.antibodies["band"]
        if found is None:
            return images.Made(old, (), None)
        proposal = self._proposal(observer)
        both = Proposal((*old.texts, *proposal.texts), proposal.kin)
        band = Band(found["safe"], found["risk"])
        embed = images.embedder(self.vlm, self._templates)
        filtered = filter_antibodies(both, embed, prototypes.vectors, self._names, band=band, above=self.above)
        return images.Made(filtered.kept, filtered.dropped, band)

    def _proposal(self, observer: Observer) -> Proposal:
        """Return texts for the new class, and other names of all classes, which no text may be.

        A language model is asked for the new class alone: it was paid for the others.
        """
        if self.settings.antibodies in ("none", "noise"):
            return Proposal(())
        names = (self.name,) if self.settings.antibodies == "llm" else self._names
        found = images.propose(self.settings, names, observer)
        own = tuple(text for text in found.texts if text.of_class == self.name)
        if not own:  # asked for this class alone, a source that knows nothing of it says so
            own = images.propose(self.settings, (self.name,), observer).texts
        return replace(found, texts=own)

    def _common(
        self, immunity: immune.Immunity, prototypes: immune.Prototypes, made: images.Made, text: Tensor
    ) -> records.Record:
        embed = images.embedder(self.vlm, self._templates)
        return {
            "format": 1,
            "templates": self._templates,
            "classes": records.class_rows(immunity, prototypes, made, None),
            "xi_degrees": math.degrees(prototypes.xi),
            "antibodies": records.antibody_facts(made, self.settings),
            "diagnostics": images.diagnose(
                made, prototypes.vectors, text, self._names, embed, None, self.settings.seed
            ),
            **records.score_facts(immunity, None),
        }

    def _added(self, before: immune.Immunity, after: immune.Immunity, new: Features) -> records.Added:
        """Return what the new class costs the others, on the same held-out images, and how well it is known itself."""
        held = self.earlier.features("held-out")
        known = held.labels >= 0
        labels = held.labels[known]
        old_class, old_score = records.judged(before, held.features[known])
        new_class, new_score = records.judged(after, held.features[known])
        was, now = old_class == labels, new_class == labels
        own_class, own_score = records.judged(after, new.features)
        own = own_class == len(after.class_names) - 1
        worth = worth_of(new.groups)
        groups = [group for group, kept in zip(held.groups, known.tolist(), strict=True) if kept]
        others = mcnemar_exact(was.tolist(), now.tolist(), groups=groups)
        return records.Added(
            name=self.name,
            to=str(self.earlier.model.folder),
            others=records.Others(**others.model_dump(), total=len(labels)),
            others_accepted=mcnemar_exact(
                (was & (old_score > 0)).tolist(), (now & (new_score > 0)).tolist(), groups=groups
            ),
            accuracy=rate(int(own.sum()), len(own), independent=worth),
            accepted=rate(int((own & (own_score > 0)).sum()), len(own), independent=worth),
        )

    def _warnings(self, record: records.Record) -> list[str]:
        found = []
        others = record["added"].others
        if others.p_value < _CLEAR and others.only_first > others.only_second:
            found.append(
                f"The other classes lose accuracy to '{self.name}': {others.only_first - others.only_second} of "
                f"{others.total} held-out images, more than chance explains."
            )
        if self.earlier.model.immunity.noisy:
            found.append("Thresholds behind noise belong to the earlier adapter and are not carried over.")
        return found


def open_extension(given: ImmunizeSettings) -> ExtendWork:
    """Check everything, load the earlier run and open the data of the class that is added to it.

    Of the settings, data, held-out data, the source of antibodies, seed and device are the command's; all others are
    those of the run that the class is added to.

    Raises:
        UserError: the model is no immunised run, the class is known already, or the data do not have it.
    """
    earlier, device = _earlier(given.model), resolve_device(given.device)
    if given.name is not None and (given.out / given.name).resolve() == earlier.model.folder.resolve():
        raise UserError(
            f"'{given.out / given.name}' is the run that the class is added to: choose another {setting('name')}"
        )
    if earlier.settings.calibrate is not None:
        raise UserError(
            f"'{given.model}' was made from texts, and images of its classes set its thresholds: make it again, with "
            f"the class among those of {setting('data')} and {setting('calibrate')}"
        )
    why = f"is not for {setting('add_class')}: it is that of the run {given.model}"
    given.require_only((*_ANEW, "steps", "device"), why, stands=earlier.settings)
    anew = {name: getattr(given, name) for name in _ANEW}
    config = earlier.manifest["config"]
    settings = ImmunizeSettings.of(
        config,
        **anew,
        steps=min(given.steps, earlier.settings.steps, WARM_STEPS),
        sigma=[],
        ood=[],
        near_names=None,
        device=str(device),
    )
    source, name = open_data(settings.data, classes=settings.classes), given.add_class or ""
    _check_class(name, source, earlier.model.immunity.class_names)
    if not settings.no_images:
        images.open_held_out(settings, source)
    vlm = earlier.model.base(device)
    facts = Facts(
        (given.model, name),
        settings.stored(noise_draws=config["noise_draws"]),
        {"spec": given.model, "fingerprint": vlm.fingerprint, "classes": len(earlier.summary.classes)},
        describe_data(source),
        probe=probe_of(vlm, source.class_names, source.templates),
        remarks=[*remarks_of(source, vlm), *_lost(earlier)],
        named_files=named_files_of(source, antibodies=images.antibody_file(settings), near_names=settings.near_names),
    )
    return ExtendWork(facts, settings, vlm, source, earlier, _above(earlier, source))


def _above(earlier: Earlier, source: DataSource) -> tuple[str, ...]:
    """Return the superclasses of the new data's trees and of the tree file of the earlier run, if it is still there.

    Classes that were added since are missing from that file.
    """
    found, tree = images.superclasses(source), earlier.settings.tree
    if tree is not None and Path(tree).exists():
        known = set(map(name_key, earlier.model.immunity.class_names))
        found = (*found, *(name for name in group_names(tree) if name_key(name) not in known))
    return tuple(dict.fromkeys(found))


def _lost(earlier: Earlier) -> list[str]:
    """Say that the earlier run's tree file is gone, so that names of its groups may become antibodies."""
    tree = earlier.settings.tree
    if tree is None or Path(tree).exists():
        return []
    return [f"the tree file of the earlier run, {tree}, is gone: names of its groups are not kept from antibodies"]


def _earlier(spec: str) -> Earlier:
    model = saved_model(spec)
    if not isinstance(model, ImmunisedModel):
        raise UserError(f"{setting('add_class')} takes the folder of a run of `robustvlm immunize`, '{spec}' is none")
    run = records.read_run(model.folder)
    if not run.summary.templates:
        raise UserError(f"the record of '{spec}' lacks its prompts: make that run again")
    return Earlier(model, run.summary, ImmunizeSettings.of(run.manifest["config"]), run.manifest)


def _check_class(name: str, source: DataSource, known: tuple[str, ...]) -> None:
    if name_key(name) in map(name_key, known):
        raise UserError(f"the model knows '{name}' already: {setting('add_class')} takes one that it does not have")
    if name_key(name) not in map(name_key, source.class_names):
        raise UserError(f"'{source.spec}' has no class '{name}': {nearest(name, source.class_names)}")


def _joined(old: Features, new: Features) -> Features:
    return Features(
        torch.cat([old.features, new.features]),
        torch.cat([old.labels, new.labels]),
        (*old.ids, *new.ids),
        (*old.groups, *new.groups),
    )
