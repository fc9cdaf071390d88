"""Attacks by name: what `--attack` accepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from robustvlm.attacks.apgd import APGD
from robustvlm.attacks.base import LaneAttack
from robustvlm.attacks.objectives import objective
from robustvlm.attacks.pgd import PGD
from robustvlm.errors import UserError, nearest

_FACTORIES: dict[str, Callable[[], LaneAttack]] = {
    "fgsm": lambda: PGD(name="fgsm", n_iter=1, random_start=False),
    "pgd": lambda: PGD(),
    "apgd-ce": lambda: APGD(name="apgd-ce", objective=objective("ce")),
    "apgd-dlr": lambda: APGD(name="apgd-dlr", objective=objective("dlr")),
    "apgd-t": lambda: APGD(name="apgd-t", objective=objective("dlr-t"), n_targets=9),
}
ATTACKS = tuple(_FACTORIES)

_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "steps": ("n_iter", int),
    "restarts": ("n_restarts", int),
    "targets": ("n_targets", int),
    "step_size": ("step_size", float),
    "objective": ("objective", objective),
}

# Beyond this a run would not end in a lifetime, and its tables would not fit into memory.
_MOST = 100_000


def parse_attacks(text: str, *, steps: int | None = None, restarts: int | None = None) -> list[LaneAttack]:
    """Return the attacks of a list such as `apgd-ce,apgd-t` or `pgd:steps=40:objective=margin`.

    `steps` and `restarts` apply to every attack that does not state its own.

    Raises:
        UserError: unknown attack or option, a value that does not fit, the same attack twice.

    Example:
        >>> [attack.name for attack in parse_attacks("apgd-ce,apgd-t", steps=20)]
        ['apgd-ce', 'apgd-t']
    """
    attacks = [_parse(part.strip(), steps, restarts) for part in text.split(",")]
    names = [attack.name for attack in attacks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"attack '{name}' stands twice in '{text}': name each attack once")
    return attacks


def _parse(text: str, steps: int | None, restarts: int | None) -> LaneAttack:
    name, *options = text.split(":")
    if name not in _FACTORIES:
        raise UserError(f"unknown attack '{name}': {nearest(name, ATTACKS)}")
    attack = _FACTORIES[name]()
    changes: dict[str, Any] = {"name": text}
    if steps is not None and name != "fgsm":
        changes["n_iter"] = steps
    if restarts is not None and name != "fgsm":
        changes["n_restarts"] = restarts
    for option in options:
        changes |= _option(attack, name, option)
    attack = dataclasses.replace(attack, **changes)
    _check(attack)
    return attack


def _option(attack: LaneAttack, name: str, text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    fields = {field.name for field in dataclasses.fields(attack)}
    known = [option for option, (field, _) in _OPTIONS.items() if field in fields]
    if key not in known or not equals:
        raise UserError(
            f"unknown option '{text}' of attack '{name}': expected key=value with key one of {', '.join(known)}"
        )
    field, convert = _OPTIONS[key]
    try:
        return {field: convert(value)}
    except ValueError:
        raise UserError(f"option '{text}' of attack '{name}': '{value}' is no number") from None


def _check(attack: LaneAttack) -> None:
    """Refuse settings under which an attack would do nothing or could not run."""
    for option, field in (("steps", "n_iter"), ("restarts", "n_restarts"), ("targets", "n_targets")):
        value = getattr(attack, field, None)
        if value is not None and not 1 <= value <= _MOST:
            raise UserError(f"attack '{attack.name}': {option} must be between 1 and {_MOST:,}, got {value:,}")
    step_size = getattr(attack, "step_size", None)
    if step_size is not None and not 0 < step_size < float("inf"):
        raise UserError(f"attack '{attack.name}': step_size must be positive, got {step_size}")
    targeted = getattr(attack, "n_targets", None) is not None
    if attack.objective.targeted != targeted:
        kind = "a targeted" if targeted else "an untargeted"
        raise UserError(f"attack '{attack.name}' needs {kind} objective, got '{attack.objective.name}'")
