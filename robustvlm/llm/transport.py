"""One HTTP request: JSON out, bytes and headers back, under one deadline.

The standard library is enough for the one request that this protocol needs: no further package to install, and nothing
between us and the headers, the retries and the key. Redirects are not followed, since they would take the key along.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from robustvlm.core.network import Deadline, open_url

_MOST_BYTES = 32 * 2**20
_CHUNK = 65536


@dataclass(frozen=True)
class Reply:
    """What a server answered; header names are lower-case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Unreachable(Exception):
    """There is no server, or none to be trusted: asking again will not help."""


class Dropped(Exception):
    """The connection broke or took too long: asking again may help."""


def post_json(url: str, payload: object, *, key: str | None, timeout: float, direct: bool = False) -> Reply:
    """Post `payload` as JSON and return the reply, whatever its status.

    Args:
        key: bearer token, or None.
        timeout: seconds for the whole exchange, from the look-up of the name to the last byte of the body.
        direct: pass over the proxies that the environment names.

    Raises:
        Unreachable: no such host, connection refused, or a certificate that does not hold.
        Dropped: the connection broke, or the time is over.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "robustvlm"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data=json.dumps(payload).encode(), headers=headers, method="POST")
    try:
        with open_url(request, Deadline(timeout), direct=direct, follow=False) as response:
            return _reply(response.status, response)
    except urllib.error.HTTPError as error:
        with error:
            return _reply(error.code, error)
    except urllib.error.URLError as error:
        raise _named(error.reason) from None
    except (OSError, http.client.HTTPException) as error:
        raise _named(error) from None


def _reply(status: int, response: Any) -> Reply:
    """Read a body piece by piece, up to a size that no answer has."""
    pieces: list[bytes] = []
    size = 0
    try:
        while piece := response.read1(_CHUNK) if hasattr(response, "read1") else response.read():
            pieces.append(piece)
            size += len(piece)
            if size > _MOST_BYTES:
                raise Unreachable(f"the answer is longer than {_MOST_BYTES // 2**20} MiB")
        if getattr(response, "length", None):
            raise Dropped("the answer broke off")
    except (OSError, http.client.HTTPException) as error:
        raise _named(error) from None
    return Reply(status, {name.lower(): value for name, value in response.headers.items()}, b"".join(pieces))


def _named(reason: object) -> Unreachable | Dropped:
    if isinstance(reason, TimeoutError):
        return Dropped("no answer in time")
    if isinstance(reason, (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError)):
        return Unreachable(str(reason))
    if isinstance(reason, (OSError, http.client.HTTPException)):
        return Dropped(str(reason) or type(reason).__name__)
    return Unreachable(str(reason))
