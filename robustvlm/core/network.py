"""HTTP with a deadline for the call as a whole: names, connections, headers and bodies, however slowly they trickle."""

import base64
import functools
import http.client
import io
import os
import queue
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import IO, Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from robustvlm.errors import UserError

T = TypeVar("T")

DOWNLOAD_SECONDS = "ROBUSTVLM_DOWNLOAD_SECONDS"
_DOWNLOAD_SECONDS = 6 * 3600.0
_LATE = "no whole answer in time"


class Deadline:
    """A moment that everything under way has to be done by; it may be moved.

    Example:
        >>> 0 < Deadline(5.0).left() <= 5.0
        True
    """

    def __init__(self, seconds: float) -> None:
        self.restart(seconds)

    def restart(self, seconds: float) -> None:
        """Begin anew, from now."""
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left; TimeoutError where there are none."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError(_LATE)
        return left


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return what `work` returns; TimeoutError if it takes longer, whatever it waits for.

    The work is left behind in a thread that does not keep the program from ending.

    Example:
        >>> within(5.0, lambda: 3)
        3
    """
    done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((True, work()))
        except BaseException as error:
            done.put((False, error))

    threading.Thread(target=run, name="robustvlm-network", daemon=True).start()
    try:
        good, result = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"not done within {seconds:,.0f} s") from None
    if not good:
        raise result
    found: T = result
    return found


def download_seconds() -> float:
    """Return how long fetching a model or a data set may take: six hours, or what the environment says.

    Raises:
        UserError: it says no positive number.

    Example:
        >>> download_seconds() > 60
        True
    """
    text = os.environ.get(DOWNLOAD_SECONDS, "").strip()
    try:
        seconds = float(text) if text else _DOWNLOAD_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UserError(f"the environment says {DOWNLOAD_SECONDS}='{text}', expected a number of seconds")
    return seconds


def open_url(
    request: str | urllib.request.Request, deadline: Deadline, *, direct: bool = False, follow: bool = True
) -> Any:
    """Return the response to an HTTP request; its reads obey the deadline too.

    A user name and password in the URL are sent to its server alone, as HTTP's basic authentication.

    Args:
        direct: pass over the proxies that the environment names.
        follow: follow redirects; else they are errors as other refusals.

    Raises:
        OSError: as `urllib.request.urlopen`; TimeoutError when the time is over.
        http.client.HTTPException: what came is no HTTP.
    """
    if isinstance(request, str):
        request = _signed_in(request)
    handlers: list[Any] = [_Http(deadline), _Https(deadline)]
    handlers += [urllib.request.ProxyHandler({})] if direct else []
    handlers += [] if follow else [_StayHere]
    return urllib.request.build_opener(*handlers).open(request, timeout=deadline.left())


def _signed_in(url: str) -> urllib.request.Request:
    parts = urlsplit(url)
    user, at, place = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=place)))
    if at:
        name, _, password = user.partition(":")
        basic = base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {basic}")
    return request


class SteadyStream(io.RawIOBase):
    """A response as a stream whose every read has a deadline, longer for more bytes.

    What reads it may pause as long as it likes between two reads.

    Args:
        wait: seconds for any read. slowest: bytes a second that a long read must come at.
    """

    def __init__(self, response: IO[bytes], deadline: Deadline, *, wait: float = 60.0, slowest: float = 4096.0) -> None:
        self._response, self._deadline, self._wait, self._slowest = response, deadline, wait, slowest

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as one read goes."""
        self._deadline.restart(self._wait + len(buffer) / self._slowest)
        found = self._response.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
        super().close()


class _StayHere(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        del req, fp, code, msg, headers, newurl  # no new request: the reply arrives as an HTTPError


class _Raw(io.RawIOBase):
    """A socket's stream whose every read may last only as long as the whole call still may."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline
        self._stream = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.left())
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, deadline: Deadline, **settings: Any) -> None:
        super().__init__(sock, *arguments, **settings)
        self.fp.close()
        self.fp = io.BufferedReader(_Raw(sock, deadline))


class _Connection(http.client.HTTPConnection):
    """A connection that looks up, connects, sends and receives under one deadline."""

    def __init__(self, *arguments: Any, deadline: Deadline, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._deadline = deadline
        self.response_class = functools.partial(_Response, deadline=deadline)  # type: ignore[assignment]
        self._create_connection = self._connected

    def send(self, data: Any) -> None:
        """Send bytes; connected first, where it is not."""
        if self.sock is not None:
            self.sock.settimeout(self._deadline.left())
        super().send(data)

    def _connected(self, address: tuple[str, int], timeout: object = None, source: Any = None) -> socket.socket:
        del timeout
        host, port = address
        # The system's resolver has a patience of its own.
        resolve = functools.partial(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
        failure: OSError = OSError(f"no address for '{host}'")
        for family, kind, protocol, _, place in within(self._deadline.left(), resolve):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:  # a family that this machine does not have
                failure = error
                continue
            try:
                sock.settimeout(self._deadline.left())
                if source is not None:
                    sock.bind(source)
                sock.connect(place)
                return sock
            except OSError as error:
                failure = error
                sock.close()
        raise failure


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    """The same, encrypted."""


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_Connection, deadline=self._deadline), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__(context=ssl.create_default_context())
        self._deadline = deadline

    def https_open(self, req: urllib.request.Request) -> Any:
        factory = functools.partial(_SecureConnection, deadline=self._deadline)
        return self.do_open(factory, req, context=self._context)  # type: ignore[attr-defined]
