"""An attack run from images to a finished folder: clean pass, attacks by stage, summary, report; resumable throughout.

A stage is one attack at one eps; stages go by rising eps, then in the order the attacks were named. An image leaves at
its first success: it is not attacked again at this or a larger eps, since a perturbation inside a small ball lies
inside every larger one. Every finished image is a line in the run's journal before its lane is used again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustvlm.attacks import (
    FAILED,
    FOOLED,
    Job,
    LaneAttack,
    LaneEngine,
    Oracle,
    Probe,
    Result,
    ThreatModel,
    margin,
    target_classes,
)
from robustvlm.data.pixels import to_pixels
from robustvlm.data.source import DataSource, Sample, Unreadable
from robustvlm.errors import UserError
from robustvlm.evaluation import checks
from robustvlm.evaluation.ledger import Ledger
from robustvlm.evaluation.observer import Observer
from robustvlm.evaluation.questions import ask
from robustvlm.runs.config import AttackConfig
from robustvlm.runs.pictures import save_pair, save_to_gallery
from robustvlm.runs.results import CleanFact

# A killed session loses its count of passes since the last note of it.
_COST_SECONDS = 5.0


@dataclass(frozen=True)
class Stage:
    """One attack at one eps."""

    attack: LaneAttack
    threat: ThreatModel
    eps_text: str

    @property
    def title(self) -> str:
        return f"{self.attack.name} {self.threat.norm} {self.eps_text}"


class AttackRun:
    """Attacks the images of a source under a config and keeps all facts in a ledger.

    Args:
        config: the settings; source: the images; classifier: pixels in [0, 1] to logits.
        attacks: the attacks of `config.attack`, in order.
        ledger: the run's record; facts already in it are not found again.
        observer: told about progress.
        interpolation: how images are brought to the attack's resolution.
    """

    def __init__(
        self,
        *,
        config: AttackConfig,
        source: DataSource,
        classifier: nn.Module,
        attacks: list[LaneAttack],
        ledger: Ledger,
        observer: Observer,
        interpolation: str = "bicubic",
    ) -> None:
        self.config, self.source, self.ledger, self.observer = config, source, ledger, observer
        self.interpolation = interpolation
        self.oracle = Oracle(classifier, device=config.device, precision=config.precision)
        self.stages = [
            Stage(attack, ThreatModel(config.norm, eps), text)
            for eps, text in zip(config.eps, config.eps_text, strict=True)
            for attack in attacks
        ]
        self.n_targets = max(getattr(attack, "n_targets", None) or 1 for attack in attacks)
        self._order: dict[str, int] = {}
        self._began = self._noted = time.monotonic()

    def run(self) -> None:
        """Do what is left to do; every fact goes to the ledger as soon as it is known."""
        self._began = self._noted = time.monotonic()
        try:
            found = self._probe()
            self._clean_pass(found.rungs)
            for stage in self.stages:
                self._run_stage(stage, found)
        finally:
            self._note_cost()

    def _note_cost(self, *, every: float = 0.0) -> None:
        """Record the passes and time of this session so far, unless that was done in the last `every` seconds."""
        now = time.monotonic()
        if now - self._noted >= every:
            self.ledger.add_cost(self.oracle.passes, now - self._began)
            self._noted = now

    def _probe(self) -> Probe:
        """Question the model on the first images; refuse one whose rows are not independent."""
        first = self._first_images()
        images = torch.stack([self._pixels(sample) for sample in first])
        label = torch.tensor([sample.label for sample in first])
        found, notes = ask(self.oracle, images, label, model=self.config.model)
        checks.require_independent_rows(found, self.config.model)
        self.ledger.add_checks([*checks.of_probe(found), *notes])
        return found

    def _first_images(self) -> list[Sample]:
        readable: list[Sample] = []
        reasons: list[str] = []
        for item in self._samples():
            if isinstance(item, Unreadable):
                reasons.append(f"'{item.id}': {item.reason}")
                continue
            readable.append(item)
            if len(readable) == self.config.lanes:
                break
        if not readable:
            why = (
                f"none of its {len(reasons)} images can be read (the first, {reasons[0]})" if reasons else "it is empty"
            )
            raise UserError(f"no image to attack in '{self.source.spec}': {why}")
        return readable

    def _clean_pass(self, rungs: tuple[int, ...]) -> None:
        """Classify every image unperturbed, in full batches."""
        known = self.ledger.seen
        self.observer.begin_stage("clean", self.ledger.count_images(self.source, self.config.limit), len(known))
        batch: list[Sample] = []
        faults: list[Unreadable] = []
        for item in self._samples(skip=known):
            if isinstance(item, Unreadable):
                faults.append(item)
                continue
            batch.append(item)
            if len(batch) == rungs[0]:
                self._record(batch, faults, rungs)
                batch, faults = [], []
        self._record(batch, faults, rungs)

    def _record(self, batch: list[Sample], faults: list[Unreadable], rungs: tuple[int, ...]) -> None:
        """Record images before faults: a stream's fault may bear the name of a good image, which must not be lost."""
        if batch:
            self._classify(batch, rungs)
        for fault in faults:
            self.ledger.add_unreadable(self._order[fault.id], fault)
            self.observer.image_done(None)

    def _classify(self, batch: list[Sample], rungs: tuple[int, ...]) -> None:
        size = min(rung for rung in rungs if rung >= len(batch))
        images = torch.stack([self._pixels(sample) for sample in batch])
        logits = self.oracle.confirm(images[torch.arange(size) % len(batch)])[: len(batch)].cpu()
        self.observer.passed(len(batch), size)
        for sample, row in zip(batch, logits, strict=True):
            self.ledger.add_clean(clean_fact(self._order[sample.id], sample, row, n_targets=self.n_targets))
            self.observer.image_done(None)

    def _run_stage(self, stage: Stage, found: Probe) -> None:
        """Run one attack at one eps on every image that is still right; every one of them gets a row."""
        wanted = self.ledger.remaining(stage.threat.eps, stage.attack.name)
        done = self.ledger.attacked(stage.threat.eps, stage.attack.name)
        self.observer.begin_stage(stage.title, len(wanted) + done, done)
        if not wanted:
            return
        engine = LaneEngine(
            self.oracle,
            checks.fit_for(stage.attack, found),
            stage.threat,
            lanes=found.rungs[0],
            seed=self.config.seed,
            rungs=found.rungs,
            on_pass=self.observer.passed,
        )
        for result in engine.run(self._jobs(wanted, stage)):
            self._keep(result, stage)
        for fact in self.ledger.remaining(stage.threat.eps, stage.attack.name).values():
            self._lose(fact, stage, "it is no longer in the data")

    def _jobs(self, wanted: dict[str, CleanFact], stage: Stage) -> Iterator[Job]:
        handed_on: set[str] = set()
        for item in self._samples(only=wanted):
            # Streams also name what no one asked for: damaged shards, and second images of the same name.
            if item.id not in wanted or item.id in handed_on:
                continue
            handed_on.add(item.id)
            fact = wanted[item.id]
            if isinstance(item, Unreadable):
                self._lose(fact, stage, item.reason)
            else:
                yield Job(item.id, fact.index, self._pixels(item), fact.label, tuple(fact.targets))

    def _lose(self, fact: CleanFact, stage: Stage, reason: str) -> None:
        self.ledger.add_lost(fact, stage.attack.name, stage.threat.eps, reason)
        self.observer.image_done(FAILED)

    def _keep(self, result: Result, stage: Stage) -> None:
        """Save the pictures first: a row in the journal means that they are there."""
        if result.outcome == FOOLED:
            fact = self.ledger.clean[result.job.index]
            about = picture_facts(result, fact, stage)
            save_to_gallery(
                self.ledger.folder.gallery_path, result.job.index, result.job.pixels, result.adversarial, about
            )
            if self.config.save_adversarial:
                save_pair(
                    self.ledger.folder.adversarial_path, result.job.index, result.job.pixels, result.adversarial, about
                )
        self.ledger.add_result(result, stage.attack.name, stage.threat.eps)
        self._note_cost(every=_COST_SECONDS)
        self.observer.image_done(result.outcome)

    def _samples(
        self, *, skip: set[str] | None = None, only: dict[str, CleanFact] | None = None
    ) -> Iterator[Sample | Unreadable]:
        """Stream the selected images; every selected id gets its number in source order, wanted or not."""

        def keep(name: str) -> bool:
            self._order.setdefault(name, len(self._order))
            return (skip is None or name not in skip) and (only is None or name in only)

        for item in self.source.samples(limit=self.config.limit, keep=keep):
            self._order.setdefault(item.id, len(self._order))  # the faults of a stream are not asked for
            yield item

    def _pixels(self, sample: Sample) -> Tensor:
        if sample.label < 0:
            raise UserError(f"image '{sample.id}' belongs to none of the classes: attacks need labelled images")
        return to_pixels(sample.image, self.config.resolution, interpolation=self.interpolation)


def clean_fact(index: int, sample: Sample, logits: Tensor, *, n_targets: int) -> CleanFact:
    """Return what logits [K] say of an unperturbed image; a prediction of -1 stands for output that is not finite."""
    finite = bool(logits.isfinite().all())
    return CleanFact(
        index=index,
        image_id=sample.id,
        label=sample.label,
        prediction=int(logits.argmax().item()) if finite else -1,
        margin=margin(logits[None], torch.tensor([sample.label])).item(),
        confidence=logits.double().softmax(0).max().item(),
        targets=target_classes(logits, sample.label, n_targets) if finite else [],
    )


def picture_facts(result: Result, fact: CleanFact, stage: Stage) -> dict[str, str]:
    """Return the metadata that goes with a saved pair of images."""
    shown = {
        "image_id": fact.image_id,
        "index": fact.index,
        "label": fact.label,
        "clean_prediction": fact.prediction,
        "prediction": result.prediction,
        "clean_confidence": fact.confidence,
        "confidence": result.confidence,
        "attack": stage.attack.name,
        "eps": stage.threat.eps,
    }
    return {key: str(value) for key, value in shown.items()}
