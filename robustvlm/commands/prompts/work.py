"""The work of `robustvlm tune-prompts`: encode a few images a class once, learn a context, measure what it changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer
from rich.console import Console
from torch import Tensor, nn

from robustvlm.commands.common.inputs import contents_of, describe_data, probe_of, remarks_of, unknown_specs
from robustvlm.commands.common.lessons import remarks_on
from robustvlm.commands.prompts import PromptSettings
from robustvlm.core.files import write_text
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.ranks import resolve_device
from robustvlm.data import UNKNOWN, DataSource, open_data
from robustvlm.data.names import same_things, some_of
from robustvlm.data.specs import Unlabelled, open_unlabelled
from robustvlm.data.splits import copies, seen_images
from robustvlm.defenses import load_pipeline, prompts
from robustvlm.defenses.lapt import NegativePrompts, Negatives, farthest_words, mixing
from robustvlm.defenses.prompts import Features, PromptLearner, TuneSettings
from robustvlm.detect import Head, Supplies, auroc_interval, energy_change, find_score
from robustvlm.detect.words import words_outside
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import CARD_NAME, Card, write_card
from robustvlm.models.zero_shot import class_embeddings, require_distinct
from robustvlm.report import screen
from robustvlm.report.sections import Block, Checks, Closing, Code, Column, Line, Measure, Name, Row, Table, Text
from robustvlm.report.training import counted
from robustvlm.report.words import finding
from robustvlm.runs.run import Facts, FinishedRun, Session, read_finished
from robustvlm.runs.settings import Observer
from robustvlm.stats import Rate, rate, worth_of
from robustvlm.text import without_secrets

NAME = "prompts.json"
RESULTS = (NAME, CARD_NAME)


class _Record(BaseModel):
    """Part of a JSON record, in which what is None is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class PromptMeasures(_Record):
    """Accuracy, and the AUROC for each set of unknown images as (value, low, high).

    It is that of the energy change, and of LAPT's own score where prompts of words were learnt.
    """

    accuracy: Rate
    auroc: dict[str, list[float]] | None = None


class PromptRecord(_Record):
    """What `prompts.json` holds: images learnt from, mean losses of every epoch, and measures if there were images."""

    format: int = 1
    images: int
    history: list[dict[str, float]]
    zero_shot: PromptMeasures | None = None
    tuned: PromptMeasures | None = None
    notes: list[str] | None = None


@dataclass(frozen=True, eq=False)
class Beside:
    """What LAPT learns beside the context of the classes.

    Args:
        negatives: the words outside the classes. fixed: unit embeddings [K + M, D] of classes and words with
            hand-written prompts. learner: of both contexts.
    """

    negatives: Negatives
    fixed: Tensor
    learner: NegativePrompts


@dataclass(frozen=True)
class PromptWork:
    """A run's facts, model, images and the context that is to be learnt."""

    facts: Facts
    settings: PromptSettings
    tuning: TuneSettings
    vlm: VLM
    source: DataSource
    learner: PromptLearner
    words: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def run(self, session: Session) -> None:
        """Tune the prompts and save them.

        Raises:
            UserError: classes that the text tower takes for one, no image to learn from, or a loss that is not finite.
        """
        self._require_distinct()
        shots, beside = self._shots(session.observer), self._beside(session.observer)
        learner: nn.Module = self.learner if beside is None else beside.learner
        history = self._tuned(learner, beside, shots, session.observer)
        with torch.no_grad():
            tuned = learner().cpu()
        if not tuned.isfinite().all():
            smaller = setting("lr")
            raise UserError(f"the tuned prompts are not finite: pass a smaller {smaller} than {self.settings.lr:g}")
        measured = self._measured(tuned, beside, shots, session.observer)
        record = PromptRecord(images=len(shots.ids), history=history, **measured)
        with session.results() as folder:
            self._save(folder, tuned, beside, record)

    def _require_distinct(self) -> None:
        """Refuse classes with one embedding behind the context as it begins, as with hand-written prompts."""
        context = " ".join(["x"] * self.settings.context)
        with torch.no_grad():
            require_distinct(self.vlm, self.source.class_names, [f"{context} {{}}."], self.learner())

    def _beside(self, observer: Observer) -> Beside | None:
        """Return the words outside the classes that LAPT learns a context for; None without it."""
        if not self.settings.lapt:
            return None
        observer.begin(f"Embedding {len(self.words):,} words")
        plain = class_embeddings(self.vlm, self.source.class_names, self.source.templates).cpu()
        found = farthest_words(self.vlm, self.words, self.source.templates, plain)
        start = self.settings.start
        second = PromptLearner(
            self.vlm, found.words, length=self.settings.context, start=start, seed=self.settings.seed
        )
        return Beside(found, torch.cat([plain, found.embeddings]), NegativePrompts(self.learner, second))

    def _shots(self, observer: Observer) -> Features:
        """Return the features of the few images to learn from."""
        chosen = frozenset(prompts.choose_shots(self.source, self.settings.shots or None, self.settings.seed))
        observer.begin("Encoding", len(chosen))
        keep, seed = chosen.__contains__, self.settings.seed
        return prompts.encode_source(self.vlm, self.source, keep=keep, seed=seed, on_images=counted(observer))

    def _tuned(
        self, learner: nn.Module, beside: Beside | None, shots: Features, observer: Observer
    ) -> list[dict[str, float]]:
        """Learn the context; return the mean losses of every epoch."""
        observer.begin("Tuning", self.settings.epochs)
        scale, seed = self.vlm.logit_scale, self.settings.seed
        terms = None if beside is None else mixing(beside.learner, beside.fixed, scale=scale, seed=seed)
        return prompts.tune(
            learner,
            shots.features,
            shots.labels,
            scale=scale,
            settings=self.tuning,
            on_epoch=lambda _, terms: observer.advance(loss=f"{terms['loss']:.3f}"),
            terms_of=terms,
        )

    def _measured(self, tuned: Tensor, beside: Beside | None, shots: Features, observer: Observer) -> dict[str, Any]:
        """Return accuracy and detection with the tuned and with the hand-written prompts, on `val` and `ood`."""
        if self.settings.val is None:
            return {}
        val = _matching(self.settings.val, self.source, self.settings.classes)
        known = self._encoded(val, "val", observer)
        known, notes = without_taught(known, val, shots, self.source)
        if not known.ids:
            raise UserError(
                f"every image of {setting('val')} '{without_secrets(self.settings.val)}', or a copy of it, taught the "
                "prompts: "
                f"pass others, or fewer {setting('shots')}"
            )
        twins = copies(known.features, shots.features)
        if twins:
            notes.append(f"{twins} images of --val look to the model like images that taught the prompts")
        unknown: dict[str, Features] = {}
        for name, spec in unknown_specs(self.settings.ood).items():
            found = self._encoded(open_unlabelled(spec, self.source.class_names), name, observer)
            unknown[name] = found.rows((found.labels < 0).nonzero().flatten())
            left_out = len(found.ids) - len(unknown[name].ids)
            if not unknown[name].ids:
                raise UserError(f"every image of '{name}' is of a known class: pass others to {setting('ood')}")
            if left_out:
                notes.append(f"{left_out} images of '{name}' are of known classes and were left out")
        parts = {without_secrets(self.settings.data): shots, without_secrets(self.settings.val): known, **unknown}
        if self.left_out:
            named = some_of(self.left_out)
            notes.append(f"{len(self.left_out)} words that name what the unknown sets show were left out: {named}")
        notes += [f"{p.unreadable} images of '{n}' could not be read" for n, p in parts.items() if p.unreadable]
        plain = (
            class_embeddings(self.vlm, self.source.class_names, self.source.templates).cpu()
            if beside is None
            else beside.fixed
        )
        measures = {n: self._measures(known, unknown, texts) for n, texts in (("zero_shot", plain), ("tuned", tuned))}
        return {**measures, "notes": notes}

    def _encoded(self, source: DataSource, name: str, observer: Observer) -> Features:
        ids = source.ids()
        observer.begin(f"Encoding {name}", None if ids is None else len(ids))
        return prompts.encode_source(self.vlm, source, seed=self.settings.seed, on_images=counted(observer))

    def _measures(self, known: Features, unknown: dict[str, Features], texts: Tensor) -> PromptMeasures:
        labelled = known.labels != UNKNOWN
        classes = texts[: len(self.source.class_names)]
        hits = (known.features @ classes.T).argmax(dim=1)[labelled] == known.labels[labelled]
        scores = self._scores(known, texts)[labelled.numpy()]
        groups = [group for group, wanted in zip(known.groups, labelled.tolist(), strict=True) if wanted]
        found: dict[str, list[float]] = {}
        for spec, other in unknown.items():
            against = self._scores(other, texts)
            interval = auroc_interval(scores, against, known_groups=groups, unknown_groups=other.groups)
            found[spec] = [interval.value, interval.low, interval.high]
        return PromptMeasures(
            accuracy=rate(int(hits.sum()), len(hits), independent=worth_of(groups)), auroc=found or None
        )

    def _scores(self, images: Features, texts: Tensor) -> Any:
        scale, count = self.vlm.logit_scale, len(self.source.class_names)
        if len(texts) > count:
            share = find_score("lapt").made(Supplies(Head(texts[:count], scale), negatives=texts[count:]))
            return share.score(images.features).double().numpy()
        return energy_change(scale * images.features @ texts.T, self.settings.c).double().numpy()

    def _save(self, folder: Path, tuned: Tensor, beside: Beside | None, record: PromptRecord) -> None:
        """Write the prompts, then the record, and the card last: a folder with a card is whole."""
        names = list(self.source.class_names)
        settings = {"class_names": names, "n_reset": self.settings.c, "prompts": prompts.PROMPTS}
        more: dict[str, Tensor] = {}
        if beside is not None:
            settings["negative_words"] = list(beside.negatives.words)
            more = {
                "negative_context": beside.learner.negatives.context,
                "negative_embeddings": tuned[len(names) :],
            }
        prompts.save_prompts(folder, self.learner.context, tuned[: len(names)], **more)
        write_text(folder / NAME, record.model_dump_json(indent=1) + "\n")
        probe = probe_encoder(self.vlm)
        write_card(folder, Card("tune-prompts", self.settings.model, self.vlm.fingerprint, settings, probe))


def open_work(settings: PromptSettings) -> PromptWork:
    """Check all settings, open the data and load the model."""
    tuning = TuneSettings(settings.epochs, settings.batch_size, settings.lr, settings.energy_weight, settings.seed)
    device = resolve_device(settings.device)
    source = open_data(settings.data, classes=settings.classes)
    val = None if settings.val is None else _matching(settings.val, source, settings.classes)
    unknown = [open_unlabelled(spec, source.class_names) for spec in unknown_specs(settings.ood).values()]
    words, left_out = _words(settings, source, unknown) if settings.lapt else ((), ())
    vlm = load_pipeline(settings.model, device=device)
    learner = PromptLearner(vlm, source.class_names, length=settings.context, start=settings.start, seed=settings.seed)
    data = describe_data(source)
    if val is not None:
        data |= {"val": describe_data(val)}
    if unknown:
        data |= {"ood": [other.fingerprint() for other in unknown]}
    data |= contents_of({f"ood {number}": source for number, source in enumerate(unknown)})
    facts = Facts(
        (settings.model, settings.data),
        settings.stored(device=str(device), **({"words": fingerprint({}, words)} if settings.lapt else {})),
        {"spec": vlm.spec, "fingerprint": vlm.fingerprint, "logit_scale": vlm.logit_scale},
        data,
        probe=probe_of(vlm, source.class_names, source.templates),
        remarks=[*remarks_of(source, vlm), *remarks_on(settings.model, val)],
    )
    return PromptWork(facts, settings, tuning, vlm, source, learner, words, left_out)


def _words(
    settings: PromptSettings, source: DataSource, unknown: Sequence[Unlabelled]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words outside the classes, and those left out: names of unknown things would tell what is measured."""
    words = words_outside(source.class_names, source.tree, settings.words)
    naming = {word for other in unknown for word in same_things(words, other.things())}
    found, left_out = (tuple(word for word in words if (word in naming) == named) for named in (False, True))
    if not found:
        raise UserError(f"no word is left outside the classes: pass others with {setting('words', 'FILE')}")
    return found, left_out


def without_taught(known: Features, val: DataSource, shots: Features, source: DataSource) -> tuple[Features, list[str]]:
    """Return the validation images that neither taught the prompts nor are copies of such, and what was left out."""
    seen = set(seen_images(val, known.ids, source, shots.ids))
    taught, other = len(seen & set(shots.ids)), len(seen - set(shots.ids))
    left = torch.tensor([row for row, name in enumerate(known.ids) if name not in seen], dtype=torch.int64)
    said = [(taught, "taught the prompts"), (other, "are copies of images that taught the prompts")]
    notes = [f"{count} images of --val {what} and were left out" for count, what in said if count]
    return known.rows(left) if seen else known, notes


def _matching(spec: str, source: DataSource, classes: Path | None) -> DataSource:
    """Open validation data, whose classes must be those of the data; both take their names from the same file."""
    found = open_data(spec, classes=classes)
    if found.class_names != source.class_names:
        raise UserError(
            f"'{spec}' has other classes than '{source.spec}': validation needs the same, in the same order"
        )
    return found


def read_run(folder: Path) -> FinishedRun[PromptRecord]:
    """Read tuned prompts' record back."""
    return read_finished(folder, NAME, PromptRecord, kind="tune-prompts")


def show(run: FinishedRun[PromptRecord], console: Console) -> None:
    """Print the loss, what changed on other images, and where the model is."""
    screen.show(console, blocks(run.summary, run.manifest["config"]["val"]), Closing({"Model": run.folder}))


def blocks(record: PromptRecord, val: str | None) -> list[Block]:
    """Return what is said of tuned prompts: how training ended, and their measures beside the hand-written ones'."""
    loss = record.history[-1]["loss"]
    said: list[Block] = [Text(f"{record.images:,} images, loss {loss:.3f} in the last epoch.")]
    if record.zero_shot is not None and record.tuned is not None:
        both = (record.zero_shot, record.tuned)
        rows: list[Row] = [("accuracy", *(Measure.of(side.accuracy) for side in both))]
        for spec in record.tuned.auroc or {}:
            score = "share of the classes" if "cross_modal" in record.history[-1] else "energy change"
            label: Line = [f"AUROC of the {score}, ", Name(spec)]
            found = [(side.auroc or {})[spec] for side in both]
            rows.append((label, *(Measure.between(value, low, high) for value, low, high in found)))
        columns = [Column("Measure"), Column("Hand-written prompts"), Column("Tuned")]
        caption: Line = ["On ", Code(str(val)), "; 95% intervals."]
        said.append(Table(columns, rows, title="Before and after", caption=caption))
    return [*said, Checks([finding("note", note) for note in record.notes or []])]
