"""`robustvlm attack`: how often attacks change what a model says, and how far that number can be believed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from robustvlm.core.size import Size, sides
from robustvlm.errors import BadSetting, UserError, nearest, setting
from robustvlm.runs.run import Command, mirrors
from robustvlm.runs.settings import Settings, Shared, option, shown_as, way
from robustvlm.runs.settings import argument as positional

if TYPE_CHECKING:
    from robustvlm.commands.attack.record import AttackedRun

MODES = ("full", "quick", "none")
"""What `checks` may be.

quick: questions to the model before the attacks (some 18 passes an image), and what the rows say after them. full: also
extra attacks on at most 32 images at the end.
"""

_MOST_DRAWS = 10_000
_MOST_LANES = 65_536
_LARGEST = 2**63 - 1


class AttackSettings(Settings):
    """Attack a model on labelled images and report the attack success rate (ASR) with its 95 % interval.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same results.
    """

    group: ClassVar[str] = "Attack"

    model: str | object = positional(
        "tiny",
        "tiny (bundled), NAME/PRETRAINED or NAME/FILE (open_clip), hf-hub:ORG/NAME, transformers:NAME, mllm:NAME, a "
        "folder, or module:callable (an encoder or a classifier); defences follow as +smooth:0.25 or +reject:0.5.",
        typed=str,
    )
    data: str | object = option(
        "emoji",
        "emoji (bundled), imagefolder:DIR, parquet:FILE, torchvision:NAME:ROOT, hf:NAME or wds:URL.",
        typed=str,
        group="Model and data",
    )
    classes: Path | None = Shared.CLASSES
    templates: Path | None = Shared.TEMPLATES
    tree: Path | None = Shared.TREE_FILE
    goal: str = option(
        "misclassify",
        "misclassify; superclass:LEVEL, :all (one perturbation for all levels) or :matrix; targeted:CLASS; deny, "
        "intrude (models that may refuse); feature, feature:FILE.png or feature:TEXT; unsay, unsay:features, say:TEXT, "
        "match:FILE.png or reword (models that answer in words; docs/mllm.md has their ways).",
    )
    min_cos: float = option(0.5, "--goal feature is reached below this cosine to the clean feature.")
    attack: str = option(
        "apgd-ce,apgd-t",
        "Attacks in order, each optionally with its own settings, e.g. apgd-ce,apgd-t or pgd:steps=40:objective=dlr; "
        "the plans standard, plus, rand and fare; torchattacks:NAME and autoattack[:VERSION] run those packages.",
    )
    second_opinion: str | None = option(
        None,
        "Let another program attack the images again that withstood, and report what only it breaks: autoattack, "
        "autoattack:plus, torchattacks:NAME.",
    )
    norm: str = option("Linf", "Linf or L2, in pixels scaled to [0, 1].")
    eps: str | float | None = option(
        None,
        "Radius, or radii for a security curve: 1/255,2/255 [default: 2/255; L2: 0.5].",
        typed=str | None,
    )
    steps: int | None = option(None, "Gradient steps [default: pgd 20, apgd 100].")
    restarts: int | None = option(None, "Random restarts [default: 1].")
    limit: int | None = option(None, "Attack this many images, chosen by a hash of their ids.", group="Model and data")
    seed: int = Shared.SEED
    lanes: int | None = option(None, "Images attacked side by side in one batch [default: 64; GPU: 256].", group="Run")
    device: str = Shared.DEVICE
    precision: str = option("fp32", "fp32; bf16 (gradients only, successes confirmed in fp32); fp64.", group="Run")
    eot: int | None = option(None, "Draws of a random model averaged in every gradient [default: 10; 1 if not random].")
    draws: int | None = option(
        None, "Fresh draws of a random model that judge a success by majority [default: 21; 1 if not random]."
    )
    compiled: bool = option(
        False,
        "Take gradients from a torch.compile'd copy; the plain model confirms.",
        flags=("--compile",),
        group="Run",
    )
    resolution: int | None = option(None, "Side in pixels of the image that is perturbed [default: the model's].")
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    resume: bool | None = Shared.RESUME
    track: str | None = Shared.TRACK
    budget: str | None = way(
        None,
        "Stop when it is spent, with bounds on what is not decided: 20000passes (over all sessions), 90s, "
        "10min or 2h (of this session). Repeat the command with more, or without, to go on.",
    )
    estimate: bool = shown_as(False, "Make the clean pass, say what the attacks will cost, and stop.", group="Run")
    save_adversarial: bool = option(False, "Keep every successful adversarial image (safetensors).", group="Output")
    checks: str = option(
        "full", "Checks of the evaluation itself: full (with extra attacks on 32 images), quick or none."
    )
    as_json: bool = Shared.SUMMARY_AS_JSON
    fail_if: list[str] | None = shown_as(
        None, "End with exit code 1 if this holds at any eps, e.g. 'asr>0.5' or 'robust_accuracy.low<30%'."
    )

    @model_validator(mode="after")
    def _possible(self) -> AttackSettings:
        """Refuse numbers that no run can have, and unknown modes; the words of attacks and goals are read later."""
        if self.lanes is not None and self.lanes < 1:
            raise BadSetting("lanes", "must be at least 1", got=self.lanes)
        if self.lanes is not None and self.lanes > _MOST_LANES:
            raise BadSetting("lanes", f"must be at most {_MOST_LANES:,} images in one batch", got=f"{self.lanes:,}")
        for name, count in (("eot", self.eot), ("draws", self.draws)):
            if count is not None and not 1 <= count <= _MOST_DRAWS:
                raise BadSetting(name, f"must be between 1 and {_MOST_DRAWS:,} draws of the model", got=f"{count:,}")
        if self.limit is not None and not 1 <= self.limit <= _LARGEST:
            raise BadSetting("limit", "must be at least 1 image, and less than 2^63", got=self.limit)
        if self.seed < 0:
            raise BadSetting("seed", "must not be negative", got=self.seed)
        if self.seed > _LARGEST:
            raise BadSetting("seed", "must be less than 2^63", got=self.seed)
        if self.resolution is not None and not all(8 <= side <= 4096 for side in sides(self.resolution)):
            raise BadSetting("resolution", "must be between 8 and 4096 pixels", got=self.resolution)
        if self.checks not in MODES:
            raise UserError(f"unknown {setting('checks')} '{self.checks}': {nearest(self.checks, MODES)}")
        for name, given in (("fail_if", self.fail_if), ("budget", self.budget), ("track", self.track)):
            if self.estimate and given:
                raise BadSetting(
                    "estimate", f"attacks nothing, so {setting(name)} would do nothing: leave one of the two out"
                )
        return self


class AttackPlan(AttackSettings):
    """Settings of which nothing is left to the program: what a run is made by.

    `radii` are the texts and values of `eps`, ascending; `eot_if_random` is the `eot` of a random model where none is
    given. `eot` and `draws` stay None where only the run finds out whether the model is random.
    """

    model: str
    data: str
    lanes: int
    resolution: Size  # type: ignore[assignment]  # which is asked for as the side of a square alone
    radii: list[tuple[str, float]]
    eot_if_random: int

    def stored(self, **resolved: Any) -> dict[str, Any]:
        """Return what defines the run, for the manifest and the default name."""
        radii = {"eps": [value for _, value in self.radii], "eps_text": [text for text, _ in self.radii]}
        found = super().stored(**radii, **resolved)
        del found["radii"]
        return found


ATTACK = Command(
    "attack",
    AttackSettings,
    "robustvlm.commands.attack.work",
    doing="Attacking",
    shares="the images; the progress shown is that of the first",
    plain="end",
)


@mirrors(ATTACK)
def attack(model: str | object = "tiny", **options: Any) -> AttackedRun:
    """Attack a model on labelled images, as `robustvlm attack` does; options by their names.

    In place of a spec, `model` may be a classifier of `load_classifier` or a module of yours from pixels to logits
    (with an `image_size`), and `data` a source of `open_data`; the record names them, with their fingerprints.

    Returns:
        The run: its `summary` with exact 95 % intervals, its `rows` (an Arrow table, one row an image, attack and
        eps), and where its `report` is.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> run = attack("tiny", attack="pgd", steps=2, limit=4, lanes=4, checks="none", out=tempfile.mkdtemp())
        >>> run.summary.images.evaluated, run.summary.at("2/255").robust_accuracy.total
        (4, 4)
    """
    found: AttackedRun = ATTACK.start(model=model, **options)  # type: ignore[assignment]
    return found
