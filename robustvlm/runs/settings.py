"""The options of a command, each written once for shell, Python and manifest, and what its run reports meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from robustvlm.errors import BadSetting, UserError, flag_of, nearest, setting

# An option of a command, written once: a flag of the command line, a Python argument, a field of the manifest

Place = Literal["config", "run", "terminal"]
"""What an option belongs to: what defines the run, how it is made, or what the command prints."""


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its type, default and help.

    Args:
        place: "config" for what decides results (and so the run's default name), "run" for ways to run, such as a
            folder, "terminal" for what only the command line has, such as --json.
        flags: as they are typed; by default `--` and the field's name.
        positional: an argument of the command line; metavar: what the help calls it.
        at_least, at_most: bounds of a number; unit: what is counted, for the message ("images").
        ranged: have the command line show the bounds and refuse by itself what lies outside.
        shown: whether the help shows the default; if not, the help text says what happens without the option.
        typed: the type on the command line, where it is narrower than in Python.
        given: the type in Python, where more is understood than is kept, such as "auto".
        group: the heading that the help puts it under, where it is not the usual one (`Settings.group_of`).
    """

    place: Place = "config"
    flags: tuple[str, ...] = ()
    positional: bool = False
    metavar: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    ranged: bool = False
    shown: bool = True
    typed: Any = None
    given: Any = None
    group: str | None = None

    def check(self, name: str, value: object) -> None:
        """Raise BadSetting where a number, or one of several, lies outside the bounds or is not finite."""
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            low, high = self.at_least, self.at_most
            if low is not None and not low <= number < float("inf"):
                raise BadSetting(name, f"must be at least {_written(low)}{self._unit(low)}", got=number)
            if high is not None and not number <= high:
                raise BadSetting(name, f"must be at most {_written(high)}{self._unit(high)}", got=number)

    def _unit(self, number: float) -> str:
        return "" if not self.unit else f" {self.unit.removesuffix('s') if number == 1 else self.unit}"


def option(default: Any, help: str, **facts: Any) -> Any:
    """Declare an option that defines the run: default and help here, the rest as in `Option`.

    Example:
        >>> class Cook(Settings):
        ...     minutes: int = option(10, "How long.", at_least=1)
        ...     out: Path = Shared.OUT
        >>> Cook(minutes=3).stored()
        {'minutes': 3}
        >>> Cook(minutes=0)
        Traceback (most recent call last):
        robustvlm.errors.BadSetting: minutes must be at least 1, got 0
    """
    return Field(default, description=help, json_schema_extra={"option": Option(**facts)})  # type: ignore[dict-item]


def argument(default: Any, help: str, **facts: Any) -> Any:
    """Declare an option that is given by its place on the command line; `...` for one that must be given."""
    return option(default, help, positional=True, **facts)


def way(default: Any, help: str, **facts: Any) -> Any:
    """Declare a way to run, which is no part of what defines the run."""
    return option(default, help, place="run", **facts)


def shown_as(default: Any, help: str, **facts: Any) -> Any:
    """Declare what only the command line has: how results are printed, and its exit code."""
    return option(default, help, place="terminal", **facts)


class Shared:
    """Options of several commands, each written once."""

    DEVICE = option("auto", "auto, cpu, cuda, cuda:1, ...", group="Run")
    CLASSES = option(None, "File of class names, one per line or a JSON list.", group="Model and data")
    TEMPLATES = option(None, "File of prompt templates, one per line with {}.", group="Model and data")
    TREE_FILE = option(None, "File of the class tree (JSON, YAML or CSV).", group="Model and data")
    SEED = option(0, "Seed of every random draw.", group="Run")
    OUT = way(Path("runs"), "Folder that holds the runs.")
    NAME = way(None, "Name of the run [default: made from the settings, so that they find it again].")
    RESUME = way(
        None,
        "Insist on an earlier run, or delete it. Default: continue if there is one.",
        flags=("--resume/--fresh",),
    )
    FRESH = way(False, "Delete an earlier run of this name first.")
    TRACK = way(
        None,
        "Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.",
        group="Output",
    )
    SUMMARY_AS_JSON = shown_as(False, "Print the summary as JSON on standard output.", flags=("--json",))
    RECORD_AS_JSON = shown_as(False, "Print the record as JSON on standard output.", flags=("--json",))


class Settings(BaseModel):
    """All options of a command, each written once, in the order of its help.

    A subclass has a field for each, made by `option`, `argument`, `way` or `shown_as`, or one of `Shared`; its `group`
    is the help's heading of what is peculiar to the command.
    Options that do not depend on the libraries behind a run are checked as the object is made; what needs those is
    checked as the run is opened.

    Raises:
        UserError: an option that is not known, of another type, or out of bounds; the text names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    group: ClassVar[str] = "Options"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _told(type(self), error) from None

    @model_validator(mode="before")
    @classmethod
    def _one_for_many(cls, values: Any) -> Any:
        """Take a single value for an option that may be repeated."""
        if not isinstance(values, Mapping):
            return values
        many = {name for name, field in cls.model_fields.items() if repeatable(field)}
        return {
            name: [value] if name in many and isinstance(value, str | int | float | Path) else value
            for name, value in values.items()
        }

    @model_validator(mode="after")
    def _within_bounds(self) -> Settings:
        for name, _, about in self.options():
            about.check(name, getattr(self, name))
        return self

    @classmethod
    def options(cls) -> Iterator[tuple[str, FieldInfo, Option]]:
        """Yield name, field and facts of every option, in order."""
        for name, field in cls.model_fields.items():
            extra = field.json_schema_extra
            yield name, field, extra["option"] if isinstance(extra, dict) else Option()  # type: ignore[misc]

    @classmethod
    def group_of(cls, about: Option) -> str:
        """Return the heading that the help puts an option under: its own, or the usual one of its place."""
        return about.group or {"config": cls.group, "run": "Run", "terminal": "Output"}[about.place]

    @classmethod
    def require_for_callers(cls, given: Mapping[str, Any]) -> None:
        """Refuse what a caller of the library gives and only the command line acts on, and contradictions.

        Raises:
            UserError: an option such as `estimate` or `fail_if`; `fresh` with `resume`.
        """
        only = [name for name, _, about in cls.options() if about.place == "terminal" and given.get(name)]
        if only:
            raise UserError(f"'{only[0]}' is for the command line: leave it out, and look at the run that is returned")
        if given.get("fresh") and given.get("resume"):
            raise UserError("fresh and resume contradict each other: give one of them")

    def stored(self, **resolved: Any) -> dict[str, Any]:
        """Return what defines the run, for the manifest and the default name; `resolved` are values settled later.

        Paths are stored as texts. A command whose manifest calls a setting by another name overrides this.
        """
        names = {name for name, _, about in self.options() if about.place == "config"}
        found = {name: _plain(value) for name, value in self.model_dump(include=names).items()}
        return found | resolved

    @property
    def fresh_or_resume(self) -> dict[str, bool]:
        """What the settings say of an earlier run of that name, as `Run.start` takes it."""
        again = getattr(self, "resume", None)
        return {"fresh": bool(getattr(self, "fresh", False)) or again is False, "resume": again is True}

    def require_none(self, names: tuple[str, ...], why: str) -> None:
        """Refuse options that would have no effect."""
        for name in names:
            if getattr(self, name) not in (None, []):
                raise UserError(f"{setting(name)} {why}")

    def require_usual(self, names: tuple[str, ...], why: str) -> None:
        """Refuse options that were changed from their defaults and would have no effect."""
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise UserError(f"{setting(name)} {why}")

    def require_only(self, names: tuple[str, ...], why: str, *, stands: Settings | None = None) -> None:
        """Refuse options that were changed and would have no effect: all of the run's but those named.

        ``stands`` are the settings that act in their place: an option that says the same as they do is no mistake.
        """
        usual = type(self)()
        harmless = (usual,) if stands is None else (usual, stands)
        for name, _, about in self.options():
            value = getattr(self, name)
            if about.place == "config" and name not in names and all(value != getattr(one, name) for one in harmless):
                raise UserError(f"{setting(name)} {why}")


def repeatable(field: FieldInfo) -> bool:
    """Whether an option takes several values."""
    kinds = (field.annotation, *get_args(field.annotation))
    return any(getattr(kind, "__origin__", None) is list for kind in kinds)


def flags_of(name: str, about: Option) -> tuple[str, ...]:
    """Return how an option is typed; nothing for an argument.

    Example:
        >>> flags_of("val_steps", Option()), flags_of("resume", Option(flags=("--resume/--fresh",)))
        (('--val-steps',), ('--resume/--fresh',))
    """
    return () if about.positional else about.flags or (flag_of(name),)


def _written(number: float) -> str:
    return f"{number:,.0f}" if number == round(number) else f"{number:g}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _told(settings: type[Settings], error: ValidationError) -> UserError:
    """Return the first thing that pydantic found wrong as the user's mistake that it is."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        known = [known for known, _, about in settings.options() if about.place != "terminal"]
        return UserError(f"there is no option '{name}': {nearest(name, known)}")
    if first["type"] == "missing":
        return UserError(f"{setting(name)} is missing: give it a value")
    said = first["msg"].removeprefix("Input ")
    return BadSetting(name, said[:1].lower() + said[1:], got=repr(first.get("input")))


# What a run of any kind reports while it works; the command line draws it, a library user may ignore it


class Observer:
    """Receives progress and does nothing with it; override what you want to show. Only rank 0's is told anything.

    Example:
        >>> class Lines(Observer):
        ...     def begin(self, title, total=None, done=0):
        ...         print(title, total)
        >>> Lines().begin("Encoding", 10)
        Encoding 10
        >>> Lines().advance()
    """

    def say(self, line: str) -> None:
        """Something that a reader wants to know, such as what the run will cost."""

    def warn(self, text: str) -> None:
        """Something goes wrong, and the run goes on."""

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """A stage begins, and the one before it has ended.

        Args:
            total: how many pieces of work it has (images, steps); None: not known.
            done: how many of them are known from an earlier session.
        """

    def advance(self, count: int = 1, **shown: str) -> None:
        """So many more pieces of the stage are done; `shown` are words beside its bar, by a key each replaces."""

    def passed(self, used: int, passes: int) -> None:
        """A batched pass was made with `used` occupied rows; `passes` counts encoder passes, forward and backward."""
