"""A purify run that is ready to start or continue, in one process or in several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from robustvlm.core.ranks import Ranks, current_ranks
from robustvlm.defenses.purify import Parts
from robustvlm.defenses.purify.parts import write_parts
from robustvlm.defenses.purify.tasks import scores
from robustvlm.defenses.purify.train import Observe, PurifySettings, train_parts
from robustvlm.evaluation.purifying.history import joined
from robustvlm.evaluation.shared_folder import opened_by_all
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card, write_card
from robustvlm.report.training_html import load_training_run, write_training_report
from robustvlm.runs.checksums import forget_checksums, write_checksums
from robustvlm.runs.files import write_text
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest, run_identity
from robustvlm.runs.purify_config import PurifyConfig
from robustvlm.runs.training_summary import NAME, TrainingSummary
from robustvlm.training import TrainingData
from robustvlm.training.history import History

CHECKPOINTS = "training"
"""The folder of the stages' checkpoints in a run's folder; needed only to go on."""


@dataclass(frozen=True)
class PreparedPurify:
    """A purify run that is ready to start.

    Under `torchrun` every process prepares and runs it; each takes its share of every batch, and rank 0 alone holds the
    lock, reports progress and writes the model.

    Args:
        held_out: images [N, 3, S, S] on which the score is watched.
    """

    config: PurifyConfig
    settings: PurifySettings
    folder: RunFolder
    manifest: Manifest
    encoder: VLM
    data: TrainingData
    held_out: Tensor

    def run(self, observe: Observe | None = None, *, fresh: bool = False, resume: bool = False) -> TrainingSummary:
        """Train, or go on training, write the model and the report, and return the record; of a finished run, its."""
        ranks = current_ranks()
        with opened_by_all(self.folder, self.manifest, ranks, fresh=fresh, resume=resume) as manifest:
            if not ((self.folder.path / NAME).exists() and self.folder.sealed):
                self._train(ranks, observe, manifest)
            ranks.barrier()
            summary = load_training_run(self.folder.path).summary
            if ranks.leader and not self.folder.report_path.exists():
                write_training_report(self.folder.path)
        return summary

    def _train(self, ranks: Ranks, observe: Observe | None, manifest: Manifest) -> None:
        held_out = self.held_out.to(self.encoder.device)
        before = scores(self.encoder, held_out, self.settings.levels)
        parts, records = train_parts(
            self.encoder,
            self.data,
            self.settings,
            held_out,
            self.folder.path / CHECKPOINTS,
            ranks=ranks,
            observe=observe,
            run=run_identity(manifest),
        )
        if not ranks.leader:
            return
        forget_checksums(self.folder.path)
        write_parts(self.folder.path, parts)
        write_card(self.folder.path, self._card(parts))
        summary = self._summary(parts, joined({str(stage): record for stage, record in records.items()}, before), ranks)
        write_text(self.folder.path / NAME, summary.model_dump_json(indent=2) + "\n")
        write_checksums(self.folder.path, manifest)
        write_training_report(self.folder.path)

    def _card(self, parts: Parts) -> Card:
        fingerprint = self.manifest["model"]["fingerprint"]
        return Card(
            "purify",
            base=self.config.model,
            base_fingerprint=fingerprint,
            settings=parts.settings(),
            base_probe=probe_encoder(self.encoder),
        )

    def _summary(self, parts: Parts, history: History, ranks: Ranks) -> TrainingSummary:
        sizes = _sizes(parts)
        steps = history.steps[-1].step if history.steps else 0
        middle = self.settings.levels.given[len(self.settings.levels.given) // 2]
        return TrainingSummary(
            kind="purify",
            method=" and ".join(self.settings.trained) or "denoiser",
            settings=parts.settings() | {"parameters": sizes},
            trained_parameters=sum(sizes.values()),
            parameters=sum(sizes.values()) + sum(p.numel() for p in self.encoder.parameters()),
            ranks=ranks.size,
            best_by=f"score at {middle:g}",
            steps=steps,
            history=history,
        )


def _sizes(parts: Parts) -> Mapping[str, int]:
    """Return the number of parameters of the parts that are there."""
    both = {"purifier": parts.purifier, "mapper": parts.mapper}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in both.items() if part is not None}
