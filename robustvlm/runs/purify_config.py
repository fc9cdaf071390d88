"""What defines a purify run: the settings that decide its purifier and mapper."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class PurifyConfig(BaseModel):
    """Every setting that the trained parts depend on; a run is resumed only under an equal one.

    `only` is "purifier" or "mapper", None for both; `denoiser` is `module:callable` in the purifier's place. `steps`
    and `lr` are the purifier's, `mapper_steps` and `mapper_lr` the mapper's. The weights are those of the terms of the
    two losses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    val: str | None = None
    val_limit: int = 64
    sigma: list[float] = [0.12, 0.25, 0.5]
    only: str | None = None
    denoiser: str | None = None
    size: str = "tiny"
    steps: int = 1000
    mapper_steps: int = 1000
    batch_size: int = 64
    lr: float = 5e-3
    mapper_lr: float = 2e-3
    feature_weight: float = 2.0
    pixel_weight: float = 1.0
    diffusion_weight: float = 1.0
    statistics_weight: float = 1.0
    augment: str = "crop"
    ema: float = 0.99
    precision: str = "fp32"
    accumulate: int = 1
    limit: int | None = None
    validate_every: float = 0.25
    seed: int = 0
    device: str = "cpu"
