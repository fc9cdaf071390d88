"""One question to a language model's server: where it goes, how often it is asked again, and the answers kept.

The standard library is enough for the one request that this protocol needs: no further package to install, and nothing
between us and the headers, the retries and the key. Redirects are not followed, since they would take the key along.
"""

import contextlib
import datetime
import email.utils
import hashlib
import http.client
import ipaddress
import json
import os
import socket
import ssl
import stat
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import platformdirs

from robustvlm.core.files import write_text
from robustvlm.core.network import Deadline, open_url
from robustvlm.errors import UserError
from robustvlm.text import address_shown

# One HTTP request: JSON out, bytes and headers back, under one deadline

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


# How long to wait before asking again

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 60.0
RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
"""Status codes that may be gone at the next attempt."""


def pause(attempt: int, jitter: float, asked: float | None = None) -> float:
    """Return the seconds to wait after failure number `attempt` (from 0): exponential, with jitter, as asked at least.

    Args:
        jitter: uniform on [0, 1): spreads clients that failed together.
        asked: what the server's Retry-After says, if anything.

    Example:
        >>> pause(0, 0.0), pause(3, 0.5), pause(0, 0.0, asked=7.0)
        (0.25, 3.0, 7.0)
    """
    backoff = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * (0.5 + 0.5 * jitter)
    return max(backoff, asked or 0.0)


def retry_after(headers: Mapping[str, str], now: datetime.datetime | None = None) -> float | None:
    """Return the seconds that a Retry-After header (RFC 9110, 10.2.3) asks for, a number or a date; None without one.

    Example:
        >>> retry_after({"retry-after": "2.5"}), retry_after({"retry-after": "soon"})
        (2.5, None)
    """
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
        return seconds if 0 <= seconds < float("inf") else None
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (when - (now or datetime.datetime.now(datetime.timezone.utc))).total_seconds())


# Which language model is asked, and with which key; the key is read from the environment and kept nowhere

OWN_KEY = "ROBUSTVLM_LLM_KEY"
OPENAI_KEY = "OPENAI_API_KEY"
_PATH = "/chat/completions"
_SHORTEST_KEY = 6


class LlmError(UserError):
    """The language model could not be asked, or gave no usable answer."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server and a model on it, such as `http://localhost:11434/v1` and `llama3.1`.

    Raises:
        UserError: no http(s) URL, a password inside it, or no model.

    Example:
        >>> Endpoint("http://localhost:11434/v1/", "llama3.1").chat_url
        'http://localhost:11434/v1/chat/completions'
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            # Reading the port is what checks it.
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
            # What HTTP cannot send would fail at the first question, with the whole address in the message.
            usable = usable and (parts.path + parts.query).isascii() and self.url.isprintable() and " " not in self.url
        except ValueError:
            usable = False
        if not usable:
            shown = address_shown(self.url)
            raise UserError(f"the endpoint must be a URL such as http://localhost:11434/v1, got '{shown}'")
        if parts.username is not None or parts.password is not None:
            raise UserError(f"the endpoint's URL must hold no user name or password: put the key into {OWN_KEY}")
        if not self.model.strip():
            raise UserError("say which model to ask, as --llm-model NAME")

    @property
    def chat_url(self) -> str:
        """Where questions are posted; a query in the URL stays."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix(_PATH) + _PATH
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))

    @property
    def secrets(self) -> tuple[str, ...]:
        """Values in the URL's query that may be a key: what a server repeats of them is not shown."""
        values = (value for _, value in parse_qsl(urlsplit(self.url).query))
        return tuple(value for value in values if len(value) >= _SHORTEST_KEY)

    @property
    def local(self) -> bool:
        """Whether the server is this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    @property
    def encrypted(self) -> bool:
        """Whether the connection is encrypted."""
        return urlsplit(self.url).scheme == "https"


def api_key(endpoint: Endpoint, environment: Mapping[str, str] | None = None) -> str | None:
    """Return the key to send: ROBUSTVLM_LLM_KEY, else OPENAI_API_KEY; None where neither is set or may be sent.

    OPENAI_API_KEY may be somebody's general key, so it never goes over an unencrypted connection to another machine;
    ROBUSTVLM_LLM_KEY was set for this program and goes where the user points it.

    Example:
        >>> api_key(Endpoint("http://10.0.0.7/v1", "m"), {"OPENAI_API_KEY": "k"}) is None
        True
    """
    found = os.environ if environment is None else environment
    own, general = found.get(OWN_KEY, "").strip(), found.get(OPENAI_KEY, "").strip()
    name, key = (OWN_KEY, own) if own else (OPENAI_KEY, general)
    if not key or (not own and not endpoint.encrypted and not endpoint.local):
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{name} holds characters that no key has: set it again")
    return key


# Answers kept on disk, so that the same question to the same model is paid for once and answered alike every time

_FORMAT = 1


def answer_key(parts: Sequence[str]) -> str:
    """Return a digest of all that decides an answer, each part told apart from its neighbours.

    Example:
        >>> answer_key(["ab", "c"]) == answer_key(["a", "bc"])
        False
    """
    text = json.dumps([_FORMAT, *parts]).encode()
    return hashlib.blake2b(text, digest_size=20).hexdigest()


def default_folder() -> Path:
    """Return where answers are kept unless another folder is named."""
    return Path(platformdirs.user_cache_dir("robustvlm")) / "llm"


class AnswerCache:
    """A folder with one JSON file an answer: what was asked of which model, and what it said.

    A folder that cannot be written to costs only the requests saved; a damaged file counts as none. Prompts and answers
    are the user's own: only the owner may read them, and files that somebody else could have written are not believed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> str | None:
        """Return the answer kept under `key`, as JSON text, or None."""
        try:
            if not self._ours(self.folder) or not self._ours(self._path(key)):
                return None
            content = json.loads(self._path(key).read_text(encoding="utf-8"))
            return json.dumps(content["answer"]) if content["format"] == _FORMAT else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: str, answer: str, *, model: str, prompt: str) -> None:
        """Keep an answer, JSON text, under `key`; model and prompt are for people who look into the file."""
        content = {"format": _FORMAT, "model": model, "prompt": prompt, "answer": json.loads(answer)}
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._ours(self.folder):
                write_text(self._path(key), json.dumps(content, indent=1, ensure_ascii=False) + "\n", private=True)

    def _ours(self, path: Path) -> bool:
        """Whether a file or folder is this user's and nobody else could write to it; what others may read is closed."""
        if not hasattr(os, "getuid"):  # Windows: the user's own cache folder is closed to others
            return True
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
            return False
        if stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(stat.S_IMODE(found.st_mode) & 0o700)
        return not stat.S_IMODE(found.st_mode) & 0o022

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
