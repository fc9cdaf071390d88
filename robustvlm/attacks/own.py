"""The user's own attack, named `module:callable`: tried out before a run, and watched during it."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.attacks.base import LaneAttack, State
from robustvlm.attacks.boundary import lengths
from robustvlm.attacks.threat import NORMS, ThreatModel
from robustvlm.core import registry
from robustvlm.core.foreign_text import one_line
from robustvlm.core.user_code import no_exit
from robustvlm.errors import UserError

_EPS, _STEPS = 0.25, 3


def is_foreign(thing: object) -> bool:
    """Whether an object's class is not of this package, so that its promises are checked.

    Example:
        >>> from robustvlm.attacks.pgd import PGD
        >>> is_foreign(PGD())
        False
    """
    return type(thing).__module__.partition(".")[0] != __name__.partition(".")[0]


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
