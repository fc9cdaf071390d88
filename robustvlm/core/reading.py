"""Reading small files that may come from anyone: regular files only, of a bounded size, JSON of a bounded depth."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from robustvlm.errors import UserError

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
        robustvlm.core.reading.NotRegular: '/dev/null' is no regular file
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


def read_text(path: Path, *, most: int = MOST_BYTES, encoding: str = "utf-8") -> str:
    """Return the text of a regular file; raises as `read_bytes` does, and UnicodeDecodeError."""
    return read_bytes(path, most=most).decode(encoding)


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds; ValueError for whatever is wrong with it, deep nesting and huge numbers included.

    Example:
        >>> parse_json("[" * 100_000)
        Traceback (most recent call last):
        ValueError: nested too deeply
    """
    try:
        content = json.loads(text)
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
