"""From the settings of a purify run to those of its two stages; every mistake in them is found here."""

from __future__ import annotations

from robustvlm.defenses.purify import NoiseLevels
from robustvlm.defenses.purify.losses import MapperWeights, PurifierWeights
from robustvlm.defenses.purify.train import STAGES, PurifySettings, Stage
from robustvlm.errors import UserError, nearest
from robustvlm.runs.purify_config import PurifyConfig
from robustvlm.training import TrainingConfig, parse_augmentation


def stage_settings(config: PurifyConfig, *, checkpoint_every: int = 0) -> PurifySettings:
    """Return the settings of the two stages.

    Raises:
        UserError: values out of range, unknown words, or nothing to train.

    Example:
        >>> stage_settings(PurifyConfig(model="tiny", data="emoji", sigma=[0.5, 0.25])).levels
        NoiseLevels(given=(0.25, 0.5))
    """
    parse_augmentation(config.augment)
    weights = (config.feature_weight, config.pixel_weight, config.diffusion_weight, config.statistics_weight)
    if not all(0 <= weight < float("inf") for weight in weights):
        raise UserError(f"the weights of the losses must be 0 or more, got {', '.join(f'{w:g}' for w in weights)}")
    if config.limit is not None and config.limit < 2:
        raise UserError(f"--limit must be at least 2 images, got {config.limit}")
    if config.val_limit < 1:
        raise UserError(f"--val-limit must be at least 1 image, got {config.val_limit}")
    return PurifySettings(
        levels=NoiseLevels.of(config.sigma),
        stages=_stages(config.only),
        denoiser=config.denoiser,
        size=config.size,
        purifier=_engine(config, config.steps, config.lr, checkpoint_every),
        mapper=_engine(config, config.mapper_steps, config.mapper_lr, checkpoint_every),
        purifier_weights=PurifierWeights(
            diffusion=config.diffusion_weight, feature=config.feature_weight, pixel=config.pixel_weight
        ),
        mapper_weights=MapperWeights(statistics=config.statistics_weight),
    )


def _engine(config: PurifyConfig, steps: int, lr: float, checkpoint_every: int) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=config.batch_size,
        lr=lr,
        final_lr=0.01,
        weight_decay=0.01,
        ema=config.ema,
        precision=config.precision,
        accumulate=config.accumulate,
        seed=config.seed,
        validate_every=config.validate_every,
        checkpoint_every=checkpoint_every,
    )


def _stages(only: str | None) -> tuple[Stage, ...]:
    if only is None:
        return STAGES
    found = tuple(stage for stage in STAGES if stage == only)
    if not found:
        raise UserError(f"--only takes purifier or mapper, got '{only}': {nearest(only, STAGES)}")
    return found
