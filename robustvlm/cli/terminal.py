"""What leaves the program: lines, notes, and what a failure looks like: one line on standard error, an exit code."""

import errno
import io
import json
import logging
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from robustvlm.core.ranks import current_ranks
from robustvlm.errors import UserError, is_out_of_memory
from robustvlm.text import ascii_json, secrets_cut, visible, visible_json, without_secrets

_PROMPTS_EVERY = 10.0  # seconds between two lines about them

# What leaves the program: every line printed, with control characters of others as escapes and without secrets


def say(text: str, *, err: bool = False) -> None:
    """Print a line, on standard error if `err`; line breaks in it are the program's own."""
    print(visible(without_secrets(text)), file=sys.stderr if err else sys.stdout)


def say_json(text: str) -> None:
    """Print JSON text on standard output: the same JSON, whatever characters are in it and the terminal can show."""
    text = json_without_secrets(text)
    unicode = str(getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(visible_json(text) if unicode else ascii_json(text))


def json_without_secrets(text: str) -> str:
    """Return JSON text without secrets: they are looked for in its texts, not in how JSON writes them."""
    return json.dumps(secrets_cut(json.loads(text)), indent=2, ensure_ascii=False) if "://" in text else text


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


class Prompts:
    """Says how far the encoding of class prompts is: a line on standard error, the first after ten seconds of it.

    Args:
        show: is handed every line in place of that, as soon as there is something to say.
    """

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self._show = show
        self._said: float | None = None

    def __call__(self, done: int, total: int, left: float | None) -> None:
        """Take in how many prompts are encoded, of how many, and the seconds left; 0 of 0 is another's work."""
        line = f"{done:,} of {total:,} class prompts encoded"
        if left is not None:
            line += f", about {left:.0f} s left" if left < 120 else f", about {left / 60:.0f} min left"
        if not total:
            line = "another process encodes these class prompts: waiting for it"
        if self._show is not None:
            self._show(line)
            return
        now = time.monotonic()
        if self._said is None:
            self._said = now
        if now - self._said >= _PROMPTS_EVERY:
            self._said = now
            if current_ranks().leader:
                say(line, err=True)


MISTAKE = 2
FAULT = 3
INTERRUPTED = 130
BROKEN_PIPE = 141
SHOW = "ROBUSTVLM_TRACEBACK"
_LONGEST = 1500
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("no space left", "os error 28", "disk quota", "os error 122", "file too large", "os error 27")
# Errors of the libraries that read and write files, by name: importing them only to ask would take seconds.
_UNREADABLE = {
    "SafetensorError": "a safetensors file cannot be read or written",
    "BadZipFile": "a zip archive is damaged",
    "TarError": "a tar archive is damaged",
    "ReadError": "a tar archive is damaged",
    "BadGzipFile": "a gzip file is damaged",
    "LZMAError": "an xz file is damaged",
    "ArrowException": "a Parquet or Arrow file cannot be read or written",
    "UnidentifiedImageError": "a picture cannot be read",
    "DecompressionBombError": "a picture is too large",
    "JSONDecodeError": "a JSON file is damaged",
    "UnicodeError": "a text is not valid Unicode",
    "YAMLError": "a YAML file is damaged",
    "UnpicklingError": "a file holds more than tensors, and is not read",
    "ValidationError": "a setting or a file does not have the form that is expected",
    "HTTPException": "the network failed",
    "HTTPError": "the network failed",
    "HfHubHTTPError": "the Hugging Face hub failed",
    "RequestException": "the network failed",
    "EOFError": "a file ends too early",
}
_PACKAGE = Path(__file__).resolve().parents[1]


class Ended(Exception):
    """Carries whatever a command raised past the command-line library, which has own ideas about some of it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def explain(error: BaseException) -> int:
    """Print the one line that a failure comes down to, and return the exit code."""
    if isinstance(error, Ended):
        error = error.error
    if os.environ.get(SHOW, "") not in ("", "0"):
        traceback.print_exception(type(error), error, error.__traceback__)
    if isinstance(error, BrokenPipeError):
        raise error
    explained, exit_code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if type(error).__name__ == "Exit" and exit_code:  # the command has said why; none of ours declares success so
        return int(exit_code)
    if callable(explained) and isinstance(exit_code, int):
        return _usage(error, str(explained()), exit_code)
    return complain(*_line(error))


def complain(message: str, code: int) -> int:
    """Print an error unless another process of the job was first to, and return its exit code."""
    line = " ".join(message.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    if _first_to_fail(line):
        say(line if code == INTERRUPTED else f"error: {line}", err=True)
    return code


def _line(error: BaseException) -> tuple[str, int]:
    """Return what happened and the exit code; faults of this program are told from the user's troubles."""
    if isinstance(error, UserError):
        return error.as_typed(), error.exit_code
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "interrupted", INTERRUPTED
    if isinstance(error, (SystemExit, GeneratorExit)) or type(error).__name__ == "Exit":
        said = f"{type(error).__name__} {error}".strip()
        return f"code ended the program ({said}{_place(error)}): it must return or raise", MISTAKE
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return "memory ran out even for one image at a time: use a smaller model or --device cpu", MISTAKE
    if _is_full(error):
        return f"the disk is full ({_brief(error)}): free some space and repeat the command", MISTAKE
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": '{error.filename}'" if error.filename else ""), MISTAKE
    if isinstance(error, RecursionError):
        return f"something is nested too deep to be read{_place(error)}", MISTAKE
    for kind in type(error).__mro__:
        if kind.__name__ in _UNREADABLE:
            return f"{_UNREADABLE[kind.__name__]}: {_brief(error)}", MISTAKE
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {_brief(error)}", MISTAKE
    if isinstance(error, OverflowError) or "overflow when unpacking" in str(error).lower():  # the second is torch's
        return f"a number is too large ({_brief(error)}{_place(error)})", MISTAKE
    own = _users_frame(error.__traceback__)
    if own is not None:
        return f"code outside robustvlm failed: {type(error).__name__}: {_brief(error)} ({own})", MISTAKE
    what = f"{type(error).__name__}: {_brief(error)}{_place(error)}"
    return f"a fault of robustvlm, please report it: {what}; {SHOW}=1 shows where it happened", FAULT


def _usage(error: BaseException, message: str, exit_code: int) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # no mistake: its message is the help
        print(message)
        return exit_code
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return complain(message.rstrip(".") + hint, exit_code)


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    text = str(error).lower()
    return any(words in text for words in _FULL_WORDS)


def _brief(error: BaseException) -> str:
    found = getattr(error, "errors", None)  # pydantic's say which field, over several lines
    if callable(found) and type(error).__name__ == "ValidationError":
        first = found()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _users_frame(trace: TracebackType | None) -> str | None:
    """Return the deepest place of a traceback that is neither this program's nor an installed library's."""
    roots = [Path(path).resolve() for name, path in sysconfig.get_paths().items() if "lib" in name]
    found = None
    for frame in traceback.extract_tb(trace):
        file = Path(frame.filename).resolve()
        if file.is_file() and not any(root in file.parents for root in (*roots, _PACKAGE)):
            found = f"{file.name}:{frame.lineno}"
    return found


def _first_to_fail(message: str) -> bool:
    """Let the other processes of a torchrun job know, and return whether this one is to tell the user."""
    try:
        return current_ranks().fail(message)
    except UserError:  # no connection to the others: each speaks for itself
        return True
