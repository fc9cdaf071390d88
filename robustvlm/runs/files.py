"""Writing files so that a crash leaves the old content or the new one, never half of it."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robustvlm.errors import UserError

TEMPORARY = ".part"
"""How the names of files end that are not complete yet."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(r"\(os error (\d+)\)", re.IGNORECASE)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)


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
