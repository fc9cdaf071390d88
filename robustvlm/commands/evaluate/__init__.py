"""`robustvlm evaluate`: clean accuracy, calibration and superclass accuracy of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustvlm.errors import arguments_named
from robustvlm.runs.run import Command, mirrors
from robustvlm.runs.settings import Observer, Settings, Shared, argument, option, shown_as

if TYPE_CHECKING:
    from robustvlm.commands.evaluate.work import CleanResult


class EvaluateSettings(Settings):
    """Measure clean zero-shot accuracy with its 95 % interval, calibration error, and accuracy per tree level."""

    model: str = argument("tiny", "The model; `robustvlm models` lists the forms.")
    data: str = option("emoji", "The images; `robustvlm data` lists the forms.", group="Model and data")
    classes: Path | None = Shared.CLASSES
    templates: Path | None = Shared.TEMPLATES
    tree: Path | None = Shared.TREE_FILE
    limit: int | None = option(
        None,
        "Evaluate this many images, a fixed selection.",
        at_least=1,
        unit="images",
        ranged=True,
        group="Model and data",
    )
    batch_size: int = option(64, "Images per pass.", at_least=1, unit="images", ranged=True, group="Run")
    device: str = Shared.DEVICE
    as_json: bool = shown_as(False, "Print the numbers as JSON.", flags=("--json",))


EVALUATE = Command("evaluate", EvaluateSettings, "robustvlm.commands.evaluate.work")


@mirrors(EVALUATE)
def evaluate(model: str = "tiny", *, observer: Observer | None = None, **options: Any) -> CleanResult:
    """Evaluate a model without an attack, as `robustvlm evaluate` does; options by their names. It makes no run.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> evaluate("tiny", limit=8).images
        8
    """
    from robustvlm.commands.evaluate.work import measure

    EvaluateSettings.require_for_callers(options)
    with arguments_named():
        return measure(EvaluateSettings(model=model, **options), observer)
