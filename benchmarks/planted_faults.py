"""Plants one fault at a time and shows which check of `robustvlm attack` notices it; sound models must raise none.

python -m benchmarks.planted_faults [--only NAME,...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from benchmarks.planted.data import write_folder
from robustvlm.commands.attack import attack
from robustvlm.errors import UserError
from robustvlm.runs.records import Check

_PLANTED = "benchmarks.planted.models:"
_ALARMS = ("warning", "fault")
_SEEDS = 3
_COUPLED = "depends on the other images in its batch"
"""What a run says that is refused for it; a refusal for any other reason notices no fault."""


@dataclass(frozen=True)
class Plant:
    """A fault, how it is run, and the check that has to notice it.

    Args:
        fault: the fault in words; model: the spec.
        check: name of the check; level: what it has to say; "refused" stands for a run that does not start.
        settings: of the run, beside the common ones.
    """

    fault: str
    model: str
    check: str
    level: str = "warning"
    settings: dict[str, Any] = field(default_factory=dict)


PLANTS = (
    Plant("pixels rounded, no gradient", "Rounded", "useful gradients"),
    Plant("pixels rounded; a random search knows no gradient", "Rounded", "black box against white box",
          settings={"attack": "pgd:steps=10,square:queries=300", "eps": "8/255"}),
    Plant("pixels rounded; plain grey would fool it", "Rounded", "huge radius"),
    Plant("purifier under no_grad, gradients straight through", "Detached", "gradient as stated"),
    Plant("half of the model hidden from the gradient", "HalfBlind", "gradient as stated"),
    Plant("gradient with its sign turned round", "Reversed", "gradient against noise"),
    Plant("gradient shattered by a fine ripple", "Shattered", "gradient as stated"),
    Plant("logits so small that L2 steps vanish", "Whispering", "gradient against noise",
          settings={"norm": "L2", "eps": "0.4"}),
    Plant("softmax probabilities instead of logits", "Probabilities", "logits"),
    Plant("saturated logits, cross-entropy only", "Saturated", "logits"),
    Plant("saturated logits, another loss attacked too", "Saturated", "logits", "note",
          settings={"attack": "pgd:steps=10,apgd-dlr:steps=10"}),
    Plant("random, one draw per gradient and judgement", "Noisy", "repeatable output",
          settings={"eot": 1, "draws": 1}),
    Plant("random, averaged and judged by majority", "Noisy", "repeatable output", "note",
          settings={"eot": 4, "draws": 5}),
    Plant("logits normalised over the batch", "BatchNormalised", "independent images", "refused"),
    Plant("made for pixels from 0 to 255", "Expects255", "input range", "fault"),
    Plant("made for normalised pixels", "ExpectsNormalised", "input range", "fault"),
    Plant("gradient lost beyond the trained distance", "Retrieving", "larger radius",
          settings={"attack": "apgd-ce:steps=10"}),
    Plant("gradient right on the 8-bit grid only", "Combed", "more steps", settings={"attack": "pgd:steps=10"}),
    Plant("gradient reversed on a model that noise fools", "Keyhole", "search at random", settings={"eps": "16/255"}),
    Plant("the same class for every image", "Constant", "huge radius"),
    Plant("NaN for some images", "Broken", "finite output", "fault"),
    Plant("an attack that hardly moves, on a model without defence", "tiny", "attack strength",
          settings={"data": "emoji", "limit": 24, "attack": "pgd:steps=2:step_size=1e-6", "checks": "quick"}),
    Plant("gradients in bf16", "linear", "unconfirmed successes", "note", settings={"precision": "bf16"}),
    Plant("pictures saved with 8 bits", "linear", "rounding to 8 bits", "note"),
)  # fmt: skip

# Specs that must raise no warning and no fault.
SOUND = (
    *(f"{_PLANTED}{kind}" for kind in ("Sound", "linear", "cnn")),
    "tiny",
)


def findings(model: str, photos: Path, **settings: Any) -> list[Check]:
    """Return all checks of a short attack run; a refusal of coupled images is a check of the level "refused".

    Raises:
        UserError: the run was refused for another reason.
    """
    data = settings.pop("data", f"imagefolder:{photos}")
    common: dict[str, Any] = {"attack": "pgd:steps=10", "eps": "4/255", "lanes": 32, "device": "cpu"}
    with tempfile.TemporaryDirectory() as out:
        try:
            run = attack(model=model, data=data, out=Path(out), **{**common, **settings})
            return list(run.summary.checks)
        except UserError as error:
            if _COUPLED not in str(error):
                raise
            # No level of a check: a run that is refused has no summary to hold one.
            return [Check.model_construct(name="independent images", level="refused", message=str(error))]


def notice(plant: Plant, photos: Path) -> tuple[bool, list[Check]]:
    """Return whether the check that should notice a fault does, and all alarms of the run."""
    model = plant.model if plant.model == "tiny" else _PLANTED + plant.model
    made = findings(model, photos, **plant.settings)
    hit = any((check.name, check.level) == (plant.check, plant.level) for check in made)
    return hit, [check for check in made if check.level in _ALARMS]


def rows_of_faults(plants: Sequence[Plant], photos: Path) -> Iterator[list[object]]:
    for plant in plants:
        hit, alarms = notice(plant, photos)
        others = ", ".join(sorted({check.name for check in alarms} - {plant.check}))
        yield [plant.fault, plant.check, plant.level, "yes" if hit else "**no**", others]


def rows_of_sound(photos: Path) -> Iterator[list[object]]:
    for model in SOUND:
        for seed in range(_SEEDS):
            data = {"data": "emoji", "limit": 32, "eps": "1/255"} if model == "tiny" else {}
            alarms = [
                f"{c.name}: {c.message}" for c in findings(model, photos, seed=seed, **data) if c.level in _ALARMS
            ]
            yield [model.rpartition(":")[2], seed, len(alarms), "; ".join(alarms)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; the exit code is 1 if a fault went unnoticed or a sound model raised an alarm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models to plant, comma-separated")
    options = parser.parse_args(arguments)
    only = set(filter(None, options.only.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        photos = write_folder(Path(folder) / "photos")
        faults = list(rows_of_faults([plant for plant in PLANTS if not only or plant.model in only], photos))
        print(markdown(["planted fault", "check", "level", "fired", "other alarms"], faults), flush=True)
        sound = [] if only else list(rows_of_sound(photos))
        if sound:
            print("\n" + markdown(["sound model", "seed", "alarms", "which"], sound))
    return int(any(row[3] != "yes" for row in faults) or any(row[2] for row in sound))


if __name__ == "__main__":
    sys.exit(main())
