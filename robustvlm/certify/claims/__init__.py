"""Certificates as claims: one frozen `Claim` object a file, found by name or as `module:callable`.

A claim says what a certificate states, how it is bounded, what it needs and refuses, what its tables are called and
what an audit attacks. `CLAIMS` has the built-in ones; docs/certify.md adds one in 30 lines.

Example:
    >>> sorted(CLAIMS)
    ['class', 'feature', 'openset', 'vote']
    >>> find_claim("vote").columns
    ('radius', 'deployed_radius')
"""

from __future__ import annotations

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
from robustvlm.certify.claims.openset import OPENSET
from robustvlm.certify.claims.own import is_own, load_own, own_digest
from robustvlm.certify.claims.vote import VOTE
from robustvlm.errors import UserError, nearest

CLAIMS: dict[str, Claim] = {claim.name: claim for claim in (FEATURE, CLASS, VOTE, OPENSET)}
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


__all__ = [
    "CLAIMS",
    "DEFAULT",
    "DEFAULT_KEPT",
    "RADII",
    "Asked",
    "Claim",
    "ClaimFacts",
    "Given",
    "Materials",
    "Plan",
    "Quantity",
    "find_claim",
    "is_own",
    "make_plan",
    "own_digest",
    "pilot_size",
    "require_known",
    "require_possible",
    "sampling_of",
    "upper_mean",
]
