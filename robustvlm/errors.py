"""Errors that are the user's to mend: one clear line, no traceback."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

from robustvlm.text import without_secrets

# Characters that Unicode keeps free for a program's own use; no text that a user can give holds them by accident.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}([a-z0-9_]+)(?:=([^{_CLOSE}]*))?{_CLOSE}")


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
        self._marked = without_secrets(message)
        super().__init__(_MARK.sub(_as_argument, self._marked))

    def as_typed(self) -> str:
        """Return the message as a user of the command line reads it: settings named by `setting` as their flags."""
        return _MARK.sub(_as_flag, self._marked)


class BadSetting(UserError):
    """A setting has a value that it cannot have.

    A Python caller reads the argument's name, who typed the command reads its flag.

    Example:
        >>> error = BadSetting("val_steps", "must be at least 1", got=0)
        >>> str(error), error.as_typed()
        ('val_steps must be at least 1, got 0', '--val-steps must be at least 1, got 0')
    """

    def __init__(self, name: str, problem: str, *, got: object = None) -> None:
        self.name = name
        super().__init__(f"{setting(name)} {problem}" + ("" if got is None else f", got {got}"))


class MissingExtra(UserError):
    """An optional package is needed; the message holds the command that installs it.

    Example:
        >>> str(MissingExtra("webdataset", extra="wds"))
        "this needs the package 'webdataset': pip install 'robustvlm[wds]'"
    """

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(f"this needs the package '{package}': pip install 'robustvlm[{extra}]'")


# A flag as messages name it, and the value that it is to be given.
_SWITCHES = ("fresh", "resume", "accept-misfits")
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
    if flag.group(1) in _SWITCHES:
        return f"{flag.group(1).replace('-', '_')}=True"
    return flag.group(1).replace("-", "_") + ("=" if len(flag.group(0)) > len(flag.group(1)) + 2 else "")


def setting(name: str, value: object = None) -> str:
    """Return how the text of a UserError names a setting, with a value to pass if it advises one.

    Example:
        >>> error = UserError(f"greedy needs images: pass {setting('val', 'DATA')}, or leave out {setting('by')}")
        >>> str(error)
        'greedy needs images: pass val=DATA, or leave out by'
        >>> error.as_typed()
        'greedy needs images: pass --val DATA, or leave out --by'
        >>> UserError(setting("fresh", True)).as_typed()
        '--fresh'
    """
    return f"{_OPEN}{name}{'' if value is None else f'={value}'}{_CLOSE}"


def flag_of(name: str) -> str:
    """Return the flag of an option of that name.

    Example:
        >>> flag_of("val_steps")
        '--val-steps'
    """
    return f"--{name.replace('_', '-')}"


def _as_argument(mark: re.Match[str]) -> str:
    return mark[1] if mark[2] is None else f"{mark[1]}={mark[2]}"


def _as_flag(mark: re.Match[str]) -> str:
    name, value = mark[1], mark[2]
    if value == "False":
        return flag_of(f"no_{name}")
    return flag_of(name) if value in (None, "True") else f"{flag_of(name)} {value}"


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


# Failures that are nobody's mistake: memory that did not suffice

# What torch's backends say: CUDA, MPS, XPU and the CPU's allocator; C++; oneDNN, cuBLAS, cuDNN, cuSOLVER.
_SIGNS = (
    "out of memory",
    "out_of_memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "could not create a primitive",
    "could not create a memory object",
    "alloc_failed",
    "invalid buffer size",
    "buffer size too large",
    "not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device or the host ran out of memory.

    Told by name and message, so that asking does not load torch.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
        >>> is_out_of_memory(RuntimeError("could not create a primitive")), is_out_of_memory(RuntimeError("bad shape"))
        (True, False)
    """
    text = str(error).lower()
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(sign in text for sign in _SIGNS)
