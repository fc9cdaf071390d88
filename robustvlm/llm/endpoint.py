"""Which language model is asked, and with which key; the key is read from the environment and kept nowhere."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from robustvlm.errors import UserError

OWN_KEY = "ROBUSTVLM_LLM_KEY"
OPENAI_KEY = "OPENAI_API_KEY"
_PATH = "/chat/completions"


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
        except ValueError:
            usable = False
        if not usable:
            raise UserError(f"the endpoint must be a URL such as http://localhost:11434/v1, got '{self.url}'")
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
