"""A claim of the user's own, named `module:callable` wherever a built-in name stands."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

from robustvlm.certify.claims.base import Claim
from robustvlm.certify.noise import settings_digest
from robustvlm.certify.record import OWN
from robustvlm.core.user_code import code_is_refused, import_user_module, no_exit
from robustvlm.errors import UserError, nearest
from robustvlm.text import one_line


@dataclass(frozen=True)
class _Loaded:
    claim: Claim
    module: ModuleType = field(repr=False)


_loaded: dict[str, _Loaded] = {}


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
    if spec not in _loaded or code_is_refused():
        module = _imported(spec)
        _loaded[spec] = _Loaded(_made(spec, module), module)
    return _loaded[spec].claim


def own_digest(spec: str) -> str:
    """Return the digest of what an own claim is: the source of its module and its fields.

    A run is continued, and its noise repeated, only for an equal one. Modules that it imports are not looked into.
    """
    load_own(spec)
    known = _loaded[spec]
    try:
        source = inspect.getsource(known.module)
    except (OSError, TypeError):  # compiled, or made in memory
        source = known.module.__name__
    plain = {part.name: getattr(known.claim, part.name) for part in fields(known.claim)}
    told = {name: value for name, value in plain.items() if isinstance(value, (str, int, float, tuple, type(None)))}
    return settings_digest(spec, source, repr(sorted(told.items())))


def _imported(spec: str) -> ModuleType:
    name = spec.partition(":")[0]
    try:
        return import_user_module(spec)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            where = "neither in this folder nor among the installed packages"
            raise UserError(f"claim '{spec}': no module '{error.name}', {where}") from error
        raise UserError(f"claim '{spec}': importing {name} needs '{error.name}', which is not installed") from error
    except Exception as error:  # the user's module may fail in any way
        raise UserError(f"claim '{spec}': importing {name} failed: {_said(error)}") from error


def _made(spec: str, module: ModuleType) -> Claim:
    target: Any = module
    for part in spec.partition(":")[2].split("."):
        if not hasattr(target, part):
            hint = nearest(part, [name for name in dir(target) if not name.startswith("_")])
            raise UserError(f"claim '{spec}': {module.__name__} has no '{part}'; {hint}")
        target = getattr(target, part)
    if not isinstance(target, Claim) and callable(target):
        try:
            with no_exit(f"'{spec}'"):
                target = target()
        except UserError:
            raise
        except Exception as error:  # the user's factory may fail in any way
            raise UserError(f"claim '{spec}' failed: {_said(error)}") from error
    if not isinstance(target, Claim):
        raise UserError(
            f"'{spec}' is no claim: expected a robustvlm.certify.claims.Claim or a callable that returns one, got a "
            f"{type(target).__name__}"
        )
    return target


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, limit=160)}"
