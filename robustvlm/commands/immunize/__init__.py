"""`robustvlm immunize`: from class names and some images to a model that says "I don't know"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, ValidationInfo, field_validator, model_validator

from robustvlm.core import LAMBDA_INF
from robustvlm.errors import BadSetting, UserError, nearest, setting
from robustvlm.runs.run import Command, FinishedRun, mirrors
from robustvlm.runs.settings import Settings, Shared, argument, option, way

if TYPE_CHECKING:
    from robustvlm.commands.immunize.record import ImmunizeSummary

NOISE_DRAWS = 64
"""Noisy copies of an image from which thresholds behind noise are set."""


class ImmunizeSettings(Settings):
    """Immunise a model: prototypes, antibodies, a vaccinated adapter, thresholds; the run's folder is a model spec.

    `attack`, `certify`, `evaluate` and `detect` take the folder: it answers with a class or rejects.
    """

    model_config = ConfigDict(validate_default=True)

    group: ClassVar[str] = "Prototypes and adapter"

    model: str = argument("tiny", "Any model without smoothing; with --add-class, a run.")
    data: str = option(
        "emoji?split=train", "Labelled images to learn from; `robustvlm data` lists the forms.", group="Model and data"
    )
    held_out: str | float = option(
        None,
        "Data, or a share of --data, that sets the thresholds [default: emoji?split=val&copies=8 for the bundled data, "
        "else 0.2].",
        typed=str | None,
        given=str | float | None,
        group="Model and data",
    )
    classes: Path | None = Shared.CLASSES
    templates: Path | None = Shared.TEMPLATES
    tree: Path | None = option(None, "Class tree: superclasses are no antibodies.", group="Model and data")
    no_images: bool = option(
        False, "From texts alone: no adapter; thresholds at 0 without --calibrate.", group="Model and data"
    )
    calibrate: str | None = option(
        None,
        "With --no-images: labelled images of known classes that set score and thresholds.",
        metavar="DATA",
        group="Model and data",
    )
    shots: int = option(
        0, "Images of each class to learn from; 0 for all.", at_least=0, ranged=True, group="Model and data"
    )
    antibodies: str = option(
        "bank", "bank (bundled), a file, llm, wordnet, noise (baseline), none.", group="Antibodies"
    )
    llm: str | None = way(
        None,
        "OpenAI-compatible endpoint, as http://localhost:11434/v1; the key is read from ROBUSTVLM_LLM_KEY or "
        "OPENAI_API_KEY.",
        metavar="URL",
        group="Antibodies",
    )
    llm_model: str | None = way(None, "Model to ask at that endpoint.", metavar="NAME", group="Antibodies")
    llm_prices: str | None = way(
        None, "Price of a million tokens, to show what was spent.", metavar="IN,OUT", group="Antibodies"
    )
    xi: float | None = option(
        "auto",
        "Largest angle of a prototype to its text, degrees; auto: an eighth of the median.",
        typed=str,
        given=str | float | None,
        at_least=0,
        at_most=180,
        unit="degrees",
    )
    prototypes_per_class: int = option(1, "Prototypes of each class.", at_least=1)
    band: tuple[float | None, float | None] = option(
        None,
        "Cosines SAFE,RISK that antibodies lie between; either may be auto [default: auto,auto].",
        typed=str | None,
        given=str | None,
        group="Antibodies",
    )
    margin: float | None = option(
        "0.2",
        "Cosine of image and antibody above which they are pushed apart; auto takes it from the data.",
        typed=str,
        given=str | float | None,
        group="Antibodies",
    )
    push_weight: float = option(1.0, "Weight of pushing from antibodies (lambda).", group="Antibodies")
    push_nearest: int = option(
        10, "Push an image from so many of its nearest antibodies; 0 for all.", at_least=0, group="Antibodies"
    )
    mix_weight: float = option(
        0.0,
        "Weight of being unsure between images and antibodies (MixOE); 0 for none.",
        at_least=0,
        group="Antibodies",
    )
    rule: str = option(
        "hinge",
        "Score: hinge, the largest cosine less what an antibody near the image takes off, its weight chosen on the "
        "held-out images; or s-dis, with --lambda-inf.",
        group="Antibodies",
    )
    lambda_inf: float = option(
        LAMBDA_INF, "Weight of antibodies in S_DIS (--rule s-dis).", at_least=0, group="Antibodies"
    )
    kappa: str = option("model", "Concentration in training: model (its temperature) or class (vMF estimates).")
    miss: float = option(0.05, "Share of known images, classified right, that thresholds reject.", group="Thresholds")
    min_images: int = option(
        30, "Held-out images, classified right, that a threshold of its own needs.", at_least=1, group="Thresholds"
    )
    thresholds: str = option(
        "equal-miss",
        "equal-miss, density (classes of few images by the names around theirs), pooled (one), or least-fpr.",
        group="Thresholds",
    )
    tail: float | None = option(
        "auto",
        "Share of the scores, the lowest, that thresholds are fitted to; auto: a fifth, and at least 20 images.",
        typed=str,
        given=str | float | None,
        group="Thresholds",
    )
    sigma: list[float] = option(
        [], "Also set thresholds behind noise, for certify and +smooth; repeatable.", group="Thresholds"
    )
    hidden: int = option(128, "Width of the adapter.")
    steps: int = option(400, "Training steps of the adapter, at most; 0 for none.", at_least=0, ranged=True)
    lr: float = option(3e-4, "Learning rate of the adapter.")
    decay: float = option(0.1, "Weight of ||theta||^2 (eta).")
    ood: list[str] = option(
        [], "Unknown images to measure on, DATA or NAME=DATA; may be repeated.", group="Measured on"
    )
    oracle_words: bool = option(
        False,
        "Keep antibodies that name a class of an --ood set: figures on it are then those of an oracle, and say so.",
        group="Measured on",
    )
    near_names: Path | None = option(
        None, "File of names of near things, to measure the antibodies' coverage.", group="Measured on"
    )
    add_class: str | None = option(
        None,
        "Add this class to the run MODEL, from its images in --data; the result is a new run.",
        metavar="NAME",
        group="Model and data",
    )
    seed: int = Shared.SEED
    device: str = Shared.DEVICE
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    fresh: bool = Shared.FRESH
    track: str | None = Shared.TRACK
    as_json: bool = Shared.RECORD_AS_JSON

    @field_validator("held_out", mode="before")
    @classmethod
    def _data_or_share(cls, value: Any, info: ValidationInfo) -> Any:
        data = str(info.data.get("data", ""))
        if value is None:
            labels = "&labels=all" if "labels=all" in data else ""
            return f"emoji?split=val&copies=8{labels}" if data.partition("?")[0] == "emoji" else 0.2
        try:
            return float(value)
        except (TypeError, ValueError):
            return value

    @field_validator("antibodies", mode="after")
    @classmethod
    def _a_source(cls, text: str) -> str:
        """Take a file without `file:`."""
        if text in ("bank", "wordnet", "llm", "noise", "none") or text.startswith("file:"):
            return text
        return f"file:{text}" if Path(text).suffix or Path(text).exists() else text

    @field_validator("xi", "margin", "tail", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any, info: ValidationInfo) -> Any:
        return _number(str(info.field_name), value)

    @field_validator("band", mode="before")
    @classmethod
    def _two_cosines(cls, value: Any) -> Any:
        parts = [None, None] if value is None else value.split(",") if isinstance(value, str) else list(value)
        if len(parts) != 2:
            raise BadSetting("band", "takes two cosines SAFE,RISK, as 0.3,0.8 or auto,0.8", got=f"'{value}'")
        return tuple(_number("band", part) for part in parts)

    @field_validator("sigma", mode="after")
    @classmethod
    def _in_order(cls, values: list[float]) -> list[float]:
        return sorted(set(values))

    @model_validator(mode="after")
    def _sensible(self) -> ImmunizeSettings:
        if not 0.0 < self.miss < 0.5:
            raise BadSetting("miss", "must lie between 0 and 0.5, as 0.05 does", got=f"{self.miss:g}")
        for sigma in self.sigma:
            if not 0.0 < sigma <= 10.0:
                raise BadSetting("sigma", "must be above 0 and at most 10, as 0.25 is", got=f"{sigma:g}")
        for name, known in (("rule", RULES), ("thresholds", THRESHOLDS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"unknown {setting(name)} '{getattr(self, name)}': {nearest(getattr(self, name), known)}"
                )
        if self.tail is not None and not self.miss < self.tail < 1.0:
            raise BadSetting("tail", f"must lie between the miss ({self.miss:g}) and 1, as 0.2", got=f"{self.tail:g}")
        if self.rule != "s-dis" and self.lambda_inf != LAMBDA_INF:
            raise UserError(f"{setting('lambda_inf')} is the weight of S_DIS: pass {setting('rule', 's-dis')} with it")
        if self.mix_weight and (self.no_images or self.antibodies == "none" or not self.steps):
            raise UserError(
                f"{setting('mix_weight')} trains an adapter between images and antibodies, and here there are no "
                "images, no antibodies or no training steps: leave it out"
            )
        if self.calibrate is not None and not self.no_images:
            raise UserError(
                f"{setting('calibrate')} is for a model without images ({setting('no_images', True)}); otherwise "
                f"{setting('held_out')} sets score and thresholds"
            )
        if isinstance(self.held_out, float) and not 0.0 < self.held_out < 1.0:
            raise BadSetting("held_out", "takes data or a share between 0 and 1", got=f"{self.held_out:g}")
        if not self.no_images:
            return self
        if self.antibodies in ("none", "noise"):
            raise UserError(
                f"without images, antibodies alone tell the unknown, and {setting('antibodies', self.antibodies)} has "
                "none that mean anything: pass bank, a file, llm or wordnet"
            )
        if self.sigma or self.ood or self.shots or self.prototypes_per_class > 1:
            named = ", ".join(map(setting, ("sigma", "ood", "shots")))
            raise UserError(
                f"{named} and {setting('prototypes_per_class')} need images: leave out {setting('no_images', True)}"
            )
        return self

    def stored(self, **resolved: Any) -> dict[str, Any]:
        """Return what defines the run, under the names of the method."""
        named = {new: getattr(self, old) for old, new in _NAMES.items()}
        named |= {"images": not self.no_images, "shots": self.shots or None, "llm": self.llm_model}
        named |= {"safe": self.band[0], "risk": self.band[1], "noise_draws": NOISE_DRAWS}
        found = super().stored(**(named | resolved))
        gone = (*_NAMES, "no_images", "band")
        # What runs of before did without saying so is still not said: they are found again under their names.
        return {
            name: value
            for name, value in found.items()
            if name not in gone and not (name in _BEFORE and value == _BEFORE[name])
        }

    @classmethod
    def of(cls, config: Mapping[str, Any], **changes: Any) -> ImmunizeSettings:
        """Return the settings of a run by what its manifest holds, some of them changed; the inverse of `stored`.

        Example:
            >>> few = ImmunizeSettings(shots=4, band="auto,0.5", sigma=0.1)
            >>> ImmunizeSettings.of(few.stored()) == few
            True
        """
        config = _BEFORE | dict(config)
        named = {old: config[new] for old, new in _NAMES.items()}
        named |= {"no_images": not config["images"], "shots": config["shots"] or 0, "llm_model": config["llm"]}
        named |= {"band": (config["safe"], config["risk"])}
        gone = (*_NAMES.values(), "images", "llm", "safe", "risk", "noise_draws")
        kept = {name: value for name, value in config.items() if name not in gone}
        return cls(**(kept | named | changes))


_NAMES = {"prototypes_per_class": "per_class", "lambda_inf": "weight", "sigma": "sigmas"}
"""What manifests call some of the options."""
RULES = ("hinge", "s-dis")
THRESHOLDS = ("equal-miss", "density", "pooled", "least-fpr")
_BEFORE: dict[str, Any] = {
    "calibrate": None, "rule": "s-dis", "push_nearest": 0, "mix_weight": 0.0, "thresholds": "equal-miss", "tail": 0.5
}  # fmt: skip
"""What a manifest means that says nothing of these: there was no choice then."""


def _number(name: str, value: Any) -> Any:
    text = value.strip() if isinstance(value, str) else value
    if text == "auto":
        return None
    try:
        return None if text is None else float(text)
    except (TypeError, ValueError):
        raise BadSetting(name, "takes a number or auto", got=f"'{value}'") from None


IMMUNIZE = Command(
    "immunize",
    ImmunizeSettings,
    "robustvlm.commands.immunize.work",
    doing="Immunising",
    kept="the images' features are kept",
)


@mirrors(IMMUNIZE)
def immunize(model: str = "tiny", **options: Any) -> FinishedRun[ImmunizeSummary]:
    """Immunise a model, as `robustvlm immunize` does; options by their names. The run's folder is a model spec.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> few = {"data": "emoji?split=train&styles=noto,fxemoji&copies=1", "steps": 10, "min_images": 5}
        >>> len(immunize("tiny", out=tempfile.mkdtemp(), **few).summary.classes)
        101
    """
    return IMMUNIZE.start(model=model, **options)
