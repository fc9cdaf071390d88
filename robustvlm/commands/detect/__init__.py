"""`robustvlm detect`: how well scores tell known from unknown images, clean and under attack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import model_validator

from robustvlm.errors import UserError, setting
from robustvlm.runs.run import Command, mirrors
from robustvlm.runs.settings import Settings, Shared, argument, option, shown_as, way

if TYPE_CHECKING:
    from robustvlm.commands.detect.view import DetectRecord

DEFAULT_KNOWN = "emoji"
DEFAULT_UNKNOWN = ("emoji?split=near", "emoji?split=far")
DEFAULT_FIT = "emoji?split=train&copies=2"
NO_FIT = "none"

# Options that the manifest holds under other names, or as what they mean.
_NOT_AS_GIVEN = {"id", "ood", "attack", "attack_scores", "norm", "eps", "attack_limit", "lanes"}
_OF_ATTACKS = ("attack_scores", "attack", "norm", "eps", "attack_limit", "lanes")


class DetectSettings(Settings):
    """Tell images of known classes from others by every score: AUROC, FPR95, AUPR with intervals; table and report.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same results.
    """

    group: ClassVar[str] = "Scores"

    model: str = argument(
        "tiny",
        "Any model (`robustvlm models` lists the forms); one that may refuse also shows its own acceptance score.",
    )
    id: str | None = option(
        None, "Images of the known classes [default: emoji].", metavar="DATA", group="Model and data"
    )
    ood: list[str] = option(
        [],
        "Images of no known class, as DATA or NAME=DATA; once for each set [default: near and far emoji].",
        metavar="DATA",
        group="Model and data",
    )
    fit: str | None = option(
        None,
        "Images of the known classes to learn from, or none [default: none; the training styles for the bundled data].",
        metavar="DATA",
        group="Model and data",
    )
    stream: str | None = option(
        None,
        "Unlabelled images, known and unknown, that came in before those that are judged; adaneg remembers them.",
        metavar="DATA",
        group="Model and data",
    )
    scores: str = option(
        "all",
        "all, or a list such as mcm,energy,knn (docs/detect.md lists them); own shows a model's own alone.",
    )
    words: Path | None = option(
        None, "File of words outside the known classes [default: the bundled class trees].", shown=False
    )
    oracle_words: bool = option(
        False,
        "Keep words that name a class of an unknown set: scores from words are then oracles, and the report says so.",
    )
    temperature: float = option(
        1.0, "Temperature of the scores from energies: they divide the logits by it; 1 is the model's own."
    )
    classes: Path | None = Shared.CLASSES
    templates: Path | None = Shared.TEMPLATES
    tree: Path | None = Shared.TREE_FILE
    limit: int | None = option(
        None,
        "Score this many images of each set, chosen by a hash of their ids.",
        at_least=2,
        unit="images",
        group="Model and data",
    )
    fit_limit: int | None = option(
        None, "Learn from this many images, chosen likewise.", at_least=2, unit="images", group="Model and data"
    )
    corrupt: str | None = option(
        None,
        "Also score the known images under common corruptions: all, or NAME[:SEVERITY] with commas between.",
        metavar="KINDS",
        group="Corruptions",
    )
    promise: str | None = option(
        None,
        "Also turn every score into a rule that answers only where it is right as often as this: 0.9, or 0.9:class for "
        "the answers of each class.",
        metavar="LEVEL[:class]",
    )
    draws: int = option(
        1000,
        "Bootstrap samples for intervals and comparisons.",
        at_least=100,
        at_most=100_000,
        unit="bootstrap samples",
    )
    seed: int = option(0, "Seed of every random draw.", at_least=0, group="Run")
    batch_size: int = way(64, "Images per encoder pass.", at_least=1, unit="images")
    device: str = Shared.DEVICE
    under_attack: bool = option(
        False, "Also attack the scores: unknown images to be accepted, known ones refused.", group="Attack"
    )
    attack_scores: str | None = option(
        None,
        "Scores to attack, and own for a model's own [default: own, mcm, energy, mahalanobis, as far as there].",
        group="Attack",
    )
    attack: str = option(
        "pgd,apgd-ce:steps=40",
        "Attacks of --under-attack; objectives do not matter, all climb the acceptance margin.",
        group="Attack",
    )
    norm: str = option("Linf", "Norm of the attacks: Linf or L2, in pixels scaled to [0, 1].", group="Attack")
    eps: str | float | None = option(
        None, "Radius of the attacks [default: 2/255; L2: 0.5].", typed=str | None, group="Attack"
    )
    attack_limit: int = option(64, "Images of each set that are attacked.", at_least=2, unit="images", group="Attack")
    lanes: int = option(64, "Images attacked side by side in one batch.", at_least=1, group="Attack")
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    resume: bool | None = Shared.RESUME
    track: str | None = Shared.TRACK
    as_json: bool = Shared.SUMMARY_AS_JSON
    fail_if: list[str] = shown_as(
        [],
        "End with exit code 1 if this holds, e.g. 'auroc:mcm@near<0.8' or 'fpr95.high>50%'; without :SCORE or @SET, if "
        "it holds for any.",
    )

    @model_validator(mode="after")
    def _together(self) -> DetectSettings:
        if self.id is not None and not self.ood:
            need = setting("ood", "DATA")
            raise UserError(f"unknown images are needed beside {setting('id')}: pass {need}, once for each set of them")
        if self.id is None and self.ood:
            need = setting("id", "DATA")
            raise UserError(f"{setting('ood')} says which images are unknown; pass {need} too, those of known classes")
        if not self.under_attack:
            self.require_usual(_OF_ATTACKS, f"is for {setting('under_attack')}: pass both")
        return self

    @property
    def known(self) -> str:
        """The data of known classes."""
        return DEFAULT_KNOWN if self.id is None else self.id

    @property
    def unknown(self) -> tuple[str, ...]:
        """The sets of unknown images, each `DATA` or `NAME=DATA`."""
        return DEFAULT_UNKNOWN if self.id is None else tuple(self.ood)

    @property
    def learnt_from(self) -> str | None:
        """The images to learn from; None for none. The bundled data brings its own."""
        if self.fit is None:
            return DEFAULT_FIT if self.id is None else None
        return None if self.fit == NO_FIT else self.fit

    def stored(self, **resolved: Any) -> dict[str, Any]:
        """Return what defines the run; sets, scores, words and attacks are resolved by the libraries that know them."""
        found = {name: value for name, value in super().stored().items() if name not in _NOT_AS_GIVEN}
        for later in ("corrupt", "stream", "promise"):
            if found[later] is None:
                del found[later]  # the run that it was before there were these
        return found | {"known": self.known, "fit": self.learnt_from} | resolved


DETECT = Command("detect", DetectSettings, "robustvlm.commands.detect.work", doing="Scoring", plain="begin")


@mirrors(DETECT)
def detect(model: str = "tiny", **options: Any) -> DetectRecord:
    """Score known and unknown images, clean and under attack, as `robustvlm detect` does; options by their names.

    It is what `robustvlm.detect` does when it is called; the run returned has the rows of all images too.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> run = detect("tiny", limit=8, scores="mcm", draws=100, fit="none", out=tempfile.mkdtemp())
        >>> [at.unknown for at in run.summary.scores[0].on]
        ['near', 'far']
    """
    return cast("DetectRecord", DETECT.start(model=model, **options))
