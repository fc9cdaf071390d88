"""What leaves the program: every line printed, with others' control characters as escapes and without secrets."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from robustvlm.text import ascii_json, secrets_cut, visible, visible_json, without_secrets


def say(text: str, *, err: bool = False) -> None:
    """Print a line, on standard error if `err`; line breaks in it are the program's own."""
    print(visible(without_secrets(text)), file=sys.stderr if err else sys.stdout)


def say_json(text: str) -> None:
    """Print JSON text on standard output: the same JSON, whatever characters are in it and the terminal can show."""
    if "://" in text:
        text = json.dumps(secrets_cut(json.loads(text)), indent=2, ensure_ascii=False)
    unicode = str(getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(visible_json(text) if unicode else ascii_json(text))


def open_streams() -> None:
    """Make standard output and error fit to be written to: closed ones lead nowhere, no character is too much."""
    # A file opened while 0, 1 or 2 is free would get that number, and with it what libraries print.
    with suppress(OSError):
        number = os.open(os.devnull, os.O_RDWR)
        while number <= 2:
            number = os.open(os.devnull, os.O_RDWR)
        os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open until the end
        elif isinstance(stream, io.TextIOWrapper):
            with suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Let what is still to be printed go nowhere: its reader went away."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {' '.join(record.getMessage().split())}", err=True)


@contextmanager
def notes_shown() -> Iterator[None]:
    """Print what the library logs as notes on standard error."""
    log, handler = logging.getLogger("robustvlm"), _Notes(level=logging.WARNING)
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before
