"""Run the program's commands in forked children: the libraries are loaded once, a command then starts in no time.

The parent imports everything and computes nothing, so that a child is like a fresh process: no threads, no caches.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_MEMORY = 6 * 2**30
_LONGEST = 1_000_000


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), what it printed, and whether it had to be stopped."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool = False

    @property
    def traceback(self) -> bool:
        """Whether it broke: Python's own words, or the program's for a fault of its own."""
        said = self.err + self.out
        return "Traceback (most recent call last)" in said or "a fault of robustvlm" in said

    @property
    def complaints(self) -> list[str]:
        """The lines that say what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith(("error: ", "Error: "))]

    @property
    def refused(self) -> bool:
        """Whether this is how a mistake of the user should end: exit code 2, one line, no traceback."""
        return self.code == 2 and len(self.complaints) == 1 and not self.traceback and not self.hung


Body = Callable[[], object]
T = TypeVar("T")


def load_everything() -> None:
    """Import the package with all it may need, before the first fork."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import open_clip
    import torch

    import robustvlm

    torch.set_num_threads(1)
    del open_clip
    for module in pkgutil.walk_packages(robustvlm.__path__, "robustvlm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("matplotlib.pyplot", "scipy.stats", "pyarrow.dataset", "torchvision.transforms", "torchattacks"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def command(words: Sequence[str]) -> Body:
    """Return what runs `robustvlm` with these words."""

    def body() -> object:
        from robustvlm.cli.main import main

        sys.argv = ["robustvlm", *words]
        return main()

    return body


def run_forked(
    body: Body,
    *,
    cwd: Path,
    timeout: float,
    prepare: Callable[[], object] = lambda: None,
    environment: Mapping[str, str] | None = None,
    kill_after: float | None = None,
) -> Ended:
    """Run `body` in a child of this process, in the folder `cwd`.

    Args:
        timeout: seconds after which it counts as hung and is killed.
        prepare: called in the child first: limits, hooks.
        kill_after: seconds after which it is killed, as a user's `kill -9`.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    out, err = cwd.with_name(f".{cwd.name}.out"), cwd.with_name(f".{cwd.name}.err")
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(body, cwd, out, err, prepare, environment or {})
    code, hung = _wait(pid, timeout, kill_after)
    texts = [_tail(path) for path in (out, err)]
    return Ended(code, texts[0], texts[1], time.monotonic() - began, hung)


def _tail(path: Path) -> str:
    try:
        return path.read_bytes()[-_LONGEST:].decode("utf-8", "replace")
    except FileNotFoundError:  # killed before it could say anything
        return ""


def in_parallel(work: Callable[[int], T], workers: int) -> list[T]:
    """Return what `work(0)`, `work(1)`, ... give, each in a forked process of its own, side by side."""
    context = multiprocessing.get_context("fork")
    started = []
    for part in range(workers):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=lambda part=part, sending=sending: sending.send(work(part)))
        process.start()
        sending.close()
        started.append((process, receiving))
    found = []
    for process, receiving in started:
        try:
            found.append(receiving.recv())
        except EOFError:
            raise SystemExit("a worker died: what it was doing stands above") from None
        process.join()
    return found


def _child(
    body: Body, cwd: Path, out: Path, err: Path, prepare: Callable[[], object], environment: Mapping[str, str]
) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for path, number in ((out, 1), (err, 2)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
            os.close(descriptor)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8", errors="backslashreplace")
        sys.stderr = io.TextIOWrapper(
            os.fdopen(2, "wb", 0, closefd=False), encoding="utf-8", errors="backslashreplace", write_through=True
        )
        os.chdir(cwd)
        os.environ.update(environment)
        sys.path.insert(0, str(cwd))
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        prepare()
        code = _code_of(body)
        sys.stdout.flush()
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _code_of(body: Body) -> int:
    try:
        body()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def _wait(pid: int, timeout: float, kill_after: float | None) -> tuple[int, bool]:
    """Wait for the child; return its exit code and whether it hung."""
    began, killed, hung = time.monotonic(), False, False
    pause = 0.002
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # whatever it started
            return os.waitstatus_to_exitcode(status), hung
        spent = time.monotonic() - began
        if not killed and (spent > timeout or (kill_after is not None and spent > kill_after)):
            hung = spent > timeout
            killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(pause)
        pause = min(0.02, pause * 1.3)
