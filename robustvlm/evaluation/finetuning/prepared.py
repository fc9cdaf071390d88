"""A fine-tuning run that is ready to start or continue, in one process or in several."""

from __future__ import annotations

from dataclasses import dataclass

from robustvlm.core.ranks import Ranks, current_ranks
from robustvlm.data import DataSource
from robustvlm.data.source import select
from robustvlm.data.taxonomy import Forest
from robustvlm.data.tree_files import save_forest
from robustvlm.defenses.finetune import FinetuneSettings, FinetuneTask, find_method, finetune_task
from robustvlm.defenses.finetune.saved import save_finetuned
from robustvlm.errors import UserError
from robustvlm.evaluation.finetuning.validation import ZeroShotValidation, held_out, validation_images
from robustvlm.evaluation.shared_folder import opened_by_all
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card
from robustvlm.report.training_html import load_training_run, write_training_report
from robustvlm.runs.checksums import forget_checksums, write_checksums
from robustvlm.runs.files import write_text
from robustvlm.runs.finetune_config import FinetuneConfig
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest, run_identity
from robustvlm.runs.training_summary import NAME, TrainingSummary
from robustvlm.training import (
    LabelledImages,
    RobustValidation,
    Trainer,
    TrainingConfig,
    TrainingImages,
    TrainingObserver,
    ids_of,
    parse_augmentation,
)

TREES = "trees.json"
_CALIBRATION = 64
_AHEAD = 4


@dataclass(frozen=True)
class PreparedFinetune:
    """A fine-tuning run that is ready to start.

    Under `torchrun` every process prepares and runs it; each takes its share of every batch, and rank 0 alone holds the
    lock, reports progress and writes the model.
    """

    config: FinetuneConfig
    settings: FinetuneSettings
    training: TrainingConfig
    source: DataSource
    val: DataSource | None
    forest: Forest | None
    vlm: VLM
    folder: RunFolder
    manifest: Manifest

    def run(
        self, observer: TrainingObserver | None = None, *, fresh: bool = False, resume: bool = False
    ) -> TrainingSummary:
        """Train, or go on training, write the model and the report, and return the record; of a finished run, its."""
        ranks = current_ranks()
        with opened_by_all(self.folder, self.manifest, ranks, fresh=fresh, resume=resume) as manifest:
            if not ((self.folder.path / NAME).exists() and self.folder.sealed):
                self._train(ranks, observer, manifest)
            ranks.barrier()
            summary = load_training_run(self.folder.path).summary
            if ranks.leader and not self.folder.report_path.exists():
                write_training_report(self.folder.path)
        return summary

    def _train(self, ranks: Ranks, observer: TrainingObserver | None, manifest: Manifest) -> None:
        base, fingerprint, probe = self.vlm.spec, self.vlm.fingerprint, probe_encoder(self.vlm)
        images, held = self._images()
        batch = next(iter(images.batches([range(min(_CALIBRATION, len(images)))])))
        task = finetune_task(
            self.vlm,
            self.settings,
            class_names=self.source.class_names,
            templates=self.source.templates,
            calibration=batch.pixels.to(self.vlm.device),
            forest=self.forest,
            in_place=True,
        )
        validation = self._validation(task, held)
        history = Trainer(task, images, self.training, validation=validation, ranks=ranks, observer=observer).fit(
            self.folder.path, run=run_identity(manifest)
        )
        if not ranks.leader:
            return
        forget_checksums(self.folder.path)
        trained = sum(p.numel() for p in self.vlm.parameters() if p.requires_grad)
        if self.forest is not None:
            save_forest(self.forest, self.folder.path / TREES)
        method = {"method": self.config.method, **task.method.settings()}
        card = Card("finetune", base=base, base_fingerprint=fingerprint, settings=method, base_probe=probe)
        save_finetuned(self.folder.path, self.vlm, card)
        summary = TrainingSummary(
            kind="finetune",
            method=self.config.method,
            settings=task.method.settings(),
            trained_parameters=trained,
            parameters=sum(p.numel() for p in self.vlm.parameters()),
            ranks=ranks.size,
            best_by=task.best_by,
            steps=history.steps[-1].step,
            history=history,
        )
        write_text(self.folder.path / NAME, summary.model_dump_json(indent=2) + "\n")
        write_checksums(self.folder.path, manifest)
        write_training_report(self.folder.path)

    def _images(self) -> tuple[TrainingImages, LabelledImages]:
        """Return the images to train on and those to validate on."""
        framing = self.vlm.framing
        ids = ids_of(self.source)
        ids = select(ids, self.config.limit) if self.config.limit is not None else ids
        limit = self.config.val_limit
        if self.val is not None:
            held = validation_images(self.val, size=framing, limit=limit)
        else:
            chosen = held_out(self.source, ids, limit)
            if not chosen:
                raise UserError(
                    f"'{self.config.data}' is too small ({len(ids)} images) to hold a part out: pass --val DATA"
                )
            held = validation_images(self.source, size=framing, limit=limit, only=chosen)
            ids = [name for name in ids if name not in chosen]
        images = TrainingImages(
            self.source,
            size=framing,
            seed=self.config.seed,
            how=parse_augmentation(self.config.augment),
            labelled=find_method(self.config.method).labelled,
            ids=ids,
            ahead=_AHEAD if self.vlm.device.type != "cpu" else 0,
        )
        return images, held

    def _validation(self, task: FinetuneTask, held: LabelledImages) -> ZeroShotValidation:
        source = self.val or self.source
        robust = RobustValidation(
            held, self.settings.attack.threat, n_iter=self.config.val_steps, seed=self.config.seed
        )
        return ZeroShotValidation(
            self.vlm, source.class_names, source.templates, robust, texts_change=bool(task.method.also_trained())
        )
