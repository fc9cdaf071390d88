"""Training purifier and mapper, one stage after the other, each with checkpoints of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from robustvlm.core.ranks import Ranks
from robustvlm.core.seeds import derive_seed
from robustvlm.defenses.purify.denoiser import OwnDenoiser, load_denoiser
from robustvlm.defenses.purify.levels import NoiseLevels
from robustvlm.defenses.purify.losses import MapperWeights, PurifierWeights
from robustvlm.defenses.purify.mapper import Mapper, MapperShape
from robustvlm.defenses.purify.parts import Parts
from robustvlm.defenses.purify.tasks import MapperTask, PurifierTask
from robustvlm.defenses.purify.unet import Purifier, purifier_shape
from robustvlm.defenses.purify.vlm import PurifiedVLM
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.training import Task, Trainer, TrainingConfig, TrainingData, TrainingObserver
from robustvlm.training.history import History

Stage = Literal["purifier", "mapper"]
STAGES: tuple[Stage, ...] = ("purifier", "mapper")


@dataclass(frozen=True, kw_only=True)
class PurifySettings:
    """What to train for an encoder, and how.

    Args:
        levels: noise levels to train for.
        stages: purifier, mapper, or both in this order.
        denoiser: `module:callable` of a denoiser of the user's, which then stands in the purifier's place.
        size: preset of the purifier.
        purifier, mapper: settings of the engine for the stages.
        purifier_weights, mapper_weights: of the terms of the losses.

    Raises:
        UserError: nothing would be trained or used.
    """

    levels: NoiseLevels
    stages: tuple[Stage, ...] = STAGES
    denoiser: str | None = None
    size: str = "tiny"
    purifier: TrainingConfig
    mapper: TrainingConfig
    purifier_weights: PurifierWeights = field(default_factory=PurifierWeights)
    mapper_weights: MapperWeights = field(default_factory=MapperWeights)

    def __post_init__(self) -> None:
        if self.denoiser is not None and "purifier" in self.stages and len(self.stages) == 1:
            raise UserError("a denoiser of your own needs no training: leave out --only purifier to train its mapper")

    @property
    def trained(self) -> tuple[Stage, ...]:
        """The stages that have something to train."""
        return tuple(stage for stage in self.stages if stage == "mapper" or self.denoiser is None)

    def config(self, stage: Stage) -> TrainingConfig:
        """Return the engine's settings of a stage."""
        return self.purifier if stage == "purifier" else self.mapper


Observe = Callable[[Stage], TrainingObserver | None]


def train_parts(
    encoder: VLM,
    data: TrainingData,
    settings: PurifySettings,
    held_out: Tensor,
    folder: Path,
    *,
    ranks: Ranks | None = None,
    observe: Observe | None = None,
    run: str | None = None,
) -> tuple[Parts, Mapping[Stage, History]]:
    """Train purifier and mapper around a frozen encoder; killed at any moment, the same call goes on.

    Args:
        encoder: not smoothed; one that is purified already can be given a mapper.
        data: training images, whose labels are not looked at.
        held_out: images [N, 3, S, S] on which the Gaussian robustness score is watched.
        folder: for checkpoints, in a folder for each stage.
        ranks: of a distributed job; observe: who watches a stage; run: identity of the run that the checkpoints are of.

    Returns:
        The parts, and the record of each stage that was trained.

    Raises:
        UserError: the encoder is smoothed, or already has a purifier and would get another; whatever the engine raises.
    """
    check_encoder(encoder, settings)
    device, levels = encoder.device, settings.levels
    held_out = held_out.to(device)
    observe = observe or (lambda _: None)
    records: dict[Stage, History] = {}

    def fit(stage: Stage, task: Task) -> None:
        trainer = Trainer(task, data, settings.config(stage), ranks=ranks, observer=observe(stage))
        records[stage] = trainer.fit(folder / stage, run=run)
        task.module.requires_grad_(False)

    purifier: Purifier | OwnDenoiser | None = None
    if settings.denoiser is not None:
        purifier = load_denoiser(settings.denoiser, encoder.image_size, device)
    elif "purifier" in settings.stages:
        with seeded(settings.purifier.seed, "purifier"):
            purifier = Purifier(purifier_shape(settings.size, encoder.image_size)).to(device)
        purifier = purifier.to(memory_format=torch.channels_last)
        fit("purifier", PurifierTask(purifier, encoder, levels, settings.purifier_weights, held_out))
    mapper: Mapper | None = None
    if "mapper" in settings.stages:
        with torch.no_grad():
            dim = encoder.encode_image(held_out[:1]).shape[1]
        with seeded(settings.mapper.seed, "mapper"):
            mapper = Mapper(MapperShape(dim)).to(device)
        before = PurifiedVLM(encoder, purifier, None)
        fit("mapper", MapperTask(mapper, before, encoder, levels, settings.mapper_weights, held_out))
    return Parts(purifier, mapper, levels.given), records


def check_encoder(encoder: VLM, settings: PurifySettings) -> None:
    """Refuse encoders that purifier or mapper cannot be trained for."""
    if isinstance(encoder, SmoothedVLM):
        plain, smoothed, _ = encoder.spec.partition("+smooth")
        below = f"'{plain}'" if smoothed else "the model below the smoothing"
        raise UserError(f"'{encoder.spec}' is smoothed already: purify {below}, then smooth the result")
    own = isinstance(encoder, PurifiedVLM) and encoder.purifier is not None
    if own and (settings.denoiser is not None or "purifier" in settings.stages):
        raise UserError(f"'{encoder.spec}' has a purifier already: pass --only mapper, or the model it stands on")


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw first weights from a stream of their own, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "first weights", name))
        yield
