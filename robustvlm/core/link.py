"""What the processes of one job tell each other: that they got somewhere, that they live, and that one has failed.

Nothing but short texts and counters is exchanged, through the store that `torchrun` keeps for its processes, so that
one code serves every device. A wait ends when all have arrived, when one has failed, or when one no longer answers; a
death is known at once by the wire of `core.watch`.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from typing import TYPE_CHECKING

from robustvlm.core.reading import first_line
from robustvlm.core.watch import Watch
from robustvlm.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_BEAT_SECONDS = 2.0
_FAREWELL_SECONDS, _LAST_SECONDS = 30.0, 3.0


class PeerFailed(UserError):
    """Another process of the job has failed, and said why."""


class Link:
    """One process's end of the connection between the processes of a job.

    Args:
        store: shared by all processes; keys must not be left over from an earlier job.
        rank, size: which process this is, and of how many.
        hosts_store: this process keeps the store, so that it must be the last to go.
        silence: seconds without a sign of life after which a process counts as lost.
        watch: the wire over which a death is known at once.

    Example:
        >>> from torch.distributed import HashStore
        >>> link = Link(HashStore(), rank=0, size=1)
        >>> link.barrier()
        >>> link.share("hello"), link.fail("on purpose"), link.fail("again")
        ('hello', True, True)
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        size: int,
        hosts_store: bool = False,
        silence: float = 120.0,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._hosts_store, self._silence, self._watch = store, hosts_store, silence, watch
        self._barriers = self._shared = 0
        self._checked = 0.0
        self._first_to_fail: bool | None = None
        self._beats: dict[int, tuple[int, float]] = {}
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="robustvlm-link", daemon=True)
        self._heart.start()
        atexit.register(self.close)

    def barrier(self) -> None:
        """Wait until every process has called this as often as this one.

        Raises:
            PeerFailed: another process has failed meanwhile.
            UserError: another process, or the store, no longer answers.
        """
        self._barriers += 1
        key, pause = f"barrier/{self._barriers}", 0.001
        self._count(key, 1)
        while self._count(key) < self.size:
            self.check(every=0.5)
            self._check_nobody_left(key)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def share(self, text: str | None) -> str:
        """Return on every process the text given by rank 0; the others' is not looked at."""
        self._shared += 1
        key = f"shared/{self._shared}"
        if self.rank == 0:
            self._set(key, text or "")
        self.barrier()
        return self._get(key)

    def check(self, *, every: float = 1.0) -> None:
        """Raise PeerFailed if another process has failed, UserError if one is lost; asks at most every so often."""
        now = time.monotonic()
        if self._watch is not None and self._watch.trouble and not self._watch.failed_in_words:
            raise UserError(self._watch.trouble)
        if now - self._checked < every:
            return
        self._checked = now
        if self._count("failed"):
            raise PeerFailed(self._get("failure"))
        for peer in range(self.size):
            beat = self._count(f"beat/{peer}")
            known, since = self._beats.get(peer, (-1, now))
            self._beats[peer] = (beat, now if beat != known else since)
            if peer != self.rank and now - self._beats[peer][1] > self._silence:
                raise UserError(f"rank {peer} of {self.size} has given no sign of life for {self._silence:.0f} s")

    def blame(self, *, seconds: float = 3.0) -> None:
        """Raise what happened to another process, where that is known within so many seconds; else return."""
        if self._watch is not None:
            self._watch.wait_for(
                lambda: bool(self._watch and (self._watch.trouble or self._watch.left)), seconds=seconds
            )
        self.check(every=0.0)
        self._check_nobody_left(None)

    def _check_nobody_left(self, key: str | None) -> None:
        """Raise if a process has ended before it came to where the others are, or will be."""
        left = self._watch.left if self._watch is not None else set()
        if left and (key is None or self._count(key) < self.size):
            self.check(every=0.0)
            raise UserError(f"rank {min(left)} of {self.size} has ended before the others: repeat the command to go on")

    def fail(self, message: str) -> bool:
        """Let the others know why this process fails; return whether it is the first, which is the one to say it.

        Asked again it gives the same answer: the failure is on its way up.
        """
        if self._first_to_fail is None:
            self._first_to_fail = True
            with contextlib.suppress(UserError):
                self._first_to_fail = self._count("claims", 1) == 1
                if self._first_to_fail:
                    self._set("failure", f"rank {self.rank} of {self.size} failed: {message}")
                    self._count("failed", 1)
            if self._watch is not None:
                self._watch.fail()
        return self._first_to_fail

    def store_for(self, purpose: str) -> Store:
        """Return the part of the processes' store that belongs to one purpose, for what else connects them."""
        from torch.distributed import PrefixStore

        return PrefixStore(purpose, self._store)

    def close(self) -> None:
        """Stop the signs of life; the keeper of the store waits for the others to be through with it."""
        atexit.unregister(self.close)
        if self._closing.is_set():
            return
        self._closing.set()
        self._heart.join(timeout=_BEAT_SECONDS)
        with contextlib.suppress(UserError):
            left, began = self._count("left", 1), time.monotonic()
            while self._hosts_store and left < self.size and time.monotonic() - began < self._farewell():
                time.sleep(0.01)
                left = self._count("left")
        if self._watch is not None:
            self._watch.close()

    def _farewell(self) -> float:
        """Return for how long to wait for the others: the dead never say good-bye."""
        return _LAST_SECONDS if self._watch is not None and self._watch.trouble else _FAREWELL_SECONDS

    def _beat(self) -> None:
        while True:
            try:
                self._count(f"beat/{self.rank}", 1)
            except UserError:  # the main thread meets the same trouble, and says so
                return
            if self._closing.wait(_BEAT_SECONDS):
                return

    def _count(self, key: str, more: int = 0) -> int:
        with _named(self._watch):
            return int(self._store.add(key, more))

    def _set(self, key: str, text: str) -> None:
        with _named(self._watch):
            self._store.set(key, text)

    def _get(self, key: str) -> str:
        with _named(self._watch):
            return bytes(self._store.get(key)).decode("utf-8", "replace")


class _named(contextlib.AbstractContextManager[None]):
    """Put the failures of the store into one line: who died, where that is why."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, (RuntimeError, OSError)):
            return
        watch = self._watch
        if watch is not None and watch.wait_for(lambda: watch.trouble is not None, seconds=2.0):
            raise UserError(str(watch.trouble)) from error
        raise UserError(f"the connection between the processes of this job is lost ({first_line(error)})") from error
