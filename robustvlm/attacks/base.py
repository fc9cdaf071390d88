"""The contract between an attack and the lanes that run it: its options, the job going in, the result coming out."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, get_args, get_origin

import torch
from torch import Tensor

from robustvlm.attacks.objectives import Objective, objective
from robustvlm.attacks.threat import ThreatModel
from robustvlm.core.registry import Table
from robustvlm.errors import UserError

# Options of attacks: `key=value` after an attack's name, declared on the attack's own fields.
#
# A field `gamma: Annotated[float, Option("gamma", above=0)] = 0.05` makes `--attack mine:gamma=0.1` work. A subclass
# that gives the field another default keeps the option.

# Beyond this a run would not end in a lifetime, and its tables would not fit into memory.
MOST = 100_000
# Points of one image that an attack may look at, over all steps, restarts and targets.
_MOST_POINTS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field of an attack is called on the command line, and which numbers make sense; None is always allowed.

    Args:
        name: as written before the "=".
        above: the value must be larger. least, most: the value must lie between them.
        why: what is so special about the least value, for the error.

    Example:
        >>> Option("p", above=0, most=1).problem(2.0)
        'must be above 0 and at most 1, got 2.0'
        >>> Option("steps", least=1, most=100_000).problem(0)
        'must be between 1 and 100,000, got 0'
    """

    name: str
    above: float | None = None
    least: float | None = None
    most: float | None = None
    why: str = ""

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a number; None if nothing is."""
        if value is None:
            return None
        if self.above is not None and not value > self.above:
            if self.most is not None and self.least is None:
                return f"must be above {self.above:g} and at most {self.most:,}, got {value}"
            return f"must be {'positive' if self.above == 0 else f'above {self.above:g}'}, got {value}"
        if self.least is not None and not self.least <= value <= (self.most if self.most is not None else value):
            why = f" ({self.why})" if self.why else ""
            most = "" if self.most is None else f" and {self.most:,}"
            shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
            return f"must be {'between' if most else 'at least'} {self.least:g}{why}{most}, got {shown}"
        if self.most is not None and not value <= self.most:
            bound = f"above {self.above:g} and " if self.above is not None else ""
            return f"must be {bound}at most {self.most:,}, got {value}"
        return None


@dataclasses.dataclass(frozen=True)
class _Known:
    """An option of an attack: the field behind it and the kind of its values."""

    field: str
    option: Option
    kind: Any

    def read(self, text: str) -> Any:
        """Return the value of a text; ValueError if it is none."""
        if self.kind is bool:
            return {"on": True, "off": False}[text]
        return objective(text) if self.kind is Objective else self.kind(text)

    @property
    def expected(self) -> str:
        named = {int: "a whole number", float: "a number", bool: "on or off", Objective: "an objective"}
        return named.get(self.kind, "another value")


def _known(attack: LaneAttack) -> dict[str, _Known]:
    """Return the options of an attack by name.

    The budget is called `queries` where no gradient is taken, `steps` elsewhere; untargeted attacks have no `targets`.
    """
    fields = {field.name for field in dataclasses.fields(attack)}
    found: dict[str, tuple[Option, Any]] = {}
    for kind in type(attack).__mro__:
        for name, hint in inspect.get_annotations(kind).items():
            if name in fields and name not in found:
                declared = _declared(hint, kind)
                if declared is not None:
                    found[name] = declared
    known = {}
    for name, (option, value) in sorted(found.items(), key=lambda item: item[0] == "objective"):
        if name == "n_targets" and getattr(attack, name) is None:
            continue
        shown = "queries" if option.name == "steps" and not attack.uses_gradient else option.name
        known[shown] = _Known(name, dataclasses.replace(option, name=shown), value)
    return known


def _declared(hint: Any, kind: type) -> tuple[Option, Any] | None:
    """Return the option that an annotation declares and the kind of its values, None for a field without one."""
    if isinstance(hint, str):
        try:
            hint = eval(hint, {**globals(), **vars(inspect.getmodule(kind) or object)})  # the class's own words
        except Exception:  # a name that only type checkers see
            return None
    if get_origin(hint) is not Annotated:
        return None
    value, *notes = get_args(hint)
    option = next((note for note in notes if isinstance(note, Option)), None)
    plain = [part for part in get_args(value) if part is not type(None)] or [value]
    return None if option is None else (option, plain[0])


def options_of(attack: LaneAttack) -> list[str]:
    """Return the names of the options that an attack has."""
    return list(_known(attack))


def read_option(attack: LaneAttack, name: str, text: str) -> dict[str, Any]:
    """Return the field and value that an option such as `steps=40` sets; a UserError says which options there are."""
    key, equals, value = text.partition("=")
    known = _known(attack)
    if key not in known or not equals:
        raise UserError(
            f"unknown option '{text}' of attack '{name}': expected key=value with key one of {', '.join(known)}"
        )
    try:
        return {known[key].field: known[key].read(value)}
    except (ValueError, KeyError):
        raise UserError(f"option '{text}' of attack '{name}': expected {known[key].expected}, got '{value}'") from None


def require_once(text: str) -> None:
    """Refuse an attack's text that sets an option twice: one of the two values would be dropped without a word."""
    keys = [option.partition("=")[0].strip() for option in text.split(":")[1:] if "=" in option]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"attack '{text}' sets {key} twice: leave one of them")


def check(attack: LaneAttack) -> None:
    """Refuse settings under which an attack would do nothing or could not run."""
    for name, known in _known(attack).items():
        problem = known.option.problem(getattr(attack, known.field)) if known.kind in (int, float) else None
        if problem is not None:
            raise UserError(f"attack '{attack.name}': {name} {problem}")
    points = attack.n_iter * attack.n_restarts * (getattr(attack, "n_targets", None) or 1)
    if points > _MOST_POINTS:
        budget = "steps" if attack.uses_gradient else "queries"
        raise UserError(
            f"attack '{attack.name}' would look at up to {points:,} points of every image: take fewer "
            f"{budget}, restarts or targets, for at most {_MOST_POINTS:,}"
        )
    targeted = getattr(attack, "n_targets", None) is not None
    if attack.objective.targeted != targeted:
        kind = "a targeted" if targeted else "an untargeted"
        raise UserError(f"attack '{attack.name}' needs {kind} objective, got '{attack.objective.name}'")


# The contract between an attack and the lanes that run it

# Everything an attack remembers of its lanes: named tensors with the lane as first dimension. "x0" is the clean
# image and "x" the point to evaluate next; the rest is the attack's own.
State = dict[str, Tensor]

DONE = "done"
# Where an attack looks which classes are within reach, the radius within which a lane's class is not, [L]; else 0.
BEYOND = "beyond"


@dataclass(frozen=True, kw_only=True)
class LaneAttack(ABC):
    """An iterative attack, written as two functions of per-lane state.

    A job (one image) consists of `n_runs` sub-runs (restarts or targets); a sub-run evaluates its start and then
    `n_iter` further points. The engine evaluates all lanes in one batched pass, records successes and the best
    iterate, and calls `advance`. Both functions must treat lanes independently of each other. Fields that a user may
    set are declared with `Option`; `docs/extend.md` shows a whole attack.
    """

    # False: the attack asks for losses only, and the engine makes forward passes; `grad` is then empty.
    uses_gradient: ClassVar[bool] = True
    # True: it walks along where the loss is zero, and takes its sign for success (see `Goal.boundary`).
    walks_boundary: ClassVar[bool] = False

    name: str
    n_iter: Annotated[int, Option("steps", least=1, most=MOST)]
    n_restarts: Annotated[int, Option("restarts", least=1, most=MOST)] = 1
    objective: Annotated[Objective, Option("objective")]

    def n_runs(self, n_classes: int) -> int:
        """Return how many sub-runs one image gets when the goal tells `n_classes` outcomes apart."""
        del n_classes
        return self.n_restarts

    def target_rank(self, run: int) -> int:
        """Return which of the job's target classes sub-run `run` aims at (0 = the likeliest wrong class)."""
        del run
        return 0

    @property
    def leaves_ball(self) -> bool:
        """Whether points outside the ball are asked about too; only those inside count as successes or best points."""
        return False

    def n_points(self) -> int:
        """Return how many points a sub-run evaluates at most, its start included."""
        return self.n_iter + 1

    def walk_points(self, run: int) -> int:
        """Return for how many points at most a sub-run may walk, from the image, to see whether its class is in reach.

        It ends once the class is shown not to be, and tells so under `BEYOND`; where an attack before has shown the
        same, only the first point is evaluated. 0: it makes no such walk.
        """
        del run
        return 0

    def exhaustive(self) -> LaneAttack:
        """Return the attack without early ends that are sound for the outcome but not for the worst margin met."""
        return self

    def for_random_model(self) -> LaneAttack:
        """Return the attack without shortcuts that only hold for models that answer the same question alike."""
        return self.exhaustive()

    def away_from_image(self) -> LaneAttack:
        """Return the attack for goals whose gradient vanishes at the image: one that never starts there."""
        return self

    def foresee(self, state: State, step: Tensor, threat: ThreatModel) -> Tensor | None:
        """Return the point after the one that follows `step` steps if no point from here on brings anything, [L, ...].

        Rows that would be paid for and not used look there. A point that the attack does not come to after all is
        forgotten, so a wrong guess changes nothing. None: most points bring something, and guesses would be in vain.
        """
        del state, step, threat
        return None

    @abstractmethod
    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        """Return the state of one lane (leading dimension 1) at the start of sub-run `run`, with "x0" and "x".

        Every random draw of the sub-run comes from `generator`; draws that later steps need are made here.
        """

    def told(self, state: State, job: Job) -> State:
        """Return the state of one lane at its start with what earlier attacks have found out about its image."""
        del job
        return state

    def rows_walking(self, state: State) -> Tensor | None:
        """Return which lanes walk along the boundary for now, bool [L]; None for an attack that never does.

        Their loss is the margin of their class, whatever the objective.
        """
        del state
        return None

    @abstractmethod
    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        """Return the next state, after `state["x"]` was evaluated to `loss` [L] and `grad` [L, C, H, W].

        Args:
            step: how many steps each lane's sub-run has made before this one, int64 [L].

        A bool tensor under `DONE` ends the sub-runs of the lanes where it is true.
        """


ATTACKS: Table[Callable[[], LaneAttack]] = Table(__package__)
"""How every attack of this package is made, by name: each adds itself in its own file."""


# What goes into the lanes and what comes out: one job and one result per image

FOOLED, ROBUST, FAILED = "fooled", "robust", "failed"

# Decoding and resizing in float32 may leave [0, 1] by this much.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Job:
    """One image to attack.

    Args:
        image_id: stable name; with the run's seed it determines every random draw made for this image.
        index: position in the data set, carried through to the result.
        pixels: clean image [3, H, W] in [0, 1]; excursions of a rounding error are clipped.
        label: true class; -1 when it is none of the classes.
        targets: classes for targeted sub-runs, the likeliest first.
        reference: what the goal has to know of the clean image (its feature), a vector [R], or None.
        beyond: classes that an earlier attack's walk has shown to be out of reach, each with the radius within which
            it is.
        reached: the lowest margin that earlier attacks have reached by gradients; infinite where none did.

    Raises:
        UserError: the pixels are no floats, or not in [0, 1].
    """

    image_id: str
    index: int
    pixels: Tensor = field(repr=False)
    label: int
    targets: tuple[int, ...] = ()
    reference: Tensor | None = field(default=None, repr=False)
    beyond: Mapping[int, float] = field(default_factory=dict, repr=False, compare=False)
    reached: float = field(default=float("inf"), repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.pixels.is_floating_point():
            raise UserError(f"image '{self.image_id}' has pixels of {self.pixels.dtype}: divide 8-bit images by 255")
        low, high = (float(bound) for bound in self.pixels.aminmax())
        if low >= 0 and high <= 1:
            return
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise UserError(
                f"image '{self.image_id}' has pixels from {low:.4g} to {high:.4g}, expected [0, 1]: divide 8-bit "
                "images by 255, and leave normalisation by mean and standard deviation to the model"
            )
        object.__setattr__(self, "pixels", self.pixels.clamp(0, 1))


@dataclass(frozen=True)
class Result:
    """The answer for one image.

    Args:
        outcome: "fooled" when the goal was reached, "robust", or "failed" when the model's output was not finite.
        prediction: class predicted at the recorded point; -1 for a rejected image.
        confidence: softmax probability of the leading class.
        margin: the goal's margin there; the lowest met unless the image was fooled at once.
        cosine: the cosine that a feature goal is about, there; None for other goals.
        steps: gradient steps made over all sub-runs.
        passes: encoder passes spent on this image, forward and backward counted as one each.
        run: sub-run (restart or target) that holds the recorded point.
        linf, l2: norms of the recorded perturbation in pixel units.
        seconds: the image's share of the wall time of the batches it rode in.
        adversarial: recorded point [3, H, W], the first success or the point of lowest margin.
        beyond: as in `Job`; what this attack has shown.
        attack: name of the attack.
    """

    job: Job
    outcome: str
    prediction: int
    confidence: float
    margin: float
    cosine: float | None
    steps: int
    passes: int
    run: int
    linf: float
    l2: float
    seconds: float
    adversarial: Tensor = field(repr=False)
    beyond: Mapping[int, float] = field(default_factory=dict, repr=False, compare=False)
    attack: str = ""
