"""What the processes of one job tell each other: that they got somewhere, that they live, that one has failed.

Nothing but short texts and counters is exchanged, through the store that `torchrun` keeps for its processes, so that
one code serves every device. A wait ends when all have arrived, when one has failed, or when one no longer answers; a
death is known at once by the wire of `core.watch`.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from robustvlm.core.files import first_line
from robustvlm.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

# The wire between the processes of one job: each learns at once that another has died, failed or left.
#
# The operating system closes the connections of a process that dies, however it dies, and TCP's own probes find a
# machine that is gone; so nothing depends on what the dead one still does, nor on what the living ones are busy with.
# Rank 0 is the hub: it holds a connection to each of the others and passes on what it learns.

_TICK_SECONDS = 0.5
_LONGEST_LINE = 200
_ENDS = {"lost": "has died", "cut": "is out of reach"}
_LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}


class Board(Protocol):
    """Where the hub says how it is reached: the store of the job."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


@dataclass
class _Peer:
    """The other end of one connection; `rank` is None until it has said who it is."""

    wire: socket.socket
    rank: int | None
    heard: float = field(default_factory=time.monotonic)
    rest: bytes = b""
    how: str = "lost"
    """How it is gone, if it is: closed by the system of a process that died, or "cut": not even that one answers."""


class Watch:
    """This process's end of the wire, served by a thread of its own.

    When another process is found dead, or fails, `trouble` says so, and the work has `grace` seconds to end in its own
    way. After that (a thread that waits inside a library cannot be told) the process says why and ends itself.

    Args:
        rank, size: which process this is, and of how many.
        host: the machine of rank 0, as all of them know it.
        board: through which rank 0 lets the others know its port, and a secret that keeps strangers out.
        grace: seconds from trouble to the end of the process, which has to come 30 s after a machine was lost at most.
        silence: seconds without a word after which a process whose connection still stands (stopped, or stuck) is
            given up.
        leave: what ends the process; another function in tests.

    Raises:
        OSError: the hub cannot be reached.

    Example:
        >>> from torch.distributed import HashStore
        >>> store = HashStore()
        >>> hub = Watch(0, 2, "localhost", store)
        >>> other = Watch(1, 2, "localhost", store)
        >>> other.close()
        >>> hub.wait_for(lambda: 1 in hub.left, seconds=10)
        True
        >>> hub.trouble is None
        True
        >>> hub.close()
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        board: Board,
        *,
        grace: float = 6.0,
        silence: float = 120.0,
        leave: Callable[[str | None], None] | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.trouble: str | None = None
        self.failed_in_words = False
        """Whether the trouble is a failure that the other process tells of itself."""
        self.left: set[int] = set()
        self._spoken = False
        self._grace, self._silence, self._leave = grace, silence, leave or _end_process
        self._deadline: float | None = None
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._closing = threading.Event()
        if rank == 0:
            self._secret = secrets.token_hex(16)
            self._listener = _listening(host)
            self._selector.register(self._listener, selectors.EVENT_READ)
            board.set("watch", f"{self._listener.getsockname()[1]} {self._secret}")
        else:
            port, self._secret = board.get("watch").decode().split()
            self._add(_connected(host, int(port)), 0)
            self._tell(f"hello {self._secret} {rank}")
        self._beaten = time.monotonic()
        if hasattr(os, "register_at_fork"):  # a child that inherited the wires would keep them open past our death
            os.register_at_fork(after_in_child=self._drop)
        self._thread = threading.Thread(target=self._serve, name="robustvlm-watch", daemon=True)
        self._thread.start()

    def fail(self) -> None:
        """Let the others know that this process fails, and says why itself."""
        self._tell(f"failed {self.rank}")

    def ends_itself(self) -> None:
        """Note that this process is ending, and says why: it gets time for that, and is not spoken for."""
        self._spoken = True
        if self._deadline is not None:
            self._deadline = time.monotonic() + self._grace

    def end_if_troubled(self) -> None:
        """End this process at once, with nothing more to say, where another is lost."""
        if self.trouble is not None and not self.failed_in_words:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            self._leave(None)

    def wait_for(self, condition: Callable[[], bool], *, seconds: float) -> bool:
        """Wait until `condition` holds, for so many seconds at most; return whether it does."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        """Say good-bye: this process ends with nothing more to do."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(timeout=2 * _TICK_SECONDS)
        self._tell(f"left {self.rank}")
        self._drop()

    def _serve(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(timeout=_TICK_SECONDS):
                if key.fileobj is self._listener:
                    self._admit()
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(self._peers[key.fileobj])
            self._keep_time()

    def _admit(self) -> None:
        with contextlib.suppress(OSError):
            assert self._listener is not None
            self._add(self._listener.accept()[0], None)

    def _add(self, wire: socket.socket, rank: int | None) -> None:
        wire.settimeout(1.0)
        _probe_often(wire)
        self._peers[wire] = _Peer(wire, rank)
        self._selector.register(wire, selectors.EVENT_READ)

    def _hear(self, peer: _Peer) -> None:
        said = b""
        try:
            said = peer.wire.recv(4096)
        except ConnectionError:
            pass
        except OSError:
            peer.how = "cut"
        peer.heard = time.monotonic()
        *lines, peer.rest = (peer.rest + said).split(b"\n")
        for line in lines:
            self._heed(peer, line.decode("ascii", "replace").split())
        if not said or len(peer.rest) > _LONGEST_LINE:
            self._lose(peer, peer.how)

    def _heed(self, peer: _Peer, words: list[str]) -> None:
        if peer.rank is None:
            if len(words) == 3 and words[0] == "hello" and hmac.compare_digest(words[1], self._secret):
                peer.rank = int(words[2])
            return
        if len(words) != 2 or words[0] not in ("failed", "left", *_ENDS):
            return
        kind, rank = words[0], int(words[1])
        if kind == "left":
            self.left.add(rank)
        else:
            self._judge(rank, kind)
        if self._listener is not None:
            self._tell(" ".join(words), but=peer)

    def _lose(self, peer: _Peer, how: str) -> None:
        self._selector.unregister(peer.wire)
        del self._peers[peer.wire]
        peer.wire.close()
        if peer.rank is not None and peer.rank not in self.left:
            self._judge(peer.rank, how)
            if self._listener is not None:
                self._tell(f"{how} {peer.rank}")

    def _judge(self, rank: int, how: str) -> None:
        if self.trouble is None and rank != self.rank:
            self.failed_in_words = how not in _ENDS
            self.trouble = f"rank {rank} of {self.size} " + (
                f"{_ENDS[how]}; what is finished is kept: repeat the command to go on" if how in _ENDS else "failed"
            )
            self._deadline = time.monotonic() + self._grace

    def _keep_time(self) -> None:
        now = time.monotonic()
        if now - self._beaten > _BEAT_SECONDS:
            self._beaten = now
            self._tell("alive")
        for peer in list(self._peers.values()):
            if now - peer.heard > self._silence:
                self._lose(peer, "cut")
        if self._deadline is not None and now > self._deadline:
            self._deadline = None
            self._leave(None if self.failed_in_words or self._spoken else self.trouble)

    def _tell(self, line: str, but: _Peer | None = None) -> None:
        for peer in list(self._peers.values()):
            if peer is not but:
                try:
                    peer.wire.sendall(line.encode() + b"\n")
                except ConnectionError:
                    pass
                except OSError:
                    peer.how = "cut"

    def _drop(self) -> None:
        for wire in (self._listener, *self._peers):
            if wire is not None:
                wire.close()


def _listening(host: str) -> socket.socket:
    """Return a listening socket: of this machine alone where the job is on one machine, as far as its address says."""
    if host in _LOOPBACK:
        return socket.create_server(
            (_LOOPBACK[host], 0), family=socket.AF_INET6 if ":" in _LOOPBACK[host] else socket.AF_INET
        )
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _connected(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=60)
    except OSError as error:
        raise OSError(
            f"{first_line(error)} at port {port} of rank 0's machine, which the system chose: processes of several "
            "machines must reach each other's ports"
        ) from error


def _probe_often(wire: socket.socket) -> None:
    """Let the system find within 12 s that the machine at the other end is gone."""
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    options = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 12_000}
    for name, value in options.items():
        if hasattr(socket, name):
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _end_process(message: str | None) -> None:
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


# What the processes of one job tell each other: that they got somewhere, that they live, and that one has failed

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
        self._barriers = self._shared = self._told = 0
        self._checked = 0.0
        self._first_to_fail: bool | None = None
        self._beats: dict[int, tuple[int, float]] = {}
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="robustvlm-link", daemon=True)
        self._heart.start()
        atexit.register(self._at_exit)

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

    def gathered(self, text: str) -> list[str]:
        """Return on every process what each of them gave, by rank, once all have."""
        self._told += 1
        key = f"told/{self._told}"
        self._set(f"{key}/{self.rank}", text)
        self.barrier()
        return [self._get(f"{key}/{rank}") for rank in range(self.size)]

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
            from robustvlm.core.network import within

            if self._watch is not None:
                self._watch.ends_itself()
            # A store that is lost says so; one that is out of reach would never answer.
            with contextlib.suppress(UserError, TimeoutError):
                self._first_to_fail = within(_LAST_SECONDS, lambda: self._claims_to_be_first(message))
            if self._watch is not None:
                self._watch.fail()
        return self._first_to_fail

    def _claims_to_be_first(self, message: str) -> bool:
        first = self._count("claims", 1) == 1
        if first:
            self._set("failure", f"rank {self.rank} of {self.size} failed: {message}")
            self._count("failed", 1)
        return first

    def store_for(self, purpose: str) -> Store:
        """Return the part of the processes' store that belongs to one purpose, for what else connects them."""
        from torch.distributed import PrefixStore

        return PrefixStore(purpose, self._store)

    def close(self) -> None:
        """Stop the signs of life; the keeper of the store waits for the others to be through with it."""
        atexit.unregister(self._at_exit)
        if self._closing.is_set():
            return
        self._closing.set()
        self._heart.join(timeout=self._farewell())  # a store out of reach answers never
        if self._watch is not None:
            self._watch.close()

    def _at_exit(self) -> None:
        """Close; where another process is lost, end at once: all is said, and whoever waits for this one should not."""
        ended = self._first_to_fail is not None
        if ended:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun hurries its processes; nothing is to be undone
        self.close()
        if ended and self._watch is not None:
            self._watch.end_if_troubled()

    def _part(self) -> None:
        """Say good-bye; the keeper of the store waits until all have."""
        left, began = self._count("left", 1), time.monotonic()
        while self._hosts_store and left < self.size and time.monotonic() - began < self._farewell():
            time.sleep(0.01)
            left = self._count("left")

    def _farewell(self) -> float:
        """Return for how long to wait for the others: the dead never say good-bye."""
        return _LAST_SECONDS if self._watch is not None and self._watch.trouble else _FAREWELL_SECONDS

    def _beat(self) -> None:
        with contextlib.suppress(UserError):  # the main thread meets the same trouble, and says so
            while True:
                self._count(f"beat/{self.rank}", 1)
                if self._closing.wait(_BEAT_SECONDS):
                    break
            self._part()

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
