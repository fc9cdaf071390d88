"""Attacks by name: what `--attack` accepts, plans of several, and attacks of the user's own.

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

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from robustvlm.attacks.base import ATTACKS, MOST, LaneAttack, State, check, options_of, read_option, require_once
from robustvlm.attacks.external import ExternalAttack, parse_external
from robustvlm.attacks.goals import Goal, Misclassify
from robustvlm.attacks.threat import NORMS, ThreatModel, lengths
from robustvlm.core import registry
from robustvlm.core.registry import load, names_a_callable
from robustvlm.core.user_code import no_exit
from robustvlm.errors import UserError
from robustvlm.text import one_line

# The user's own attack, named `module:callable`: tried out before a run, and watched during it

_EPS, _STEPS = 0.25, 3


def is_foreign(thing: object) -> bool:
    """Whether an object's class is not of this package, so that its promises are checked.

    Example:
        >>> from robustvlm.attacks.pgd import PGD
        >>> is_foreign(PGD())
        False
    """
    return type(thing).__module__.partition(".")[0] != __name__.partition(".")[0]


def by_gradients(attack: object, goal: Goal) -> bool:
    """Whether the margins that an attack leads to are what gradients can do, in the units of the margin of logits.

    It is one of this package that follows gradients, and the goal is the plain one: a search without gradients is then
    told of them (`Job.reached`).

    Example:
        >>> [by_gradients(attack, Misclassify()) for attack in parse_attacks("apgd-ce,square")]
        [True, False]
    """
    ours = isinstance(attack, LaneAttack) and attack.uses_gradient and not is_foreign(attack)
    return ours and type(goal) is Misclassify


def own_attack(spec: str, make: object) -> LaneAttack:
    """Return the attack that a user's callable makes, after a few steps of two lanes on made-up losses.

    Raises:
        UserError: it fails, makes no attack, or does not keep the contract of `LaneAttack`.
    """
    made = registry.call(spec, make, "an attack")
    attack: LaneAttack = registry.expect(
        spec, made, LaneAttack, "an attack", ("name", "n_iter", "objective", "begin", "advance")
    )
    problems = [problem for problem in (_try_out(spec, attack, norm) for norm in NORMS) if problem is not None]
    if len(problems) == len(NORMS):  # one may know a single norm, and says so when it is asked for the other
        raise UserError(problems[0])
    return attack


def _try_out(spec: str, attack: LaneAttack, norm: str) -> str | None:
    """Walk two lanes together and one of them alone; say what is wrong, None if nothing is."""
    threat = ThreatModel(norm, _EPS)
    x0 = torch.linspace(0.1, 0.9, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    grad = torch.sin(torch.arange(x0.numel(), dtype=torch.float32)).view_as(x0)
    loss = torch.tensor([-0.5, -0.25])
    try:
        with no_exit(f"the attack '{spec}'"):
            begun = [begin(attack, image[None], threat, _draws(row), 0) for row, image in enumerate(x0)]
            both = {name: torch.cat([state[name] for state in begun]) for name in begun[0]}
            alone = begun[0]
            for step in range(_STEPS):
                both = advance(attack, both, loss, _given(attack, grad), torch.full((2,), step), threat)
                alone = advance(attack, alone, loss[:1], _given(attack, grad[:1]), torch.full((1,), step), threat)
    except UserError as error:
        return str(error)
    except Exception as error:  # the user's attack may fail in any way
        return f"'{spec}': the attack failed in a trial ({norm}): {type(error).__name__}: {one_line(error)}"
    if not torch.equal(both["x"][:1], alone["x"]):
        return f"'{spec}': the first lane goes elsewhere with another beside it: advance must treat lanes on their own"
    return None


def _draws(row: int) -> torch.Generator:
    return torch.Generator().manual_seed(row)


def _given(attack: LaneAttack, grad: Tensor) -> Tensor:
    return grad if attack.uses_gradient else grad[:0]


def begin(attack: LaneAttack, x0: Tensor, threat: ThreatModel, draws: torch.Generator, run: int) -> State:
    """Return the state at the start of a sub-run; a user's attack must start inside the ball, on an image as given.

    Raises:
        UserError: the user's attack does not keep its contract.
    """
    state = attack.begin(x0, threat, draws, run)
    if not is_foreign(attack):
        return state
    _require_state(attack, state, x0)
    x = state["x"]
    length = float(lengths(x.double() - x0.double(), threat.norm))
    if length > threat.eps or float(x.min()) < 0 or float(x.max()) > 1:
        raise UserError(
            f"attack '{attack.name}' must begin inside the ball and in [0, 1]: its first point lies {length:.6g} from "
            f"the image ({threat.norm}), the radius is {threat.eps:.6g}; `project` brings it there"
        )
    if not torch.equal(state["x0"], x0):
        raise UserError(f"attack '{attack.name}' changed the clean image: leave x0 as begin gets it")
    return state


def advance(attack: LaneAttack, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
    """Return the state after a step; of a user's attack, one that can be asked about.

    Raises:
        UserError: the user's attack does not keep its contract.
    """
    if not is_foreign(attack):
        return attack.advance(state, loss, grad, step, threat)
    x0 = state["x0"].clone()
    found = attack.advance(state, loss, grad, step, threat)
    _require_state(attack, found, x0)
    if not torch.equal(found["x0"], x0):
        raise UserError(f"attack '{attack.name}' changed the clean images: leave x0 as it is")
    return found


def _require_state(attack: LaneAttack, state: object, x0: Tensor) -> None:
    wanted = f"attack '{attack.name}' must return a state: a dict of tensors with the lanes first"
    if not isinstance(state, dict) or not {"x0", "x"} <= state.keys():
        raise UserError(f"{wanted}, among them x0 and x; got {_seen(state)}")
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(x0):
            raise UserError(f"{wanted} ({len(x0)} here), got {name}: {_seen(value)}")
    x = state["x"]
    if x.shape != x0.shape or x.dtype != x0.dtype or not x.isfinite().all():
        kept = "finite pixels" if x.shape == x0.shape and x.dtype == x0.dtype else f"{x0.dtype} {list(x0.shape)}"
        raise UserError(f"attack '{attack.name}': x must be {kept}, got {_seen(x)}")


def _seen(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}" + ("" if value.isfinite().all() else " with NaN or infinite values")
    if isinstance(value, dict):
        return "a dict of " + (", ".join(map(str, value)) or "nothing")
    return f"a {type(value).__name__}"


# Attacks by name: what `--attack` accepts

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


# How names of published attacks begin.
PACKAGES = ("torchattacks", "autoattack")


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


def is_external(text: str) -> bool:
    """Whether a name on the command line means an attack of a published package.

    Example:
        >>> is_external("torchattacks:PGD"), is_external("autoattack"), is_external("pgd")
        (True, True, False)
    """
    return text.strip().split(":")[0].lower() in PACKAGES


def parse_second_opinion(text: str) -> ExternalAttack:
    """Return the published attack that is to go over the images that ours have left, with its own settings.

    Example:
        >>> parse_second_opinion("autoattack").kind
        'standard'
    """
    if not is_external(text) or "," in text:
        raise UserError(
            f"the second opinion must come from one attack of another program, got '{text}': "
            "pass autoattack, autoattack:plus, torchattacks:NAME, ..."
        )
    return parse_external(text)


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
