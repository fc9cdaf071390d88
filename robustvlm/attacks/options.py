"""Options of attacks: `key=value` after an attack's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from robustvlm.attacks.base import LaneAttack
from robustvlm.attacks.objectives import objective
from robustvlm.errors import UserError


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError
    return text == "on"


# Option: field, how its text is read, what it must be.
_OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "steps": ("n_iter", int, "a whole number"),
    "queries": ("n_iter", int, "a whole number"),
    "restarts": ("n_restarts", int, "a whole number"),
    "targets": ("n_targets", int, "a whole number"),
    "step_size": ("step_size", float, "a number"),
    "p_init": ("p_init", float, "a number"),
    "objective": ("objective", objective, "an objective"),
    "futility": ("futility", _switch, "on or off"),
}

# Beyond this a run would not end in a lifetime, and its tables would not fit into memory.
MOST = 100_000
_SMALLEST_STEP = 1e-7
# Points of one image that an attack may look at, over all steps, restarts and targets.
_MOST_POINTS = 1_000_000


def options_of(attack: LaneAttack) -> list[str]:
    """Return the names of the options that an attack has.

    The budget is called `queries` where no gradient is taken, `steps` elsewhere; untargeted attacks have no `targets`.
    """
    fields = {field.name for field in dataclasses.fields(attack)}
    foreign = {"queries" if attack.uses_gradient else "steps"}
    if getattr(attack, "n_targets", None) is None:
        foreign.add("targets")
    return [option for option, (field, _, _) in _OPTIONS.items() if field in fields and option not in foreign]


def read_option(attack: LaneAttack, name: str, text: str) -> dict[str, Any]:
    """Return the field and value that an option such as `steps=40` sets; a UserError says which options there are."""
    key, equals, value = text.partition("=")
    known = options_of(attack)
    if key not in known or not equals:
        raise UserError(
            f"unknown option '{text}' of attack '{name}': expected key=value with key one of {', '.join(known)}"
        )
    field, convert, expected = _OPTIONS[key]
    try:
        return {field: convert(value)}
    except ValueError:
        raise UserError(f"option '{text}' of attack '{name}': expected {expected}, got '{value}'") from None


def require_once(text: str) -> None:
    """Refuse an attack's text that sets an option twice: one of the two values would be dropped without a word."""
    keys = [option.partition("=")[0].strip() for option in text.split(":")[1:] if "=" in option]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"attack '{text}' sets {key} twice: leave one of them")


def check(attack: LaneAttack) -> None:
    """Refuse settings under which an attack would do nothing or could not run."""
    budget = "steps" if attack.uses_gradient else "queries"
    for option, field in ((budget, "n_iter"), ("restarts", "n_restarts"), ("targets", "n_targets")):
        value = getattr(attack, field, None)
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"attack '{attack.name}': {option} must be between 1 and {MOST:,}, got {value:,}")
    points = attack.n_iter * attack.n_restarts * (getattr(attack, "n_targets", None) or 1)
    if points > _MOST_POINTS:
        raise UserError(
            f"attack '{attack.name}' would look at up to {points:,} points of every image: take fewer "
            f"{budget}, restarts or targets, for at most {_MOST_POINTS:,}"
        )
    step_size = getattr(attack, "step_size", None)
    if step_size is not None and not step_size > 0:
        raise UserError(f"attack '{attack.name}': step_size must be positive, got {step_size}")
    if step_size is not None and not _SMALLEST_STEP <= step_size <= MOST:
        raise UserError(
            f"attack '{attack.name}': step_size must be between {_SMALLEST_STEP:g} (the least to move a bright pixel "
            f"in float32) and {MOST:,}, got {step_size:g}"
        )
    p_init = getattr(attack, "p_init", None)
    if p_init is not None and not 0 < p_init <= 1:
        raise UserError(f"attack '{attack.name}': p_init must be above 0 and at most 1, got {p_init}")
    targeted = getattr(attack, "n_targets", None) is not None
    if attack.objective.targeted != targeted:
        kind = "a targeted" if targeted else "an untargeted"
        raise UserError(f"attack '{attack.name}' needs {kind} objective, got '{attack.objective.name}'")
