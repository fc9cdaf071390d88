"""Options of attacks: `key=value` after an attack's name, declared on the attack's own fields.

A field `gamma: Annotated[float, Option("gamma", above=0)] = 0.05` makes `--attack mine:gamma=0.1` work. A subclass
that gives the field another default keeps the option.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from robustvlm.attacks.objectives import Objective, objective
from robustvlm.errors import UserError

if TYPE_CHECKING:
    from robustvlm.attacks.base import LaneAttack

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
