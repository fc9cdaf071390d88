"""`robustvlm soup`: the average of several fine-tuned models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from robustvlm.errors import UserError, nearest, setting
from robustvlm.runs.run import Command, FinishedRun, mirrors
from robustvlm.runs.settings import Settings, Shared, argument, option, shown_as, way

if TYPE_CHECKING:
    from robustvlm.commands.soup.work import Soup

METHODS = ("uniform", "greedy")
_OF_VAL = ("classes", "templates", "norm", "eps", "val_steps", "limit")
MEASURES = {"robust": "robust accuracy", "clean": "clean accuracy"}


class SoupSettings(Settings):
    """Average the weights of models that were fine-tuned from one; the run's folder is a model spec."""

    group: ClassVar[str] = "Soup"

    models: list[str] = argument(..., "Run folders, or specs, of one architecture.", metavar="RUN...")
    method: str = option("uniform", "uniform (the mean of all), or greedy (each stays only if it does not harm).")
    val: str | None = option(None, "Images to choose by and to measure on; greedy needs them.", group="Model and data")
    by: str = option("robust", "What greedy goes by: robust or clean accuracy.")
    classes: Path | None = Shared.CLASSES
    templates: Path | None = Shared.TEMPLATES
    norm: str = option("Linf", "Linf or L2, of the attack that measures.", group="Attack that measures")
    eps: str | float | None = option(
        None, "Its radius [default: 1/255; L2: 0.5].", typed=str | None, group="Attack that measures"
    )
    val_steps: int = option(10, "Its PGD steps.", at_least=1, ranged=True, group="Attack that measures")
    limit: int = option(
        512, "Measure on at most this many images.", at_least=1, unit="images", ranged=True, group="Model and data"
    )
    device: str = Shared.DEVICE
    out: Path = Shared.OUT
    name: str | None = way(None, "Name of the run [default: made from the settings].")
    fresh: bool = way(False, "Delete an earlier run of this name.")
    track: str | None = Shared.TRACK
    as_json: bool = shown_as(False, "Print the result as JSON.", flags=("--json",))

    @model_validator(mode="after")
    def _sensible(self) -> SoupSettings:
        if self.val is None:
            self.require_usual(_OF_VAL, f"is for {setting('val')}, and there is none")
        if len(self.models) < 2:
            raise UserError(f"a soup is made of at least 2 models, got {len(self.models)}")
        for what, value, known in (("method", self.method, METHODS), ("measure", self.by, tuple(MEASURES))):
            if value not in known:
                raise UserError(f"unknown {what} '{value}': {nearest(value, known)}")
        if self.method == "greedy" and self.val is None:
            raise UserError(
                f"a greedy soup is chosen on images: pass {setting('val', 'DATA')}, which none of the models was "
                "trained on"
            )
        if self.method != "greedy":
            self.require_usual(("by",), f"is for {setting('method', 'greedy')}: pass both")
        return self

    def stored(self, **resolved: Any) -> dict[str, Any]:
        """Return what defines the run; `resolved` holds norm, eps and device as they were understood."""
        found = super().stored(**resolved)
        return {"model": self.models[0], "data": found.pop("val"), **found}


SOUP = Command("soup", SoupSettings, "robustvlm.commands.soup.work")


@mirrors(SOUP)
def soup(models: Sequence[str], **options: Any) -> FinishedRun[Soup]:
    """Average the weights of models, as `robustvlm soup` does; options by their names. The run's folder is a model.

    Raises:
        UserError: fewer than two models, different architectures, greedy without images, or other wrong options.

    Example:
        >>> import tempfile
        >>> soup(["tiny", "tiny"], out=tempfile.mkdtemp()).summary.method
        'uniform'
    """
    return SOUP.start(models=[models] if isinstance(models, str) else list(models), **options)
