"""`robustvlm tune-prompts`: prompts learnt from a few images a class, the encoders untouched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from robustvlm.errors import UserError, setting
from robustvlm.runs.run import Command, FinishedRun, mirrors
from robustvlm.runs.settings import Settings, Shared, argument, option

if TYPE_CHECKING:
    from robustvlm.commands.prompts.work import PromptRecord


class PromptSettings(Settings):
    """Learn context vectors in front of the class names from a few images a class; the run's folder is a model spec."""

    group: ClassVar[str] = "Prompts"

    model: str = argument(
        "tiny",
        "An open_clip model, one of yours on MiniLM, or a folder on one; it stays as it is.",
    )
    data: str = option(
        "emoji?split=train&copies=1",
        "Labelled images to learn from; `robustvlm data` lists the forms.",
        group="Model and data",
    )
    classes: Path | None = Shared.CLASSES
    val: str | None = option(
        None, "Images of the same classes to measure on, another style say.", group="Model and data"
    )
    ood: list[str] = option(
        [], "Unknown images to tell from those of --val, as DATA or NAME=DATA; may be repeated.", group="Model and data"
    )
    shots: int = option(
        16, "Images of each class to learn from; 0 for all.", at_least=0, ranged=True, group="Model and data"
    )
    context: int = option(4, "Number of context vectors (M).", at_least=1)
    start: str = option("a picture of a", "Words that the context begins as.")
    epochs: int = option(10, "Passes over the features.")
    batch_size: int = option(256, "Features per step.")
    lr: float = option(0.01, "Peak learning rate (Adam, cosine).")
    lambda_ebm: float = option(10.0, "Weight of the energy term.")
    ebm: bool = option(True, "With the EBM terms, or CoOp without them.")
    lapt: bool = option(
        False, "LAPT instead: a second context is learnt for words outside the classes, for detect --scores lapt."
    )
    words: Path | None = option(
        None, "File of words outside the classes, for --lapt [default: the bundled class trees].", shown=False
    )
    c: int = option(2, "Largest cosines that the energy change as a score resets.", at_least=1)
    seed: int = Shared.SEED
    device: str = Shared.DEVICE
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    fresh: bool = Shared.FRESH
    track: str | None = Shared.TRACK
    as_json: bool = Shared.RECORD_AS_JSON

    @property
    def energy_weight(self) -> float | None:
        """Lambda of the energy term; None for CoOp and LAPT, without the EBM terms."""
        return self.lambda_ebm if self.ebm and not self.lapt else None

    @model_validator(mode="after")
    def _something_to_compare(self) -> PromptSettings:
        if self.ood and self.val is None:
            raise UserError(
                f"{setting('ood')} compares unknown images with known ones: pass {setting('val', 'DATA')} with known "
                "images too"
            )
        if self.words is not None and not self.lapt:
            raise UserError(f"{setting('words')} are for {setting('lapt')}: pass both")
        if self.lapt:
            self.require_usual(("ebm", "lambda_ebm", "c"), f"is of energy terms, which {setting('lapt')} has none of")
        if not self.ebm:
            self.require_usual(("lambda_ebm",), "is the weight of the EBM terms, and there are none: leave it out")
        return self

    def stored(self, **resolved: Any) -> dict[str, Any]:
        """Return what defines the run: no weight without the energy term, None for all images, c under its role."""
        energies = {} if self.lapt else {"n_reset": self.c}
        named = {"shots": self.shots or None, "energy_weight": self.energy_weight, **energies}
        found = super().stored(**named, **resolved)
        left = ("lambda_ebm", "ebm", "c") if self.lapt else ("lambda_ebm", "ebm", "c", "lapt", "words")
        return {name: value for name, value in found.items() if name not in left}


TUNE_PROMPTS = Command("tune-prompts", PromptSettings, "robustvlm.commands.prompts.work")


@mirrors(TUNE_PROMPTS)
def tune_prompts(model: str = "tiny", **options: Any) -> FinishedRun[PromptRecord]:
    """Learn prompts for a model, as `robustvlm tune-prompts` does; options by their names. The folder is a model spec.

    Raises:
        UserError: whatever is wrong with the options, the data or the model; a loss that is not finite.

    Example:
        >>> import tempfile
        >>> few = {"data": "emoji?split=train&styles=noto&copies=1", "epochs": 1, "shots": 1}
        >>> tune_prompts("tiny", out=tempfile.mkdtemp(), **few).summary.images
        101
    """
    return TUNE_PROMPTS.start(model=model, **options)
