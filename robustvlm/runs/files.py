"""Writing files so that a crash leaves the old content or the new one, never half of it."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from robustvlm.errors import UserError

TEMPORARY = ".part"
"""How the names of files end that are not complete yet."""

_THEIRS = ".tmp"
"""How the names of files begin that safetensors has not completed yet."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(r"\(os error (\d+)\)", re.IGNORECASE)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what a killed process left of a file it was writing, by itself or by safetensors.

    Example:
        >>> [is_temporary(name) for name in (".model.json.x1y2.part", ".tmpvOESOB", "tmp.part", ".template")]
        [True, True, False, False]
    """
    return name.startswith(".") and (name.endswith(TEMPORARY) or (name.startswith(_THEIRS) and len(name) == 10))


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to `path`.

    Args:
        private: only its owner may read it.

    Raises:
        OSError: a full disk or another refusal of the system, whichever package was writing.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _as_os_errors(path):
            yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o600 if private else 0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _as_os_errors(path: Path) -> Iterator[None]:
    """Raise what the writers of other packages say of the system's refusals as the OSError that it is.

    The error of safetensors is no OSError, but its text ends in the system's error number.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = _OS_ERROR.search(str(error))
        if found is not None:
            number = int(found.group(1))
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write UTF-8 text atomically; `private`: for nobody else to read."""
    with replacing(path, private=private) as temporary:
        # A name with a lone surrogate (a file name of another encoding) must not lose everything beside it.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def open_own(path: Path, mode: str) -> IO[bytes]:
    """Open a file of a folder that may come from others, to write into it as it is: "ab" or "r+b", unbuffered.

    Links are not followed, or a stranger's folder could have a file of yours changed; pipes and devices are refused.
    It is made where there is none (and only readable by others where the umask allows it).

    Raises:
        UserError: something else than a file is there.
    """
    flags = os.O_RDWR | os.O_CREAT | (os.O_APPEND if "a" in mode else 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(
                f"'{path}' is no file but {kind_of(path)}: a run neither follows nor replaces it"
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"'{path}' is no file but {kind_of(path)}: a run neither follows nor replaces it")
    return os.fdopen(descriptor, mode, buffering=0)


def kind_of(path: Path) -> str:
    """Say what stands at a path, links not followed.

    Example:
        >>> kind_of(Path("/dev/null"))
        'a device'
    """
    mode = path.lstat().st_mode
    kinds = (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISREG, "a file"),
    )
    return next((name for test, name in kinds if test(mode)), "a device")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def named_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder and the like into one line that names the folder and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"the disk that holds '{folder}' is full ({error.strerror}): "
                "free some space and repeat the command, it goes on from here"
            ) from error
        if error.errno in _REFUSED:
            raise UserError(
                f"cannot write to '{folder}' ({error.strerror}): choose another folder with --out"
            ) from error
        raise
