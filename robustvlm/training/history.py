"""The record of a training: loss terms, validations, and early warnings when it goes wrong."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from robustvlm.stats import Mean, Rate

# The record of a training: loss terms, validations and warnings, as plain JSON


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepEntry(_Entry):
    """Means over the steps since the entry before: `step` steps have been made, `terms` are those of the loss."""

    step: int
    terms: dict[str, float]
    learning_rate: float
    gradient_norm: float


class Validation(_Entry):
    """Measures of the weights after `step` steps; `train_loss` is the mean since the validation before."""

    step: int
    measures: dict[str, Rate | Mean | float]
    train_loss: float | None = None

    def number(self, name: str) -> float | None:
        """Return a measure as a number, None if it was not taken or has no value.

        Example:
            >>> Validation(step=0, measures={"a": 0.5}).number("a")
            0.5
        """
        found = self.measures.get(name)
        return found if found is None or isinstance(found, float) else found.value


class Warned(_Entry):
    """Something that went wrong, and after how many steps it was noticed."""

    step: int
    name: str
    message: str


class Estimate(_Entry):
    """What training and its validations will cost, or what is left of it: passes count forward and backward."""

    steps: int
    passes: int
    seconds: float


class History(BaseModel):
    """All of it; `seconds` are those inside the steps, over all sessions."""

    model_config = ConfigDict(extra="forbid")

    steps: list[StepEntry] = []
    validations: list[Validation] = []
    warnings: list[Warned] = []
    estimate: Estimate | None = None
    best_step: int | None = None
    images: int = 0
    passes: int = 0
    seconds: float = 0.0
    validation_seconds: float = 0.0
    peak_memory: int = 0
    skipped: dict[str, str] = {}

    @property
    def images_per_second(self) -> float:
        """Training throughput, over all ranks."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def best(self) -> Validation | None:
        """Return the validation of the weights that were kept, the last one if none was better."""
        chosen = [found for found in self.validations if found.step == self.best_step]
        found = chosen or self.validations
        return found[-1] if found else None


# Early warnings: what a series of validations says when training goes wrong.
#
# The rules look at these measures, whatever a task measures beside them: "clean accuracy", "robust accuracy" (PGD of
# several steps), "FGSM accuracy" (one full step), "noise accuracy" (random perturbations of the same size), all on the
# same images, and "feature spread" (1 - the squared norm of the mean unit feature; 0 if all features are one). Rules
# that compare two accuracies are asked of at least 100 images.

CLEAN = "clean accuracy"
_LEAST_SPREAD = 0.01
_LEAST_IMAGES = 100
_MARGIN = 0.02
_FELL = 0.01


def warnings_of(validations: Sequence[Validation]) -> list[Warned]:
    """Return what the latest of the validations gives reason to warn of; the first is that of the untrained weights.

    Example:
        >>> from robustvlm.stats import rate
        >>> odd = Validation(step=5, measures={"FGSM accuracy": rate(10, 100), "robust accuracy": rate(40, 100)})
        >>> [warning.name for warning in warnings_of([odd])]
        ['gradient masking']
    """
    if not validations:
        return []
    step = validations[-1].step
    rules = {
        "constant features": _constant_features,
        "gradient masking": _masking,
        "useless gradients": _useless,
        "catastrophic overfitting": _catastrophic,
        "robust overfitting": _overfitting,
        "collapse": _collapse,
    }
    said = {name: rule(validations) for name, rule in rules.items()}
    return [Warned(step=step, name=name, message=message) for name, message in said.items() if message]


def _constant_features(validations: Sequence[Validation]) -> str | None:
    """Spread below 0.01, or below a twentieth of what it was before training."""
    first, now = validations[0].number("feature spread"), validations[-1].number("feature spread")
    if now is None or now >= max(_LEAST_SPREAD, 0.05 * (first or 0.0)):
        return None
    return f"all images get nearly the same feature (spread {now:.4f}): lower the learning rate"


def _counted(found: Validation, name: str) -> float | None:
    """Return an accuracy, None where too few images stand behind it to compare it with another."""
    measure = found.measures.get(name)
    return measure.value if isinstance(measure, Rate) and measure.total >= _LEAST_IMAGES else None


def _masking(validations: Sequence[Validation]) -> str | None:
    """One step fools 2 points more images than many steps do, which sound gradients do not allow."""
    fgsm, pgd = _counted(validations[-1], "FGSM accuracy"), _counted(validations[-1], "robust accuracy")
    if fgsm is None or pgd is None or pgd - fgsm <= _MARGIN:
        return None
    return (
        f"one large step (FGSM) leaves {fgsm:.1%} right, several small ones (PGD) leave {pgd:.1%}: the gradients "
        "mislead, so the robust accuracy is not to be believed; train with more inner steps"
    )


def _useless(validations: Sequence[Validation]) -> str | None:
    """PGD fools at most 1 point more images than noise of the same size."""
    pgd, noise = _counted(validations[-1], "robust accuracy"), _counted(validations[-1], "noise accuracy")
    if pgd is None or noise is None or noise - pgd > 0.01 or noise < 0.05:
        return None
    return (
        f"PGD leaves {pgd:.1%} right, random noise {noise:.1%}: either eps is too small to matter, or the gradients "
        "say nothing; attack the model with `--attack standard` before you believe it"
    )


def _catastrophic(validations: Sequence[Validation]) -> str | None:
    """PGD accuracy below half its best, FGSM accuracy within 5 points of its own (Wong et al. 2020, 2001.03994)."""
    pgd = [_counted(v, "robust accuracy") for v in validations]
    fgsm = [_counted(v, "FGSM accuracy") for v in validations]
    now, single = pgd[-1], fgsm[-1]
    if now is None or single is None or len(validations) < 2:
        return None
    best = max(value for value in pgd if value is not None)
    best_single = max(value for value in fgsm if value is not None)
    if now >= 0.5 * best or best < 0.1 or single < best_single - 0.05:
        return None
    return (
        f"accuracy under PGD fell from {best:.1%} to {now:.1%} while a single step still leaves {single:.1%}: "
        "train with more inner steps or a random start"
    )


def _overfitting(validations: Sequence[Validation]) -> str | None:
    """Robust accuracy below its best, beyond the best's own interval, twice running, while the training loss falls."""
    points = [(v, v.measures.get("robust accuracy")) for v in validations[1:]]
    rates = [(v, found) for v, found in points if isinstance(found, Rate) and found.value is not None]
    if len(rates) < 3:
        return None
    top, best = max(rates, key=lambda pair: pair[1].value or 0.0)
    later = [pair for pair in rates if pair[0].step > top.step][-2:]
    worse = [found for _, found in later if (found.value or 0.0) < min(best.low, (best.value or 0.0) - _FELL)]
    now = later[-1][0].train_loss if later else None
    if len(worse) < 2 or now is None or top.train_loss is None or now >= top.train_loss:
        return None
    return (
        f"robust accuracy was {best.value:.1%} after {top.step} steps and is {later[-1][1].value:.1%}, while the "
        "training loss goes on falling: the weights of the best validation are kept; stop earlier or augment more"
    )


def _collapse(validations: Sequence[Validation]) -> str | None:
    """Clean accuracy below a third of what it was before training."""
    first, now = _counted(validations[0], CLEAN), _counted(validations[-1], CLEAN)
    if first is None or now is None or len(validations) < 2 or now >= first / 3:
        return None
    return f"clean accuracy fell from {first:.1%} to {now:.1%}: lower the learning rate or eps"
