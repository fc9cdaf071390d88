"""The work of `robustvlm purify`: train both parts, write them as a model, and show what became of the score."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from robustvlm import training
from robustvlm.attacks.threat import ThreatModel, one_radius, parse_norm
from robustvlm.commands.common.inputs import describe_images, facts_of, probe_of, taken_for_granted
from robustvlm.commands.common.lessons import remarks_on
from robustvlm.commands.purify import PurifySettings
from robustvlm.core.files import write_text
from robustvlm.core.framing import to_pixels
from robustvlm.core.ranks import Ranks, current_ranks, device_of_rank, resolve_device
from robustvlm.data import DataSource, Sample, open_data, select
from robustvlm.data.splits import require_unseen_validation
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.finetune import InnerAttack
from robustvlm.defenses.purify import NoiseLevels, Parts, load_denoiser, train
from robustvlm.defenses.purify.parts import write_parts
from robustvlm.defenses.purify.train import PurifySettings as Stages
from robustvlm.defenses.purify.unet import purifier_shape
from robustvlm.errors import BadSetting, UserError, nearest, setting
from robustvlm.models import VLM, zero_shot
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card, write_card
from robustvlm.report import screen
from robustvlm.report import training as report
from robustvlm.report.training import told
from robustvlm.runs.manifest import run_identity
from robustvlm.runs.run import Facts, FinishedRun, Session
from robustvlm.stats import worth_of
from robustvlm.training.history import History
from robustvlm.training.validation import some_held_out

RESULTS = (report.NAME,)
_AHEAD = 4
_OF_STAGE: Mapping[train.Stage, tuple[str, ...]] = {
    "purifier": ("size", "steps", "lr", "feature_weight", "pixel_weight", "diffusion_weight"),
    "mapper": ("mapper_steps", "mapper_lr", "statistics_weight"),
}

read_run, report_of, write_report = report.load_training_run, report.training_report, report.write_training_report


@dataclass(frozen=True)
class PurifyWork:
    """A run's facts, encoder and images.

    Args:
        images: to train on; held: pixels [N, 3, S, S] on which the score is watched, worth so many independent ones.
        texts: unit embeddings [K, D] of the classes, where the purifier's loss looks at them.
    """

    facts: Facts
    stages: Stages
    encoder: VLM
    images: training.TrainingData
    held: Tensor
    worth: float
    texts: Tensor | None

    def run(self, session: Session) -> None:
        """Train, or go on training, and write the model and its record."""
        held = self.held.to(self.encoder.device)
        before = train.scores(self.encoder, held, self.stages.levels, worth=self.worth)

        def observe(stage: train.Stage) -> training.TrainingObserver:
            session.observer.say(f"The {stage}:")
            return told(session.observer)

        # The checkpoints of the stages are needed only to go on.
        parts, records = train.train_parts(
            self.encoder,
            self.images,
            self.stages,
            held,
            session.path / "training",
            ranks=session.ranks,
            observe=observe,
            run=run_identity(session.manifest),
            texts=self.texts,
            worth=self.worth,
        )
        if not session.ranks.leader:
            return
        history = joined({str(stage): record for stage, record in records.items()}, before)
        with session.results() as folder:
            write_parts(folder, parts)
            write_card(folder, self._card(parts))
            summary = self._summary(parts, history, session.ranks)
            write_text(folder / report.NAME, summary.model_dump_json(indent=2) + "\n")

    def _card(self, parts: Parts) -> Card:
        return Card(
            "purify",
            base=self.facts.config["model"],
            base_fingerprint=self.facts.model["fingerprint"],
            settings=parts.settings(),
            base_probe=probe_encoder(self.encoder),
        )

    def _summary(self, parts: Parts, history: History, ranks: Ranks) -> report.TrainingSummary:
        sizes = _sizes(parts)
        given = self.stages.levels.given
        return report.TrainingSummary(
            kind="purify",
            method=" and ".join(self.stages.trained) or "denoiser",
            settings=parts.settings() | {"parameters": sizes},
            trained_parameters=sum(sizes.values()),
            parameters=sum(sizes.values()) + sum(p.numel() for p in self.encoder.parameters()),
            ranks=ranks.size,
            watched=f"score at {given[len(given) // 2]:g}",
            worth=self.worth,
            steps=history.steps[-1].step if history.steps else 0,
            history=history,
        )


def open_work(settings: PurifySettings) -> PurifyWork:
    """Check all settings, open the data and load the encoder."""
    stages, ranks = stages_of(settings), current_ranks()
    stages.check_parts(ranks.size)
    device = device_of_rank(resolve_device(settings.device), ranks)
    source, val = open_data(settings.data), None if settings.val is None else open_data(settings.val)
    require_unseen_validation(val, source, val_limit=settings.val_limit, limit=settings.limit)
    encoder = load_pipeline(settings.model, device=device)
    purifier_shape(settings.size, encoder.image_size)
    train.check_encoder(encoder, stages)
    images, held, worth = _images(settings, source, val, encoder)
    model, data = facts_of(encoder, "interpolation"), _describe(source)
    texts = None
    if settings.text_weight:
        texts = zero_shot(encoder, source.class_names, source.templates).class_embeddings
        data |= {"classes": list(source.class_names), "templates": list(source.templates)}
    if settings.denoiser is not None:
        # Another denoiser of the same name makes another run, or the finished one would be handed back.
        model["denoiser"] = load_denoiser(settings.denoiser, encoder.image_size, device).fingerprint
    if val is not None:
        data |= {"val": _describe(val)}
    facts = Facts(
        (settings.model, settings.data),
        settings.stored(device=str(device)),
        model,
        data,
        probe=probe_of(encoder),
        remarks=[
            *taken_for_granted(encoder),
            *source.remarks,
            *remarks_on(settings.model, val, settings.val_limit),
        ],
    )
    return PurifyWork(facts, stages, encoder, images, held, worth, texts)


def stages_of(settings: PurifySettings) -> Stages:
    """Return the settings of the two stages.

    Raises UserError for values out of range, unknown words, nothing to train, and options of a stage left out.

    Example:
        >>> stages_of(PurifySettings(sigma=[0.5, 0.25])).levels
        NoiseLevels(given=(0.25, 0.5))
    """
    training.parse_augmentation(settings.augment)
    only = settings.only
    if only is not None and only not in train.STAGES:
        raise BadSetting("only", "takes purifier or mapper", got=f"'{only}': {nearest(only, train.STAGES)}")
    for name in ("mapper_steps", "mapper_lr"):  # the engine knows them by the names of the purifier's
        if not 0 < getattr(settings, name) < math.inf:
            raise BadSetting(name, "must be a positive number", got=getattr(settings, name))
    same = ("batch_size", "ema", "precision", "accumulate", "seed", "validate_every", "checkpoint_every")
    attack = None
    if settings.eps is not None:
        threat = ThreatModel(parse_norm(settings.norm or "Linf"), one_radius(settings.eps, "eps")[1])
        attack = InnerAttack(threat=threat, steps=3 if settings.inner_steps is None else settings.inner_steps)
    else:
        settings.require_none(("norm", "inner_steps"), f"has no effect without {setting('eps')}")
    engine = {"final_lr": 0.01, "weight_decay": 0.01, **{name: getattr(settings, name) for name in same}}
    stages = Stages(
        levels=NoiseLevels.of(settings.sigma),
        stages=tuple(stage for stage in train.STAGES if only in (None, stage)),
        denoiser=settings.denoiser,
        size=settings.size,
        purifier=training.TrainingConfig(steps=settings.steps, lr=settings.lr, **engine),
        mapper=training.TrainingConfig(steps=settings.mapper_steps, lr=settings.mapper_lr, **engine),
        purifier_weights=train.PurifierWeights(
            diffusion=settings.diffusion_weight,
            feature=settings.feature_weight,
            pixel=settings.pixel_weight,
            text=settings.text_weight,
        ),
        mapper_weights=train.MapperWeights(statistics=settings.statistics_weight),
        attack=attack,
    )
    for stage, names in _OF_STAGE.items():
        if stage not in stages.trained:
            settings.require_usual(names, f"is for training a {stage}, and none is trained here: leave it out")
    return stages


def _images(
    settings: PurifySettings, source: DataSource, val: DataSource | None, encoder: VLM
) -> tuple[training.TrainingImages, Tensor, float]:
    """Return the images to train on, pixels [N, 3, S, S] of those to watch the score on, and what these are worth.

    Labels play no part.
    """
    ids = training.ids_of(source)
    ids = select(ids, settings.limit) if settings.limit is not None else ids
    chosen = some_held_out(source, ids, settings.val_limit, data=settings.data) if val is None else set()
    images = training.TrainingImages(
        source,
        size=encoder.framing,
        seed=settings.seed,
        how=training.parse_augmentation(settings.augment),
        labelled=False,
        ids=[name for name in ids if name not in chosen],
        ahead=0 if encoder.device.type == "cpu" else _AHEAD,
    )
    items = source.samples(keep=chosen.__contains__) if val is None else val.samples(limit=settings.val_limit)
    found = [(to_pixels(item.image, encoder.framing), item.id) for item in items if isinstance(item, Sample)]
    if not found:
        raise UserError(f"'{settings.val or settings.data}' holds no readable image to watch the score on")
    worth = worth_of((val or source).group(name) for _, name in found)
    return images, torch.stack([pixels for pixels, _ in found]), worth


def _describe(source: DataSource) -> dict[str, Any]:
    """Return the facts that identify the images; classes play no part."""
    return describe_images(source)


def joined(records: Mapping[str, History], before: Mapping[str, training.Measure]) -> History:
    """Return the stages as one training: steps counted on, terms named by their stage, seconds and passes added.

    Args:
        records: of every stage, in order. before: measures of the encoder alone, which stand at step 0.

    Example:
        >>> from robustvlm.training.history import StepEntry
        >>> step = StepEntry(step=10, terms={"loss": 1.0}, learning_rate=0.1, gradient_norm=1.0)
        >>> both = joined({"purifier": History(steps=[step]), "mapper": History(steps=[step])}, {"score": 0.5})
        >>> [(entry.step, entry.terms) for entry in both.steps]
        [(10, {'purifier loss': 1.0}), (20, {'mapper loss': 1.0})]
    """
    whole = History(validations=[training.Validation(step=0, measures=dict(before))])
    done = 0
    for stage, record in records.items():
        for entry in record.steps:
            terms = {f"{stage} {name}": value for name, value in entry.terms.items()}
            whole.steps.append(entry.model_copy(update={"step": done + entry.step, "terms": terms}))
        # What an untrained part does stands for nothing: the encoder alone is what training starts from.
        later = [found for found in record.validations if found.step > 0]
        whole.validations += [found.model_copy(update={"step": done + found.step}) for found in later]
        whole.warnings += [warned.model_copy(update={"step": done + warned.step}) for warned in record.warnings]
        done = whole.steps[-1].step if whole.steps else 0
        whole.images += record.images
        whole.passes += record.passes
        whole.seconds += record.seconds
        whole.validation_seconds += record.validation_seconds
        whole.peak_memory = max(whole.peak_memory, record.peak_memory)
        whole.skipped |= record.skipped
    return whole


def _sizes(parts: Parts) -> Mapping[str, int]:
    """Return the number of parameters of the parts that are there."""
    both = {"purifier": parts.purifier, "mapper": parts.mapper}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in both.items() if part is not None}


def show(run: FinishedRun[report.TrainingSummary], console: Console) -> None:
    """Print the score without and with the parts, and where the model is."""
    screen.show(console, report.training_report(run), report.training_closing(run))
