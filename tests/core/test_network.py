"""A deadline for a call as a whole, whatever the server does; a real server on loopback."""

from __future__ import annotations

import select
import socket
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from robustvlm.core.network import Deadline, SteadyStream, download_seconds, open_url, within
from robustvlm.errors import UserError

Act = Callable[[socket.socket], None]


@contextmanager
def serving(act: Act) -> Iterator[str]:
    """Accept connections, read what comes first, and act."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)

        def serve() -> None:
            while not over.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    continue
                with connection:
                    connection.settimeout(5)
                    try:
                        heard.append(connection.recv(65536))
                        act(connection)
                    except OSError:
                        pass

        heard: list[bytes] = []
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        thread.join(5)


def slowly(before: bytes, piece: bytes) -> Act:
    def act(connection: socket.socket) -> None:
        connection.sendall(before)
        for _ in range(400):
            connection.sendall(piece)
            if select.select([connection], [], [], 0.02)[0]:  # the other side is gone
                return

    return act


TRICKLES = {
    "nothing": slowly(b"", b""),
    "status line": slowly(b"HTTP/1.1 200 ", b"O"),
    "headers": slowly(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "one header": slowly(b"HTTP/1.1 200 OK\r\nX: ", b"y"),
    "100-continue": slowly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk extensions": slowly(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a"),
    "chunks": slowly(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "trailers": slowly(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
    "body": slowly(b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
    "TLS": slowly(b"\x16\x03\x03\x40\x00", b"\x02"),
    "redirect": slowly(b"HTTP/1.1 302 Found\r\nLocation: /x\r\n", b"X: y\r\n"),
}


def exchange(url: str) -> None:
    with open_url(url, Deadline(0.25), direct=True) as response:
        while response.read1(65536):
            pass


@pytest.mark.parametrize("kind", TRICKLES)
def test_a_trickle_ends_at_the_deadline(kind: str) -> None:
    with serving(TRICKLES[kind]) as url:
        began = time.monotonic()
        with pytest.raises((TimeoutError, urllib.error.URLError)) as raised:
            exchange(url.replace("http:", "https:") if kind == "TLS" else url)
        assert time.monotonic() - began < 3.0
    assert isinstance(getattr(raised.value, "reason", raised.value), TimeoutError)


def test_a_stream_may_last_as_long_as_each_read_is_quick() -> None:
    act = slowly(b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n", b"a" * 100)
    with serving(act) as url:
        deadline = Deadline(2.0)
        stream = SteadyStream(open_url(url, deadline, direct=True), deadline, wait=2.0)
        deadline.restart(0.0)  # whatever was left of the first
        assert stream.read(150) == b"a" * 150
        time.sleep(0.05)
        assert stream.read(1000) == b"a" * 250
        assert stream.read(10) == b""
        stream.close()


def test_a_stream_that_trickles_ends() -> None:
    with serving(TRICKLES["body"]) as url:
        deadline = Deadline(2.0)
        stream = SteadyStream(open_url(url, deadline, direct=True), deadline, wait=0.2, slowest=1e9)
        with pytest.raises(TimeoutError):
            stream.read(100_000)
        stream.close()


def test_a_password_goes_to_the_server_and_not_into_the_address() -> None:
    seen: list[bytes] = []

    def act(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")

    with serving(act) as url:
        place = url.replace("http://", "http://me:p%40ss@")
        real = socket.socket.sendall
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "sendall", lambda sock, data: (seen.append(bytes(data)), real(sock, data))[1])
            with pytest.raises(OSError, match="401") as raised:
                open_url(place + "/a", Deadline(5.0), direct=True)
    assert "p%40ss" not in str(raised.value)
    sent = b"".join(seen)
    assert b"Authorization: Basic bWU6cEBzcw==" in sent
    assert b"p%40ss" not in sent


def test_work_is_left_behind_after_its_time() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="not done within"):
        within(0.1, lambda: time.sleep(3))
    assert time.monotonic() - began < 2.0
    with pytest.raises(SystemExit):
        within(1.0, lambda: exit(3))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "1e400"])
def test_a_download_time_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTVLM_DOWNLOAD_SECONDS", text)
    with pytest.raises(UserError, match="number of seconds"):
        download_seconds()
