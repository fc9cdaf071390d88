"""The work of `robustvlm immunize`: prototypes and antibodies, a vaccine, thresholds, measures, and the model."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from robustvlm.commands.common.inputs import (
    contents_of,
    describe_data,
    named_files_of,
    probe_of,
    remarks_of,
    unknown_specs,
)
from robustvlm.commands.immunize import NOISE_DRAWS, ImmunizeSettings, images
from robustvlm.commands.immunize import record as records
from robustvlm.commands.immunize.extend import ExtendWork, open_extension
from robustvlm.commands.immunize.view import immunize_closing, immunize_report
from robustvlm.core.ranks import resolve_device
from robustvlm.core.seeds import derive_seed
from robustvlm.data import DataSource, Sample, open_data, select, to_pixels
from robustvlm.data.source import UNKNOWN
from robustvlm.data.specs import Unlabelled, open_unlabelled
from robustvlm.data.splits import copies
from robustvlm.defenses import SmoothedVLM, load_pipeline
from robustvlm.defenses import immunity as immune
from robustvlm.defenses.immunity.antibodies import Band, open_source
from robustvlm.defenses.immunity.recipe import KAPPAS, Decided, decided, thresholds_of
from robustvlm.defenses.immunity.thresholds import Thresholds
from robustvlm.defenses.immunity.vaccine import automatic_margin
from robustvlm.defenses.library import require_texts
from robustvlm.defenses.prompts import Features
from robustvlm.defenses.smoothing import smooth
from robustvlm.errors import UserError, nearest, setting
from robustvlm.models import VLM
from robustvlm.models.saved import CARD_NAME
from robustvlm.models.zero_shot import require_distinct
from robustvlm.report import screen
from robustvlm.report.page import write_report_of
from robustvlm.report.training import counted
from robustvlm.runs.run import Facts, FinishedRun, Session
from robustvlm.runs.settings import Observer
from robustvlm.text import without_secrets

# Thresholds for a smoothed model: the score of the mean adapted feature under noise, on held-out images

MOST_IMAGES = 512

COPIES_EACH = 4
"""Noisy copies of each of these images that set the thresholds of copies which vote."""


def noisy_means(
    vlm: VLM,
    source: DataSource,
    sigma: float,
    *,
    draws: int,
    seed: int,
    keep: Collection[str] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean features [N, D] of noisy copies of the labelled images, not normalised, and the labels [N].

    That mean is what certificates of smoothed models are about. Noise is drawn per image from (seed, id, sigma).

    Args:
        vlm: the adapted encoder, not smoothed. draws: noisy copies of an image. keep: which ids to use; `judges`
            chooses them.

    Raises:
        UserError: no image of a known class.
    """
    smoothed = smooth(vlm, sigma, draws)

    def mean(pixels: Tensor) -> Tensor:
        return smoothed.mean_feature(pixels, draws)

    means, labels = _under_noise(
        mean, "noisy thresholds", vlm, source, sigma, seed=seed, keep=keep, on_images=on_images
    )
    return torch.cat(means), torch.tensor(labels)


def noisy_copies(
    vlm: VLM, source: DataSource, sigma: float, *, each: int, seed: int, keep: Collection[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Return features [N * each, D] of single noisy copies of the images of `noisy_means`, and their labels.

    A model whose copies vote judges each of them by thresholds that such copies have set.
    """
    smoothed = smooth(vlm, sigma, each)

    def copies_of(pixels: Tensor) -> Tensor:
        return smoothed.noisy_features(pixels, each)[0]

    rows, labels = _under_noise(copies_of, "thresholds of copies", vlm, source, sigma, seed=seed, keep=keep)
    return torch.cat(rows), torch.tensor(labels).repeat_interleave(each)


def _under_noise(
    encode: Callable[[Tensor], Tensor],
    purpose: str,
    vlm: VLM,
    source: DataSource,
    sigma: float,
    *,
    seed: int,
    keep: Collection[str] | None,
    on_images: Callable[[int], None] | None = None,
) -> tuple[list[Tensor], list[int]]:
    """Return what `encode` makes of each labelled image [1, 3, H, W], with draws of its own, and the labels."""
    rows: list[Tensor] = []
    labels: list[int] = []
    cuda = [vlm.device] if vlm.device.type == "cuda" else []
    for item in source.samples(keep=None if keep is None else keep.__contains__):
        if not isinstance(item, Sample) or item.label == UNKNOWN:
            continue
        pixels = to_pixels(item.image, vlm.framing)[None].to(vlm.device)
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            torch.manual_seed(derive_seed(seed, purpose, repr(sigma), item.id))
            rows.append(encode(pixels).float().cpu())
        labels.append(item.label)
        if on_images is not None:
            on_images(len(labels))
        if keep is not None and len(labels) == len(keep):  # of a stream no more is read
            break
    if not rows:
        raise UserError(f"'{source.spec}' has no image of a known class to set thresholds under noise with")
    return rows, labels


def judges(held: Features) -> frozenset[str]:
    """Return the ids of the held-out images of known classes that set thresholds under noise: at most `MOST_IMAGES`.

    They are chosen by hash: the first ones would be of the first classes alone, where data are sorted by class.
    """
    known = [name for name, label in zip(held.ids, held.labels.tolist(), strict=True) if label >= 0]
    return frozenset(select(known, MOST_IMAGES))


@dataclass(frozen=True, eq=False)
class UnderNoise:
    """An immunity with thresholds under noise, and how many classes have one of their own, by noise level."""

    immunity: immune.Immunity
    own: dict[str, dict[str, int]]


def _tensors(found: Mapping[float, Thresholds]) -> dict[float, Tensor]:
    return {sigma: torch.tensor(made.values, dtype=torch.float32) for sigma, made in found.items()}


# A run of immunisation: encode once, make prototypes and antibodies, vaccinate, set thresholds, measure, save

RESULTS = (records.NAME, CARD_NAME)
read_run, report_of = records.read_run, immunize_report


@dataclass(frozen=True)
class ImmunizeWork:
    """A run's facts, model and images, and the unknown images to measure on."""

    facts: Facts
    settings: ImmunizeSettings
    vlm: VLM
    source: DataSource
    unknown: Sequence[Unlabelled]

    def run(self, session: Session) -> None:
        """Make the model and save it.

        Raises:
            UserError: images, antibodies or settings that nothing can be made of.
        """
        began = time.monotonic()
        made, record = self._make(session)
        record["seconds"] = round(time.monotonic() - began, 3)
        records.save_model(session, made, record, self.settings.model, self.vlm)

    def _make(self, session: Session) -> tuple[immune.Immunity, records.Record]:
        embed = images.embedder(self.vlm, self.source.templates)
        text = embed(self.source.class_names)
        require_distinct(self.vlm, self.source.class_names, self.source.templates, text)
        if self.settings.no_images:
            return self._from_texts(text, session)
        fit, held = images.encode_both(
            self.vlm,
            self.settings,
            self.source,
            session.folder.features_path,
            session.observer,
            owner=session.manifest,
        )
        xi = None if self.settings.xi is None else math.radians(self.settings.xi)
        prototypes = immune.fit_prototypes(
            fit.features, fit.labels, text, xi=xi, per_class=self.settings.prototypes_per_class, seed=self.settings.seed
        )
        made = self._antibodies(prototypes, text, session.observer)
        margin = self.settings.margin
        if margin is None:
            margin = automatic_margin(fit.features[fit.labels >= 0], made.antibodies.embeddings)
        session.observer.begin("Vaccinating", self.settings.steps or None)
        done = immune.immunise(
            immune.Labelled(fit.features, fit.labels),
            immune.Labelled(held.features, held.labels),
            prototypes,
            made.antibodies,
            self.source.class_names,
            logit_scale=self.vlm.logit_scale,
            kappa=self.settings.kappa,
            deciding=records.deciding(self.settings),
            text=text,
            returning=made.returning(self.source.class_names, text, prototypes.vectors),
            vaccine=records.vaccine_settings(self.settings, margin),
            on_step=counted(session.observer),
        )
        noisy = self._told_of_noise(done.immunity, text, held, session.observer)
        done = replace(done, immunity=noisy.immunity)
        unknown = self._unknown(session)
        record = self._record(done, prototypes, made, margin, text, fit, held, unknown)
        if noisy.own:
            record["noisy_own"] = noisy.own
        return done.immunity, record | {"notes": records.notes_of(record, self.settings)}

    def _antibodies(self, prototypes: immune.Prototypes, text: Tensor, observer: Observer) -> images.Made:
        return images.make_antibodies(
            self.settings,
            self.source,
            images.embedder(self.vlm, self.source.templates),
            prototypes.vectors,
            text,
            unknown=dict(zip(unknown_specs(self.settings.ood), self.unknown, strict=True)),
            observer=observer,
        )

    def _from_texts(self, text: Tensor, session: Session) -> tuple[immune.Immunity, records.Record]:
        prototypes = immune.text_prototypes(text)
        made = self._antibodies(prototypes, text, session.observer)
        immunity = immune.text_only(self.source.class_names, text, made.antibodies)
        if self.settings.calibrate is None:
            record = self._common(immunity, prototypes, made, text) | {"measures": records.Measures()}
            return immunity, record | {"notes": records.notes_of(record, self.settings)}
        calibration = images.with_same_classes(self.settings.calibrate, self.source, "calibrate")
        folder, owner = session.folder.features_path, session.manifest
        held = images.encode_calibration(self.vlm, calibration, folder, session.observer, owner=owner)
        done = decided(
            immunity,
            immune.Labelled(held.features, held.labels),
            records.deciding(self.settings),
            text=text,
            returning=made.returning(immunity.class_names, text, prototypes.vectors),
        )
        record = self._common(done.immunity, prototypes, made, text, done)
        record |= {
            "images": {"fit": 0, "held_out": len(held.ids)},
            "unreadable": {"the held-out data": held.unreadable} if held.unreadable else {},
            "pooled_fit": records.pooled_fit(done.thresholds),
            "measures": records.measure(done.immunity, text, self.vlm.logit_scale, held, {}),
        }
        return done.immunity, record | {"notes": records.notes_of(record, self.settings)}

    def _told_of_noise(self, immunity: immune.Immunity, text: Tensor, held: Features, observer: Observer) -> UnderNoise:
        """Add thresholds for each noise level that was asked for, and count the classes that have one of their own."""
        other, deciding = images.open_held_out(self.settings, self.source), records.deciding(self.settings)
        source, chosen = other if isinstance(other, DataSource) else self.source, judges(held)
        # A class has so many images, however many copies of each are scored.
        of_copies = replace(deciding, min_images=deciding.min_images * COPIES_EACH)
        found: dict[float, Thresholds] = {}
        single: dict[float, Thresholds] = {}
        for sigma in self.settings.sigma:
            observer.begin(f"Encoding noise {sigma:g}", len(chosen))
            adapted = immune.AdaptedVLM(self.vlm.at_noise(sigma), immunity.adapter)
            means, labels = noisy_means(
                adapted,
                source,
                sigma,
                draws=NOISE_DRAWS,
                seed=self.settings.seed,
                keep=chosen,
                on_images=counted(observer),
            )
            found[sigma] = thresholds_of(means, labels, immunity, deciding, text=text)
            few = noisy_copies(adapted, source, sigma, each=COPIES_EACH, seed=self.settings.seed, keep=chosen)
            single[sigma] = thresholds_of(*few, immunity, of_copies, text=text)
        return UnderNoise(
            replace(immunity, noisy=_tensors(found), copies=_tensors(single)),
            {
                repr(sigma): {
                    "images": len(chosen), "means": records.own_thresholds(found[sigma]),
                    "copies": records.own_thresholds(single[sigma]),
                }
                for sigma in found
            },
        )  # fmt: skip

    def _unknown(self, session: Session) -> dict[str, Features]:
        folder, owner = session.folder.features_path, session.manifest
        return {
            name: images.encode_unknown(self.vlm, source, name, i, folder, session.observer, owner=owner)
            for i, (name, source) in enumerate(zip(unknown_specs(self.settings.ood), self.unknown, strict=True))
        }

    def _common(
        self,
        immunity: immune.Immunity,
        prototypes: immune.Prototypes,
        made: images.Made,
        text: Tensor,
        done: immune.Immunised | Decided | None = None,
    ) -> records.Record:
        embed, settings, names = images.embedder(self.vlm, self.source.templates), self.settings, immunity.class_names
        return {
            "format": 1,
            "templates": list(self.source.templates),
            "classes": records.class_rows(immunity, prototypes, made, done),
            "xi_degrees": math.degrees(prototypes.xi),
            "antibodies": records.antibody_facts(made, settings),
            "diagnostics": images.diagnose(
                made, prototypes.vectors, text, names, embed, settings.near_names, settings.seed
            ),
            **records.score_facts(immunity, done),
        }

    def _record(
        self,
        done: immune.Immunised,
        prototypes: immune.Prototypes,
        made: images.Made,
        margin: float,
        text: Tensor,
        fit: Features,
        held: Features,
        unknown: Mapping[str, Features],
    ) -> records.Record:
        record = self._common(done.immunity, prototypes, made, text, done)
        record["diagnostics"]["eps_align_degrees"] = records.alignment_error(done.immunity, held)
        parts = {without_secrets(self.settings.data): fit, "the held-out data": held, **unknown}
        record |= {
            "copies": copies(held.features, fit.features),
            "unreadable": {name: part.unreadable for name, part in parts.items() if part.unreadable},
            "images": {"fit": len(fit.ids), "held_out": len(held.ids)},
            "vaccine": records.vaccine_facts(done, margin, made.antibodies.embeddings, fit),
            "pooled_fit": records.pooled_fit(done.thresholds),
            "noisy_thresholds": {
                repr(sigma): [float(values.min()), float(values.median()), float(values.max())]
                for sigma, values in done.immunity.noisy.items()
            },
            "measures": records.measure(done.immunity, text, self.vlm.logit_scale, held, unknown),
        }
        return record


# From settings to a run; every mistake is found before any work begins


def open_work(settings: ImmunizeSettings) -> ImmunizeWork | ExtendWork:
    """Check all settings, open the data and load the model; with a class to add, also the run that it is added to."""
    _check(settings)
    if settings.add_class is not None:
        return open_extension(settings)
    device = resolve_device(settings.device)
    source = open_data(settings.data, classes=settings.classes, templates=settings.templates, tree=settings.tree)
    held = None if settings.no_images else images.open_held_out(settings, source)
    if settings.calibrate is not None:
        held = images.with_same_classes(settings.calibrate, source, "calibrate")
    unknown = [open_unlabelled(spec, source.class_names) for spec in unknown_specs(settings.ood).values()]
    vlm = load_pipeline(settings.model, device=device)
    require_bare(vlm, settings.model)
    require_texts(vlm, "immunising")
    data = describe_data(source)
    others = {f"ood {number}": source for number, source in enumerate(unknown)}
    if isinstance(held, DataSource):
        data |= {"held out": held.fingerprint()}
    data |= contents_of(others | {"held out": held if isinstance(held, DataSource) else None})
    if unknown:
        data |= {"ood": [other.fingerprint() for other in unknown]}
    facts = Facts(
        (settings.model, settings.data),
        settings.stored(device=str(device)),
        {"spec": vlm.spec, "fingerprint": vlm.fingerprint, "logit_scale": vlm.logit_scale},
        data,
        probe=probe_of(vlm, source.class_names, source.templates),
        remarks=remarks_of(source, vlm),
        named_files=named_files_of(source, antibodies=images.antibody_file(settings), near_names=settings.near_names),
    )
    return ImmunizeWork(facts, settings, vlm, source, unknown)


def require_bare(vlm: VLM, spec: str) -> None:
    """Refuse a smoothed model: an adapter behind the averaging is not inside the expectation."""
    if isinstance(vlm, SmoothedVLM):
        raise UserError(
            f"'{spec}' is smoothed: immunise the model below ({setting('sigma', f'{vlm.sigma:g}')} sets thresholds for "
            "the noise), and put +smooth behind the result"
        )


def _check(settings: ImmunizeSettings) -> None:
    """Refuse what makes no sense by itself, and is known only to the libraries behind a run."""
    client = images.client_of(settings)
    if settings.antibodies not in ("noise", "none"):
        open_source(settings.antibodies, client=client)
    if settings.kappa not in KAPPAS:
        raise UserError(f"unknown {setting('kappa')} '{settings.kappa}': {nearest(settings.kappa, KAPPAS)}")
    safe, risk = settings.band
    if safe is not None and risk is not None:
        Band(safe, risk)
    records.vaccine_settings(settings, 0.0 if settings.margin is None else settings.margin)


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished run, by default to `report.html` in its folder, and return its path."""
    return write_report_of(folder, out, lambda run: immunize_report(records.read_run(run)))


def show(run: FinishedRun[records.ImmunizeSummary], console: Console) -> None:
    """Print what was made and measured, and where the model is."""
    screen.show(console, immunize_report(run), immunize_closing(run))
