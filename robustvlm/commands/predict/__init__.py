"""`robustvlm predict`: what a model says of images, as it would be deployed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from robustvlm.errors import BadSetting, UserError, arguments_named, nearest, setting
from robustvlm.runs.run import Command
from robustvlm.runs.settings import Settings, Shared, argument, option, shown_as, way

if TYPE_CHECKING:
    from robustvlm.commands.predict.work import Predictions
    from robustvlm.defenses.classifier import Classifier

FORMATS = ("table", "csv", "json", "jsonl", "parquet")
_SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
STDOUT = "-"


class PredictSettings(Settings):
    """Say what is on images: class, confidence, or that the model refuses or abstains; the deployed model at work.

    The classes are those of --classes, else those that the model's folder knows, else those of --data.
    Nothing is written but the file of --to.
    Exit code 2 if no image could be read, or with --strict if one could not.
    """

    group: ClassVar[str] = "Answers"

    model: str = argument(..., "The model; `robustvlm models` lists the forms.")
    images: list[Any] = argument(
        [], "Files, folders or patterns; - for a list of paths on standard input.", metavar="IMAGES...", typed=list[str]
    )
    data: str | None = option(
        None, "The images of a data spec instead; `robustvlm data` lists the forms.", group="Model and data"
    )
    classes: Path | None = Shared.CLASSES
    templates: Path | None = Shared.TEMPLATES
    top: int = option(1, "Show this many of the likeliest classes.", at_least=1, ranged=True)
    alpha: float | None = option(
        None, "Of a smoothed model: abstain unless its draws decide the class at this probability of error."
    )
    limit: int | None = option(None, "Only this many images.", at_least=1, ranged=True, group="Model and data")
    seed: int = option(
        0, "Seed of a random model's draws; each image has its own.", at_least=0, ranged=True, group="Run"
    )
    batch_size: int = way(64, "Images per pass; a random model is asked one by one.", at_least=1, ranged=True)
    device: str = Shared.DEVICE
    format: str | None = way(
        None,
        "table, csv, json, jsonl or parquet; by default what the name of --to ends in, else table.",
        group="Output",
    )
    to: Path | None = way(
        None, "File to write, whole at the end; - is standard output, written as it comes.", group="Output"
    )
    strict: bool = shown_as(False, "End with exit code 2 if any image could not be read.")

    @model_validator(mode="after")
    def _sensible(self) -> PredictSettings:
        if bool(self.images) == (self.data is not None):
            much = "both were given" if self.images else "neither was given"
            raise UserError(f"the images are paths or {setting('data', 'SPEC')}, and {much}: give one of them")
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise BadSetting("alpha", "must lie between 0 and 1, as 0.001", got=self.alpha)
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"unknown format '{self.format}': {nearest(self.format, FORMATS)}")
        if self.to is not None and self.written_as == "table":
            raise UserError(
                f"a table is for the terminal: for a file pass {setting('format', 'csv')}, json, jsonl or parquet, or "
                f"a name that ends so, got '{self.to}'"
            )
        return self

    @property
    def written_as(self) -> str:
        """The format: as named, else by the ending of the file, else a table."""
        return self.format or _SUFFIXES.get("" if self.to is None else self.to.suffix.lower(), "table")

    @property
    def to_stdout(self) -> bool:
        """Whether standard output is for a machine to read."""
        return self.written_as != "table" and str(self.to or STDOUT) == STDOUT


PREDICT = Command("predict", PredictSettings, "robustvlm.commands.predict.work", doing="Predicting")


def predict(
    model: str | Classifier,
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    *,
    classes: Path | str | Sequence[str] | None = None,
    **options: Any,
) -> Predictions:
    """Return what a model says of images on the disk, as `robustvlm predict` does; options by their names.

    For tensors there is `classifier.predict(images)`.

    Args:
        model: any spec or folder, or a classifier, as `load_classifier` returns it, to be used again and again.
        images: files, folders or patterns; leave it out for `data="imagefolder:photos"` and the like.
        classes: a file of class names, or the names themselves; not needed for a model that knows its own, nor with
            data that has them.
        options: data, templates, top, alpha, limit, seed, batch_size, device; `to` and `format` write a file as well. A
            classifier that is given has its classes, templates and device already: these are refused beside it.

    Raises:
        UserError: wrong options, no classes, no image, or none that can be read.

    Example:
        >>> found = predict("tiny", data="emoji?split=near", limit=3, top=2, device="cpu")
        >>> len(found.classes), found.rejected, len(found[0].top)
        (3, [False, False, False], 2)
    """
    from robustvlm.commands.predict.work import predictions

    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    file: Path | None = None
    names: tuple[str, ...] | None = None
    if isinstance(classes, (str, Path)):
        file = Path(classes)
    elif classes is not None:
        names = tuple(classes)
    given = {name: value for name, value in options.items() if value is not None}
    spec = model if isinstance(model, str) else getattr(model, "spec", None)
    if not isinstance(spec, str):
        raise UserError(f"model must be a spec or what load_classifier returns, got a {type(model).__name__}")
    PredictSettings.require_for_callers({name: value for name, value in given.items() if name != "strict"})
    with arguments_named():
        settings = PredictSettings(model=spec, images=paths, classes=file, **given)
        if settings.to is None and settings.format not in (None, "table"):
            raise UserError(f"{setting('format')} is for a file: pass {setting('to', 'FILE')} as well")
        return predictions(settings, None if isinstance(model, str) else model, names)
