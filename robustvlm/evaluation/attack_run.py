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
    probe,
    target_classes,
)
from robustvlm.core.memory import is_out_of_memory
from robustvlm.data.pixels import to_pixels
from robustvlm.data.source import DataSource, Sample, Unreadable
from robustvlm.errors import UserError
from robustvlm.evaluation import checks
from robustvlm.evaluation.ledger import Ledger
from robustvlm.evaluation.observer import Observer
from robustvlm.runs.config import AttackConfig
from robustvlm.runs.pictures import save_pair, save_to_gallery
from robustvlm.runs.results import CleanFact
from robustvlm.runs.summary import Check


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

    def run(self) -> None:
        """Do what is left to do; every fact goes to the ledger as soon as it is known."""
        began = time.monotonic()
        try:
            found = self._probe()
            self._clean_pass(found.rungs)
            for stage in self.stages:
                self._run_stage(stage, found)
        finally:
            self.ledger.add_cost(self.oracle.passes, time.monotonic() - began)

    def _probe(self) -> Probe:
        """Question the model on the first images; refuse one whose rows are not independent."""
        first = self._first_images()
        images = torch.stack([self._pixels(sample) for sample in first])
        found = self._probe_what_fits(images, torch.tensor([sample.label for sample in first]))
        checks.require_independent_rows(found, self.config.model)
        self.ledger.add_checks(checks.of_probe(found))
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

    def _probe_what_fits(self, images: Tensor, label: Tensor) -> Probe:
        """Probe with full lanes, or with half as many for as long as memory runs out."""
        while True:
            try:
                return probe(self.oracle, images, label)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(images) == 1:
                    raise
                images, label = images[: len(images) // 2], label[: len(label) // 2]
                note = f"Memory did not suffice for more than {len(images)} lanes."
                self.ledger.add_checks([Check(name="lanes", level="note", message=note)])

    def _clean_pass(self, rungs: tuple[int, ...]) -> None:
        """Classify every image unperturbed, in full batches."""
        known = self.ledger.seen
        self.observer.begin_stage("clean", self.ledger.count_images(self.source, self.config.limit), len(known))
        batch: list[tuple[int, Sample]] = []
        for item in self._samples(skip=known):
            index = self._order[item.id]
            if isinstance(item, Unreadable):
                self.ledger.add_unreadable(index, item)
                self.observer.image_done(None)
                continue
            batch.append((index, item))
            if len(batch) == rungs[0]:
                self._classify(batch, rungs)
                batch = []
        if batch:
            self._classify(batch, rungs)

    def _classify(self, batch: list[tuple[int, Sample]], rungs: tuple[int, ...]) -> None:
        size = min(rung for rung in rungs if rung >= len(batch))
        images = torch.stack([self._pixels(sample) for _, sample in batch])
        logits = self.oracle.confirm(images[torch.arange(size) % len(batch)])[: len(batch)].cpu()
        self.observer.passed(len(batch), size)
        for (index, sample), row in zip(batch, logits, strict=True):
            self.ledger.add_clean(clean_fact(index, sample, row, n_targets=self.n_targets))
            self.observer.image_done(None)

    def _run_stage(self, stage: Stage, found: Probe) -> None:
        """Run one attack at one eps on every image that is still right."""
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
            on_pass=lambda used: self.observer.passed(used, 2 * used),
        )
        for result in engine.run(self._jobs(wanted, stage)):
            self._keep(result, stage)

    def _jobs(self, wanted: dict[str, CleanFact], stage: Stage) -> Iterator[Job]:
        for item in self._samples(only=wanted):
            fact = wanted[item.id]
            if isinstance(item, Unreadable):
                self.ledger.add_lost(fact, stage.attack.name, stage.threat.eps, item.reason)
                self.observer.image_done(FAILED)
                continue
            yield Job(item.id, fact.index, self._pixels(item), fact.label, tuple(fact.targets))

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
        self.observer.image_done(result.outcome)

    def _samples(
        self, *, skip: set[str] | None = None, only: dict[str, CleanFact] | None = None
    ) -> Iterator[Sample | Unreadable]:
        """Stream the selected images; every selected id gets its number in source order, wanted or not."""

        def keep(name: str) -> bool:
            self._order.setdefault(name, len(self._order))
            return (skip is None or name not in skip) and (only is None or name in only)

        return self.source.samples(limit=self.config.limit, keep=keep)

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
