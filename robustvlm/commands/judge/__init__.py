"""`robustvlm judge`: what test-time defences are worth against attacks that know them, beside what was claimed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from robustvlm.runs.run import Command, mirrors
from robustvlm.runs.settings import Settings, Shared, argument, option, shown_as

if TYPE_CHECKING:
    from robustvlm.commands.judge.record import Judgement
    from robustvlm.runs.run import FinishedRun


class JudgeSettings(Settings):
    """Judge test-time defences: clean accuracy, and accuracy under attacks unaware of the defence, and through it.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same results.
    """

    group: ClassVar[str] = "Attack"

    model: str = argument(
        "tiny+clipure,tiny+bits:3",
        "Defended models, with commas between them: MODEL+DEFENCE[,MODEL+DEFENCE...]; `robustvlm models` lists the "
        "defences.",
        metavar="MODELS",
    )
    base: str | None = option(
        None,
        "The undefended model, where it cannot be told from the name, as of module:callable.",
        group="Model and data",
    )
    data: str = option("emoji", "The images; `robustvlm data` lists the forms.", group="Model and data")
    classes: Path | None = Shared.CLASSES
    templates: Path | None = Shared.TEMPLATES
    norm: str = option("Linf", "Linf or L2, in pixels scaled to [0, 1].")
    eps: str | float | None = option(None, "The radius [default: 4/255; L2: 0.5].", typed=str | None)
    steps: int = option(100, "Gradient steps of every attack.", at_least=1, at_most=10_000, ranged=True)
    queries: int = option(
        300, "Queries of Square on what is left; 0 to leave it out.", at_least=0, at_most=1_000_000, ranged=True
    )
    targets: int = option(
        9,
        "Wrong classes, the likeliest first, that APGD is aimed at where something is left; 0 to leave it out.",
        at_least=0,
        at_most=10_000,
        ranged=True,
    )
    limit: int = option(
        100,
        "Judge on this many images, chosen by a hash of their ids.",
        at_least=1,
        unit="images",
        group="Model and data",
    )
    seed: int = Shared.SEED
    lanes: int = option(
        32, "Images attacked side by side in one batch.", at_least=1, at_most=4096, ranged=True, group="Run"
    )
    eot: int | None = option(
        None, "Draws averaged in a gradient [default: what the defence declares; 1 if not random].", at_least=1
    )
    draws: int = option(
        21, "Fresh draws of a random model that judge a success by majority.", at_least=1, at_most=10_000, ranged=True
    )
    every_mode: bool = option(
        False, "Make every gradient mode on every image; else an image that one mode fooled leaves the later ones."
    )
    device: str = Shared.DEVICE
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    resume: bool | None = Shared.RESUME
    track: str | None = Shared.TRACK
    as_json: bool = shown_as(False, "Print the summary as JSON on standard output.", flags=("--json",))


JUDGE = Command(
    "judge", JudgeSettings, "robustvlm.commands.judge.work", doing="Judging", shares="the images", plain="end"
)


@mirrors(JUDGE)
def judge(model: str = "tiny+clipure,tiny+bits:3", **options: Any) -> FinishedRun[Judgement]:
    """Judge test-time defences, as `robustvlm judge` does; options by their names.

    Returns:
        The run: its `summary` has an entry for each defended model and for what it stands on, with every image's fate.

    Raises:
        UserError: whatever is wrong with the options, the data or the models.

    Example:
        >>> import tempfile
        >>> run = judge("tiny+bits:3", limit=2, steps=1, queries=0, out=tempfile.mkdtemp())
        >>> [found.spec for found in run.summary.models]
        ['tiny', 'tiny+bits:3']
    """
    return JUDGE.start(model=model, **options)
