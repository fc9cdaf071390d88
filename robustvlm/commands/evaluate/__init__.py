"""`robustvlm evaluate`: accuracy, calibration, superclasses, subgroups and retrieval of a model that nobody attacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from robustvlm.runs.run import Command, mirrors
from robustvlm.runs.settings import Observer, Settings, Shared, argument, option

if TYPE_CHECKING:
    from robustvlm.commands.evaluate.view import Evaluation


class EvaluateSettings(Settings):
    """Measure a model without an attack: top-1 and top-5 accuracy, mean per-class recall, calibration, superclasses.

    Where the data tell subgroups also how evenly it does over them, and with captions recall at 1, 5 and 10 both ways.
    """

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
    corrupt: str | None = option(
        None,
        "Also under common corruptions: all, or NAME[:SEVERITY] with commas between, as fog:3,snow; severities 1 to 5.",
        metavar="KINDS",
        group="Corruptions",
    )
    batch_size: int = option(64, "Images per pass.", at_least=1, unit="images", ranged=True, group="Run")
    device: str = Shared.DEVICE
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    resume: bool | None = Shared.RESUME
    track: str | None = Shared.TRACK
    as_json: bool = Shared.SUMMARY_AS_JSON

    def stored(self, **resolved: Any) -> dict[str, Any]:
        """Return what defines the run; without corruptions it is the run that it was before there were any."""
        found = super().stored(**resolved)
        return {name: value for name, value in found.items() if name != "corrupt" or value is not None}


EVALUATE = Command(
    "evaluate",
    EvaluateSettings,
    "robustvlm.commands.evaluate.work",
    doing="Evaluating",
    kept="every batch so far is kept",
)


@mirrors(EVALUATE)
def evaluate(model: str = "tiny", *, observer: Observer | None = None, **options: Any) -> Evaluation:
    """Evaluate a model without an attack, as `robustvlm evaluate` does; options by their names.

    The run that is returned has the numbers of its summary as attributes too, as `run.accuracy`.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> run = evaluate("tiny", limit=8, out=tempfile.mkdtemp())
        >>> run.images, run.rows.num_rows
        (8, 8)
    """
    return cast("Evaluation", EVALUATE.start(model=model, observer=observer, **options))
