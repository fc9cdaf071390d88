"""Attacks by name: what `--attack` accepts.

| plan       | attacks, cheap ones first                                                            |
|------------|--------------------------------------------------------------------------------------|
| `standard` | AutoAttack: `apgd-ce`, `apgd-t`, `fab-t` (9 targets each), `square` (5000 queries)   |
| `plus`     | AutoAttack+: the same and `apgd-dlr` and `fab`; `apgd-ce` and these with 5 restarts  |
| `rand`     | AutoAttack for random models: `apgd-ce`, `apgd-dlr`, gradients averaged over 20 draws |
| `fare`     | the FARE protocol: `apgd-ce`, `apgd-t` (9 targets)                                   |

All with 100 iterations. AutoAttack: Croce & Hein 2020, arXiv 2003.01690; FARE: Schlarmann et al. 2024, arXiv
2402.12336. A plan is short for its list: images pass from one attack to the next as in any list, and each attack has
its own line in the report. With fewer than 10 classes there is one sub-run per wrong class.

Your own attack is named `module:callable[:key=value...]`. One of this package stands in a file of this folder and adds
itself to `ATTACKS`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

from robustvlm.attacks.base import ATTACKS, LaneAttack
from robustvlm.attacks.external.catalog import PACKAGES
from robustvlm.attacks.external.spec import ExternalAttack, is_external, parse_external
from robustvlm.attacks.options import MOST, check, options_of, read_option, require_once
from robustvlm.attacks.own import own_attack
from robustvlm.core.registry import load, names_a_callable
from robustvlm.errors import UserError

# An attack of a run: in lanes, or of a published package.
Attack: TypeAlias = LaneAttack | ExternalAttack


@dataclass(frozen=True)
class Plan:
    """A named list of attacks.

    Args:
        attacks: as `--attack` accepts them, the cheap ones first.
        eot: over how many draws of a random model gradients are to be averaged; a setting of the run, not of an attack.
    """

    attacks: tuple[str, ...]
    eot: int = 1


PLANS = {
    "standard": Plan(("apgd-ce", "apgd-t", "fab-t", "square")),
    "plus": Plan(("apgd-ce:restarts=5", "apgd-dlr:restarts=5", "apgd-t", "fab-t", "square", "fab:restarts=5")),
    "rand": Plan(("apgd-ce", "apgd-dlr"), eot=20),
    "fare": Plan(("apgd-ce", "apgd-t")),
}


def parse_attacks(text: str, *, steps: int | None = None, restarts: int | None = None) -> list[Attack]:
    """Return the attacks of a list such as `apgd-ce,apgd-t` or `pgd:steps=40:objective=margin`, plans expanded.

    `torchattacks:NAME` and `autoattack[:VERSION]` stand for attacks of those packages, which run beside ours.

    `steps` and `restarts` apply to every attack that does not state its own; `steps` only to attacks that follow
    gradients, as Square's budget is counted in `queries` (5000), which are no substitute for steps. Options of a plan
    go to the members that have them: `standard:steps=50`.

    Raises:
        UserError: unknown attack or option, a value that does not fit, the same attack twice.

    Example:
        >>> [attack.name for attack in parse_attacks("apgd-ce,apgd-t", steps=20)]
        ['apgd-ce', 'apgd-t']
        >>> [attack.name for attack in parse_attacks("fare:steps=50")]
        ['apgd-ce:steps=50', 'apgd-t:steps=50']
    """
    for option, value in (("--steps", steps), ("--restarts", restarts)):
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"{option} must be between 1 and {MOST:,}, got {value:,}")
    for part in text.split(","):
        require_once(part.strip())
    parts = [member for part in text.split(",") for member in _expand(part.strip())]
    attacks: list[Attack] = [
        parse_external(part, steps=steps, restarts=restarts) if is_external(part) else _parse(part, steps, restarts)
        for part in parts
    ]
    names = [attack.name for attack in attacks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"attack '{name}' stands twice in '{text}': name each attack once")
    return attacks


def recommended_eot(text: str) -> int:
    """Return over how many draws the plans named in an `--attack` text average a random model's gradients.

    Example:
        >>> recommended_eot("rand"), recommended_eot("standard")
        (20, 1)
    """
    plans = [PLANS[part.split(":")[0].strip()] for part in text.split(",") if part.split(":")[0].strip() in PLANS]
    return max((plan.eot for plan in plans), default=1)


def _expand(text: str) -> list[str]:
    """Return the members of a plan with its options given to those that have them; other texts unchanged."""
    name, *options = text.split(":")
    if name not in PLANS:
        return [text]
    members = list(PLANS[name].attacks)
    for option in options:
        key = option.partition("=")[0]
        takes = [key in options_of(ATTACKS[member.split(":")[0]]()) for member in members]
        if not any(takes):
            raise UserError(f"unknown option '{option}' of plan '{name}': none of {', '.join(members)} has it")
        members = [_with(member, option) if has else member for member, has in zip(members, takes, strict=True)]
    return members


def _with(member: str, option: str) -> str:
    """Return an attack's text with an option added, in place of the plan's own value for it."""
    key = option.partition("=")[0]
    return ":".join([part for part in member.split(":") if not part.startswith(f"{key}=")] + [option])


def _parse(text: str, steps: int | None, restarts: int | None) -> LaneAttack:
    name, *options = text.split(":")
    if name not in ATTACKS and options and "=" not in options[0] and names_a_callable(f"{name}:{options[0]}"):
        name, options = f"{name}:{options[0]}", options[1:]
    made = load(name, ATTACKS, "attack", also=(*PLANS, *PACKAGES))
    attack = made() if name in ATTACKS else own_attack(name, made)
    changes: dict[str, Any] = {"name": text}
    if steps is not None and name != "fgsm" and attack.uses_gradient:
        changes["n_iter"] = steps
    if restarts is not None and name != "fgsm":
        changes["n_restarts"] = restarts
    for option in options:
        changes |= read_option(attack, name, option)
    attack = dataclasses.replace(attack, **changes)
    check(attack)
    return attack
