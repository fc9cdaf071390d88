"""`robustvlm finetune`: adversarial fine-tuning of a model's vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from robustvlm.errors import setting
from robustvlm.runs.run import Command, FinishedRun, mirrors
from robustvlm.runs.settings import Settings, Shared, argument, way
from robustvlm.runs.settings import option as declared  # one of the options is called "option"

if TYPE_CHECKING:
    from robustvlm.report.training import TrainingSummary


class FinetuneSettings(Settings):
    """Fine-tune a model so that it withstands attacks; the run's folder is a model spec.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same weights. Under
    torchrun several processes share every batch.
    """

    group: ClassVar[str] = "Training"

    model: str = argument("tiny", "The model to start from; `robustvlm models` lists the forms.")
    method: str = declared(
        "hierarchical",
        "hierarchical (needs a class tree), tecoa, fare, pmg, simclip, agft, ucat, distill, or clean (the control: no "
        "attack). fare, simclip and agft learn without labels; those of the images to validate on, if there are any, "
        "choose the step.",
        group="Method",
    )
    teacher: str | None = declared(
        None, "The model that distill learns from [default: the model itself, before training].", group="Method"
    )
    data: str = declared(
        "emoji?split=train", "Images to train on; `robustvlm data` lists the forms.", group="Model and data"
    )
    val: str | None = declared(
        None, "Images to validate on [default: a tenth of the data, at most 512, held out].", group="Validation"
    )
    classes: Path | None = Shared.CLASSES
    templates: Path | None = Shared.TEMPLATES
    tree: list[str] = declared(
        [],
        "File of a class tree (JSON, YAML or CSV), wordnet, or llm (by the language model of --llm); repeat it for a "
        "forest [default: the data's own].",
        group="Class tree",
    )
    tree_by: list[str] = declared(
        [], "What --tree llm sorts by, repeatable [default: kind of thing].", group="Class tree"
    )
    llm: str | None = declared(None, "OpenAI-compatible endpoint for --tree llm.", group="Class tree")
    llm_model: str | None = declared(None, "The language model there.", group="Class tree")
    norm: str = declared("Linf", "Linf or L2, of the inner attack and of validations.", group="Inner attack")
    eps: str | float | None = declared(
        None,
        "Radius, of the inner attack and of validations [default: 1/255; L2: 0.5].",
        typed=str | None,
        group="Inner attack",
    )
    alpha: str | float | None = declared(
        None,
        "Step of the inner attack [default: 2.5 eps / (steps + 1)].",
        typed=str | None,
        group="Inner attack",
    )
    inner_steps: int = declared(3, "Gradient steps of the inner attack.", group="Inner attack")
    curvature: float | None = declared(None, "Of the hyperbolic space (hierarchical) [default: 1].", group="Method")
    option: list[str] = declared(
        [],
        "An option of the method, NAME=VALUE; may be repeated. hierarchical: depth, temperature, negatives, leaf_only, "
        "per_level, eps_text, vicinity, vicinity_radius, norm_order, norm_gap, train_texts; pmg: general, clean, "
        "reverse; agft: scale, ratio; ucat: weight, temperature; distill: labels, features.",
        group="Method",
    )
    trainable: str = declared(
        "all", "all (the vision tower), lora, lora:RANK, ssf, or last:N (its last N blocks).", group="Method"
    )
    augment: str = declared("crop", "none, flip, crop (and flip) or strong (colours too).")
    steps: int | None = declared(None, "Optimiser steps [default: 2 epochs].")
    epochs: float | None = declared(None, "Passes over the images, in place of steps.")
    batch_size: int = declared(128, "Images per step, over all processes.")
    accumulate: int = declared(1, "Parts that a batch is cut into, to save memory.")
    lr: float | None = declared(None, "Peak learning rate [default: 1e-5; lora and ssf: 1e-3].")
    warmup: float = declared(0.05, "Steps of warm-up; below 1, a share of all steps.")
    weight_decay: float = declared(1e-4, "Of matrices and filters.")
    clip: float = declared(1.0, "Largest norm of the gradient.")
    precision: str = declared("fp32", "fp32, or bf16 (weights and perturbations stay fp32).")
    ema: float | None = declared(None, "Decay of a moving average of the weights, which is then kept, such as 0.999.")
    compile: bool = declared(False, "Compile the vision tower (torch.compile).")
    gradient_checkpointing: bool = declared(False, "Trade time for memory, where the tower offers it.")
    limit: int | None = declared(
        None,
        "Use this many images, chosen by a hash of their ids.",
        at_least=1,
        unit="images",
        group="Model and data",
    )
    val_limit: int = declared(
        512, "Validate on at most this many images.", at_least=1, unit="images", group="Validation"
    )
    val_steps: int = declared(10, "PGD steps of a validation.", at_least=1, unit="PGD steps", group="Validation")
    validate_every: float = declared(0.1, "In steps; below 1, a share of all; 0: at the end only.", group="Validation")
    checkpoint_every: int = way(0, "In steps [default: every five minutes].")
    seed: int = Shared.SEED
    device: str = Shared.DEVICE
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    resume: bool | None = Shared.RESUME
    track: str | None = Shared.TRACK
    as_json: bool = Shared.RECORD_AS_JSON

    @property
    def passes(self) -> float | None:
        """Passes over the images: 2, unless steps or passes are given."""
        return 2.0 if self.steps is None and self.epochs is None else self.epochs

    @property
    def rate(self) -> float:
        """The peak learning rate: few new parameters take larger steps than all of the tower's."""
        return self.lr if self.lr is not None else 1e-3 if self.trainable.startswith(("lora", "ssf")) else 1e-5

    @model_validator(mode="after")
    def _asked_for(self) -> FinetuneSettings:
        """Refuse what only a tree that a language model makes is made by."""
        if "llm" not in self.tree:
            self.require_none(("llm", "llm_model", "tree_by"), f"is for {setting('tree', 'llm')}: pass both")
        return self

    def stored(self, **resolved: Any) -> dict[str, Any]:
        """Return what defines the run; `resolved` holds the method's options and the radii as they were understood."""
        found = super().stored(trees=self.tree, epochs=self.passes, lr=self.rate, **resolved)
        # Without a teacher it is the run that it was before there were any.
        left_out = {"tree", "curvature", "option"} | ({"teacher"} if self.teacher is None else set())
        return {name: value for name, value in found.items() if name not in left_out}


FINETUNE = Command(
    "finetune",
    FinetuneSettings,
    "robustvlm.commands.finetune.work",
    doing="Fine-tuning",
    kept="the last checkpoint is kept",
    shares="every batch",
)


@mirrors(FINETUNE)
def finetune(model: str = "tiny", **options: Any) -> FinishedRun[TrainingSummary]:
    """Fine-tune a model against attacks, as `robustvlm finetune` does; options by their names.

    The folder of the run returned is a model spec, to be attacked, say.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> short = {"limit": 40, "val_limit": 4, "val_steps": 1, "inner_steps": 1, "steps": 1, "batch_size": 2}
        >>> finetune("tiny", method="tecoa", out=tempfile.mkdtemp(), **short).summary.steps
        1
    """
    return FINETUNE.start(model=model, **options)
