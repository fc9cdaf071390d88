"""`robustvlm purify`: a purifier and a mapper around a frozen encoder, for a stronger smoothed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from robustvlm.runs.run import Command, FinishedRun, mirrors
from robustvlm.runs.settings import Settings, Shared, argument, option, way

if TYPE_CHECKING:
    from robustvlm.report.training import TrainingSummary


class PurifySettings(Settings):
    """Train a purifier before and a mapper behind a frozen encoder; the run's folder is a model spec, RUN+smooth:0.25.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same weights. Under
    torchrun several processes share every batch.
    """

    group: ClassVar[str] = "Training"

    model: str = argument(
        "tiny", "The encoder, which stays as it is; `robustvlm models` lists the forms. Not a smoothed one."
    )
    data: str = option(
        "emoji?split=train",
        "Images to train on, without labels; `robustvlm data` lists the forms.",
        group="Model and data",
    )
    val: str | None = option(
        None, "Images to watch the score on [default: a part of the data, held out].", group="Validation"
    )
    val_limit: int = option(
        64, "Watch the score on at most this many images.", at_least=1, unit="images", group="Validation"
    )
    sigma: list[float] = option(
        [0.12, 0.25, 0.5],
        "Noise level to serve, in [0, 1] pixels; may be repeated [default: 0.12, 0.25 and 0.5].",
        shown=False,
        group="Purifier and mapper",
    )
    only: str | None = option(
        None, "purifier or mapper [default: first one, then the other].", group="Purifier and mapper"
    )
    denoiser: str | None = option(
        None,
        "Your own denoiser in the purifier's place, as module:callable (see docs/purify.md).",
        group="Purifier and mapper",
    )
    size: str = option("tiny", "Of the purifier: tiny, small or base.", group="Purifier and mapper")
    steps: int = option(1000, "Optimiser steps of the purifier.")
    mapper_steps: int = option(1000, "Optimiser steps of the mapper.")
    batch_size: int = option(64, "Images per step, over all processes.")
    accumulate: int = option(1, "Parts that a batch is cut into, to save memory.")
    lr: float = option(5e-3, "Peak learning rate of the purifier.")
    mapper_lr: float = option(2e-3, "Peak learning rate of the mapper.")
    feature_weight: float = option(
        2.0, "Of 1 - cos to the clean feature (purifier).", at_least=0, group="Weights of the losses"
    )
    pixel_weight: float = option(
        1.0, "Of the squared error of the pixels (purifier).", at_least=0, group="Weights of the losses"
    )
    diffusion_weight: float = option(
        1.0, "Of the denoising loss (purifier).", at_least=0, group="Weights of the losses"
    )
    text_weight: float = option(
        0.0,
        "Of KL(classes of the clean image || of the purified one), by the data's names (purifier).",
        at_least=0,
        group="Weights of the losses",
    )
    statistics_weight: float = option(
        1.0, "Of the match of mean and spread (mapper).", at_least=0, group="Weights of the losses"
    )
    eps: str | None = option(
        None, "Train the purifier against attacks of this radius [default: noise alone].", group="Attack"
    )
    norm: str | None = option(None, "Linf or L2, of that attack [default: Linf].", group="Attack")
    inner_steps: int | None = option(None, "Gradient steps of that attack [default: 3].", group="Attack")
    augment: str = option("crop", "none, flip, crop (and flip) or strong (colours too).")
    ema: float = option(0.99, "Decay of the moving average of the weights, which is kept.")
    precision: str = option("fp32", "fp32, or bf16 (weights and noise stay fp32).")
    limit: int | None = option(
        None, "Use this many images, chosen by a hash of their ids.", at_least=2, unit="images", group="Model and data"
    )
    validate_every: float = option(0.25, "In steps; below 1, a share of all; 0: at the end only.", group="Validation")
    checkpoint_every: int = way(0, "In steps [default: every five minutes].")
    seed: int = Shared.SEED
    device: str = Shared.DEVICE
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    resume: bool | None = Shared.RESUME
    track: str | None = Shared.TRACK
    as_json: bool = Shared.RECORD_AS_JSON

    def stored(self, **resolved: Any) -> dict[str, Any]:
        """Return what defines the run; options that came later are left out where they change nothing."""
        later = ("text_weight", "eps", "norm", "inner_steps")
        return {name: value for name, value in super().stored(**resolved).items() if value or name not in later}


PURIFY = Command(
    "purify",
    PurifySettings,
    "robustvlm.commands.purify.work",
    doing="Purifying",
    kept="the last checkpoint is kept",
    shares="every batch",
)


@mirrors(PURIFY)
def purify(model: str = "tiny", **options: Any) -> FinishedRun[TrainingSummary]:
    """Train a purifier and a mapper around a frozen encoder, as `robustvlm purify` does; options by their names.

    The folder of the run returned is a model spec, to be smoothed: `f"{run.folder}+smooth:0.25"`.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> short = {"limit": 40, "val_limit": 4, "steps": 1, "mapper_steps": 1, "batch_size": 2}
        >>> purify("tiny", out=tempfile.mkdtemp(), **short).summary.method
        'purifier and mapper'
    """
    return PURIFY.start(model=model, **options)
