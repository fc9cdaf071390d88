"""`robustvlm build`: a whole pipeline from runs, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from robustvlm.runs.run import Command, FinishedRun, mirrors
from robustvlm.runs.settings import Settings, Shared, option, way

if TYPE_CHECKING:
    from robustvlm.commands.assemble.work import Pipeline


class BuildSettings(Settings):
    """Put a pipeline together: purifier, encoder, mapper, smoothing, immunised head; its folder is a model spec.

    The parts are copied, so that the folder can be moved and the runs deleted. Each part is checked against the model
    that it was made for.
    """

    group: ClassVar[str] = "Parts"

    encoder: str = option("tiny", "The encoder: any model without operators, such as the run of a fine-tuning.")
    purify: str | None = option(None, "A run of `robustvlm purify`: purifier and mapper.")
    smooth: str | None = option(
        None,
        "Noise level, samples, and the alpha at which the model abstains, SIGMA[:N0[:ALPHA[:vote]]], as 0.25:64:0.001.",
    )
    immunize: str | None = option(None, "A run of `robustvlm immunize`: adapter, head and thresholds.")
    accept_misfits: bool = option(False, "Put parts together that were made for other models.")
    # No part of what a pipeline is: it is copied, and only tried out there.
    device: str = way("auto", "auto, cpu, cuda, cuda:1, ...", group="Run")
    out: Path = Shared.OUT
    name: str | None = way(None, "Name of the pipeline [default: made from the settings].")
    fresh: bool = way(False, "Delete an earlier pipeline of that name.")


BUILD = Command("build", BuildSettings, "robustvlm.commands.assemble.work", loading="Reading the parts")


@mirrors(BUILD)
def build(encoder: str = "tiny", **options: Any) -> FinishedRun[Pipeline]:
    """Put a pipeline together, as `robustvlm build` does; options by their names. The run's folder is a model spec.

    Given again, it copies the parts anew.

    Raises:
        UserError: a part is missing, of another kind, or made for another model; nothing to build.

    Example:
        >>> import tempfile
        >>> build("tiny", smooth="0.25:8", out=tempfile.mkdtemp()).summary.parts
        ['encoder tiny', 'smoothing 0.25:8']
    """
    return BUILD.start(encoder=encoder, **options)
