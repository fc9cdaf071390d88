"""Errors that are the user's to mend: one clear line, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

from robustvlm.core.foreign_text import without_secrets


class UserError(Exception):
    """A mistake in the input: the message says what was expected, what came and what to do.

    The command line prints the message on one line and ends with `exit_code`; library users catch it
    as an ordinary exception. Passwords and signatures in URLs are cut from the message.

    Example:
        >>> str(UserError("eps must be positive, got -1: pass for example 2/255"))
        'eps must be positive, got -1: pass for example 2/255'
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class MissingExtra(UserError):
    """An optional package is needed; the message holds the command that installs it.

    Example:
        >>> str(MissingExtra("webdataset", extra="wds"))
        "this needs the package 'webdataset': pip install 'robustvlm[wds]'"
    """

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(f"this needs the package '{package}': pip install 'robustvlm[{extra}]'")


# A flag as messages name it, and the value that it is to be given.
_FLAG = re.compile(r"--([a-z][a-z0-9-]*)(?:[ =](?=[0-9.'\"/]))?")


@contextlib.contextmanager
def arguments_named() -> Iterator[None]:
    """Let errors of the code within name a Python caller's arguments where they name flags of the command line.

    Example:
        >>> with arguments_named():
        ...     raise UserError("use --lanes 1, or leave out --min-cos")
        Traceback (most recent call last):
        robustvlm.errors.UserError: use lanes=1, or leave out min_cos
    """
    try:
        yield
    except UserError as error:
        error.args = (_FLAG.sub(_argument, str(error)),)
        raise


def _argument(flag: re.Match[str]) -> str:
    return flag.group(1).replace("-", "_") + ("=" if len(flag.group(0)) > len(flag.group(1)) + 2 else "")


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return a hint naming the known names nearest to `name`, or all of a short list.

    Example:
        >>> nearest("tinny", ["tiny", "ViT-B-32"])
        "did you mean 'tiny'?"
        >>> nearest("zzz", ["a", "b"])
        "known: 'a', 'b'"
    """
    names = sorted(set(known))
    folded = {candidate.lower(): candidate for candidate in names}
    close = [folded[key] for key in difflib.get_close_matches(name.lower(), list(folded), n=limit, cutoff=0.5)]
    if close:
        return "did you mean " + " or ".join(f"'{candidate}'" for candidate in close) + "?"
    shown = ", ".join(f"'{candidate}'" for candidate in names[:12])
    return f"known: {shown}" + (", ..." if len(names) > 12 else "")
