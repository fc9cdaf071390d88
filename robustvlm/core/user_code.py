"""Code that is not this program's: imported in one place, announced where a file names it, refused on request."""

import hashlib
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from robustvlm.errors import UserError

NO_CODE = "ROBUSTVLM_NO_CODE"
_OFF = ("", "0", "false", "no", "off")
_log = logging.getLogger("robustvlm")


@dataclass(frozen=True)
class _Policy:
    """What may be imported: `given` are the texts that the user gave by hand; None: everything is the caller's own."""

    refused: bool = False
    given: Collection[str] | None = None


_policy = _Policy()  # of the whole process: what is refused is refused in every thread
_source: ContextVar[str | None] = ContextVar("source", default=None)


@contextmanager
def code_policy(*, refused: bool = False, given: Collection[str] | None = None) -> Iterator[None]:
    """Within the block refuse all user code, or announce what stands in none of the texts that the user has `given`.

    Example:
        >>> with code_policy(refused=True):
        ...     import_user_module("json:loads")
        Traceback (most recent call last):
        ...
        robustvlm.errors.UserError: 'json:loads' is code, and code is refused (--no-code or ROBUSTVLM_NO_CODE)
    """
    global _policy
    before, _policy = _policy, _Policy(refused, given)
    try:
        yield
    finally:
        _policy = before


@contextmanager
def named_by(source: str) -> Iterator[None]:
    """Within the block, code is named by a file (its description) and not by the user: it is announced before it runs.

    Example:
        >>> with named_by("the card of 'runs/p'"):
        ...     pass
    """
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def code_is_refused() -> bool:
    """Whether user code may not be imported, by `--no-code` or the environment variable."""
    return _policy.refused or os.environ.get(NO_CODE, "").strip().lower() not in _OFF


def import_user_module(spec: str) -> ModuleType:
    """Return the module of a `module:callable` spec; the current folder is searched first.

    Raises:
        UserError: code is refused, or the module ends the program while it is imported.
        Exception: whatever else the import raises.
    """
    module = spec.partition(":")[0]
    _permit(spec)
    _search_here()
    with no_exit(f"importing '{module}'"):
        return importlib.import_module(module)


def may_be_imported(spec: str) -> bool:
    """Whether there is a module, or the package around it, of a `module:callable` spec; nothing of it is run.

    Example:
        >>> may_be_imported("json.decoder:JSONDecoder"), may_be_imported("no_such_module:thing")
        (True, False)
    """
    top = re.split(r"[.:]", spec, maxsplit=1)[0]
    _search_here()
    try:
        return top in sys.modules or importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def file_digest(module: str) -> str:
    """Return the digest of the file of an imported module, "" where there is none.

    Example:
        >>> len(file_digest("robustvlm.errors")), file_digest("builtins")
        (32, '')
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest() if file and Path(file).is_file() else ""


def _search_here() -> None:
    if os.getcwd() not in sys.path:
        # The installed command does not have the current folder on its path, as `python script.py` would.
        sys.path.insert(0, os.getcwd())


@contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Turn an attempt to end the program from within the block into a failure: success is not the code's to declare.

    Example:
        >>> with no_exit("importing 'mine'"):
        ...     raise SystemExit(0)
        Traceback (most recent call last):
        ...
        robustvlm.errors.UserError: importing 'mine' ended the program (SystemExit: 0): code must return or raise
    """
    try:
        yield
    except (SystemExit, GeneratorExit) as error:
        raise UserError(
            f"{what} ended the program ({type(error).__name__}: {error}): code must return or raise"
        ) from error


def _permit(spec: str) -> None:
    policy, source = _policy, _source.get()
    by = f", named by {source}," if source else ""
    if code_is_refused():
        raise UserError(f"'{spec}'{by} is code, and code is refused (--no-code or {NO_CODE})")
    if policy.given is None:
        unseen = source is not None
    else:
        whole = re.compile(rf"(?<![\w.]){re.escape(spec)}(?![\w.])")
        unseen = not any(whole.search(text) for text in policy.given)
    if unseen:
        _log.warning("running code: importing '%s', named by %s", spec, source or "a file and not on the command line")
