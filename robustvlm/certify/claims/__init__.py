"""Certificates as claims: one frozen `Claim` object a file, found by name or as `module:callable`.

A claim says what a certificate states, how it is bounded, what it needs and refuses, what its tables are called and
what an audit attacks. `CLAIMS` has the built-in ones; docs/certify.md adds one in 30 lines.

Example:
    >>> sorted(CLAIMS)
    ['class', 'feature', 'joint', 'named', 'open-vote', 'openset', 'recall', 'tokens', 'topk', 'vote']
    >>> find_claim("vote").columns[:2]
    ('radius', 'deployed_radius')
"""

import inspect
import sys
from dataclasses import fields

from robustvlm.certify.claims.base import (
    RADII,
    Asked,
    Claim,
    ClaimFacts,
    Given,
    Materials,
    Plan,
    Quantity,
    pilot_size,
    require_possible,
    sampling_of,
    upper_mean,
)
from robustvlm.certify.claims.class_ import CLASS
from robustvlm.certify.claims.feature import FEATURE
from robustvlm.certify.claims.joint import JOINT
from robustvlm.certify.claims.openset import OPENSET
from robustvlm.certify.claims.recall import RECALL
from robustvlm.certify.claims.tokens import TOKENS
from robustvlm.certify.claims.topk import TOPK
from robustvlm.certify.claims.vote import NAMED, OPEN_VOTE, VOTE
from robustvlm.certify.noise import settings_digest
from robustvlm.certify.record import OWN
from robustvlm.core import registry
from robustvlm.core.user_code import code_is_refused
from robustvlm.errors import UserError, nearest

_BUILT_IN = (FEATURE, JOINT, TOKENS, CLASS, VOTE, OPENSET, TOPK, RECALL, NAMED, OPEN_VOTE)
CLAIMS: dict[str, Claim] = {claim.name: claim for claim in _BUILT_IN}
"""The built-in claims by name."""

DEFAULT, DEFAULT_KEPT = FEATURE.name, CLASS.name
"""The claim that a command means without naming one: of new samples, and of kept features."""


def require_known(name: str) -> str:
    """Return the name of a claim that there is, or that has the form of `module:callable`; nothing is imported.

    Raises:
        UserError: it is neither.

    Example:
        >>> require_known("clas")
        Traceback (most recent call last):
        robustvlm.errors.UserError: unknown claim 'clas': did you mean 'class'?
    """
    if name not in CLAIMS and not is_own(name):
        raise UserError(f"unknown claim '{name}': {nearest(name, CLAIMS)}")
    return name


def find_claim(name: str) -> Claim:
    """Return a claim by its name; user code is imported for one that is named `module:callable`.

    Raises:
        UserError: there is no such claim, its code is refused or fails, or it is none.
    """
    return CLAIMS[name] if require_known(name) in CLAIMS else load_own(name)


def make_plan(name: str, asked: Asked, materials: Materials) -> Plan:
    """Return the plan of the claim `name` under the settings of a run.

    Raises:
        UserError: as `find_claim`, or an own claim returns something else.
    """
    plan: object = find_claim(name).plan(asked, materials)
    if not isinstance(plan, Plan):
        raise UserError(f"the claim '{name}' must return a Plan, its plan() returned a {type(plan).__name__}")
    return plan


# Claims of the user's own, named `module:callable` wherever a built-in name stands

_own: dict[str, Claim] = {}


def is_own(spec: str) -> bool:
    """Whether a claim's name has the form of `module:callable`; nothing is imported.

    Example:
        >>> is_own("my_claims:half"), is_own("class"), is_own("class:")
        (True, False, False)
    """
    return OWN.fullmatch(spec) is not None


def load_own(spec: str) -> Claim:
    """Return the claim that a `module:callable` names: a `Claim`, or what a callable without arguments returns.

    The module is imported, and announced where a file names it, once in a process.

    Raises:
        UserError: code is refused (`--no-code`), the import fails, or what it gives is no claim.
    """
    if spec not in _own or code_is_refused():
        target = registry.resolve(spec)
        if not isinstance(target, Claim) and callable(target):
            target = registry.call(spec, target, "a claim")
        if not isinstance(target, Claim):
            wanted = "expected a robustvlm.certify.claims.Claim or a callable that returns one"
            raise UserError(f"'{spec}' is no claim: {wanted}, got a {type(target).__name__}")
        _own[spec] = target
    return _own[spec]


def own_digest(spec: str) -> str:
    """Return the digest of what an own claim is: the source of its module and its fields.

    A run is continued, and its noise repeated, only for an equal one. Modules that it imports are not looked into.
    """
    claim, module = load_own(spec), sys.modules[spec.partition(":")[0]]
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):  # compiled, or made in memory
        source = module.__name__
    plain = {part.name: getattr(claim, part.name) for part in fields(claim)}
    told = {name: value for name, value in plain.items() if isinstance(value, (str, int, float, tuple, type(None)))}
    return settings_digest(spec, source, repr(sorted(told.items())))


__all__ = [
    "CLAIMS", "DEFAULT", "DEFAULT_KEPT", "JOINT", "RADII", "Asked", "Claim", "ClaimFacts", "Given", "Materials", "Plan",
    "Quantity", "find_claim", "is_own", "make_plan", "own_digest", "pilot_size", "require_known", "require_possible",
    "sampling_of", "upper_mean",
]  # fmt: skip
