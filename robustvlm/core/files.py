"""Small files: read with care whoever wrote them, and written so that a crash never leaves half of one."""

import errno
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from robustvlm.errors import UserError

# Reading small files that may come from anyone: regular files only, of a bounded size, JSON of a bounded depth

MOST_BYTES = 256 * 2**20
"""Largest text file that is read as a whole."""
MOST_DEPTH = 64
"""Deepest nesting of JSON that is accepted; what this program writes stays below ten."""


class NotRegular(OSError):
    """A pipe, device or folder stands where a file is expected, or the file is larger than any that makes sense."""


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Opening a pipe would wait for a writer and reading a device would never end, so both are refused.

    Raises:
        NotRegular: no regular file, or more than `most` bytes. OSError: it cannot be read.

    Example:
        >>> read_bytes(Path("/dev/null"))
        Traceback (most recent call last):
        robustvlm.core.files.NotRegular: '/dev/null' is no regular file
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as handle:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise NotRegular(f"'{path}' is no regular file")
        content = handle.read(most + 1) if about.st_size <= most else b"\0" * (most + 1)
    if len(content) > most:
        raise NotRegular(f"'{path}' is larger than {most // 2**20:,} MiB")
    return content


def require_regular(path: Path) -> None:
    """Refuse what is no regular file, before a library opens it: a pipe would wait for a writer for ever.

    Raises:
        FileNotFoundError: nothing is there. NotRegular: something else than a file is.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotRegular(f"'{path}' is no regular file")


def beginning(path: Path, *, most: int = 2**22) -> bytes:
    """Return the first bytes of a regular file, b"" of what cannot be read: for digests, where a fault counts, too."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            return file.read(most)
    except OSError:
        return b""


def read_text(path: Path, *, most: int = MOST_BYTES, encoding: str = "utf-8") -> str:
    """Return the text of a regular file; raises as `read_bytes` does, and UnicodeDecodeError."""
    return read_bytes(path, most=most).decode(encoding)


def parse_json(text: str | bytes, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return what a JSON text holds; ValueError for whatever is wrong with it, deep nesting and huge numbers included.

    Args:
        pairs: makes an object of its keys and values; default: a dictionary, in which the last of equal keys counts.

    Example:
        >>> parse_json("[" * 100_000)
        Traceback (most recent call last):
        ValueError: nested too deeply
    """
    try:
        content = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _require_flat(content)
    return content


def read_json(path: Path, *, most: int = MOST_BYTES, advice: str = "") -> Any:
    """Return what a JSON file holds.

    Args:
        advice: what to do about a file that cannot be read, put behind the reason.

    Raises:
        FileNotFoundError: nothing is there. UserError: it cannot be read or is no JSON; one line says why.
    """
    try:
        return parse_json(read_text(path, most=most))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}' ({first_line(error)}){f': {advice}' if advice else ''}") from None


def read_object(path: Path, *, parts: Sequence[str] = (), most: int = MOST_BYTES, advice: str = "") -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        parts: keys, dots between those of one path, under which there are objects, too, if anything is there.
        advice: as for `read_json`.

    Raises:
        FileNotFoundError: nothing is there. UserError: as `read_json`, and for anything else than objects.
    """
    content = read_json(path, most=most, advice=advice)
    for part in ("", *parts):
        value = content
        for key in part.split(".") if part else ():
            value = (value or {}).get(key)
        if not isinstance(value, dict) and not (part and value is None):
            where = f" under '{part}'" if part else ""
            more = f": {advice}" if advice else ""
            raise UserError(f"'{path}' holds a {type(value).__name__}{where}, expected an object, {{...}}{more}")
    found: dict[str, Any] = content
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, of an error of the operating system what went wrong.

    Example:
        >>> first_line(ValueError("one" + chr(10) + "two")), first_line(KeyError())
        ('one', 'KeyError')
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:300]


def _require_flat(content: Any) -> None:
    """Refuse deep nesting: code that walks the content would run out of stack."""
    layer = [content]
    for _ in range(MOST_DEPTH):
        layer = [inner for item in layer for inner in _within(item)]
        if not layer:
            return
    raise ValueError("nested too deeply")


def _within(item: Any) -> list[Any]:
    inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return [part for part in inner if isinstance(part, (dict, list))]


# Writing files so that a crash leaves the old content or the new one, never half of it

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
