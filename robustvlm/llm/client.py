"""Asking a language model for an answer that fits a schema, reading it, and counting what it cost."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from robustvlm.core.network import Deadline
from robustvlm.errors import UserError, setting
from robustvlm.llm import transport
from robustvlm.llm.transport import AnswerCache, Endpoint, LlmError, Reply
from robustvlm.text import HIDDEN, address_shown, without_secrets

# Getting a typed answer: asking for a JSON schema in the ways that servers know, and reading what comes back

Answer = TypeVar("Answer", bound=BaseModel)

_OBJECT = re.compile(r'\{\s*["}]')
_MOST_TRIES = 50

MODES = ("json_schema", "json_object", "plain")
"""From the strictest to the one that every server knows."""


class BadAnswer(Exception):
    """The model's answer is not what was asked for; the message goes back to it."""


def response_format(mode: str, schema: type[BaseModel]) -> dict[str, Any]:
    """Return the fields of a request that ask for a JSON answer in one of `MODES`.

    Example:
        >>> response_format("json_object", BaseModel)
        {'response_format': {'type': 'json_object'}}
    """
    if mode == "plain":
        return {}
    if mode == "json_object":
        return {"response_format": {"type": "json_object"}}
    described = {"name": schema.__name__, "strict": True, "schema": schema.model_json_schema()}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def instructions(mode: str, schema: type[BaseModel]) -> str:
    """Return what must be added to the prompt where the server does not enforce the schema."""
    if mode == "json_schema":
        return ""
    described = json.dumps(schema.model_json_schema(), sort_keys=True)
    return f"\n\nAnswer with one JSON object and nothing else. It must be valid under this JSON schema:\n{described}"


def read_answer(reply: Any, schema: type[Answer]) -> Answer:
    """Return the validated answer in a parsed chat completion.

    Raises:
        BadAnswer: no text, cut off, refused, no JSON in it, or not valid under the schema.
    """
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        content = message["content"]
    except (KeyError, IndexError, TypeError):
        raise BadAnswer("the reply holds no message") from None
    if isinstance(content, list):  # some servers send the text in parts
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if message.get("refusal"):
        raise BadAnswer("the model refused to answer")
    if not isinstance(content, str) or not content.strip():
        raise BadAnswer("the answer is empty")
    try:
        return schema.model_validate(find_json(content))
    except ValidationError as error:
        raise BadAnswer(_said(error)) from None
    except BadAnswer:
        if choice.get("finish_reason") == "length":
            raise BadAnswer("the answer was cut off: it must be shorter") from None
        raise


def find_json(text: str) -> Any:
    """Return the JSON object in a model's text, past its thoughts, its code fence and its small talk.

    Raises:
        BadAnswer: there is none.

    Example:
        >>> find_json('<think>{"a": 0}?</think>Sure!\\n```json\\n{"a": 1}\\n```')
        {'a': 1}
    """
    text = _without_thoughts(text)
    decoder = json.JSONDecoder()
    # Each try may read to the end: a limited number of them keeps the time linear in the length of the text.
    for start in islice(_OBJECT.finditer(text), _MOST_TRIES):
        try:
            return decoder.raw_decode(text, start.start())[0]
        except (ValueError, RecursionError):
            continue
    raise BadAnswer("the answer holds no valid JSON object")


def _without_thoughts(text: str) -> str:
    """Return a text without what stands between <think> and </think>, in one walk."""
    kept: list[str] = []
    at = 0
    while True:
        begin = text.find("<think>", at)
        end = text.find("</think>", begin) if begin >= 0 else -1
        if end < 0:
            return "".join([*kept, text[at:]])
        kept.append(text[at:begin])
        at = end + len("</think>")


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "the answer"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}"


# What a language model's answers cost: requests, tokens and, where prices are given, money


@dataclass(frozen=True)
class Prices:
    """Price of a million tokens read and of a million tokens written, in any currency.

    Raises:
        UserError: a negative price.

    Example:
        >>> Prices.parse("0.15,0.60")
        Prices(read=0.15, written=0.6)
    """

    read: float
    written: float

    def __post_init__(self) -> None:
        if not (0 <= self.read < math.inf and 0 <= self.written < math.inf):
            raise UserError(f"prices must be numbers of at least 0, got {self.read:g} and {self.written:g}")

    @classmethod
    def parse(cls, text: str) -> Prices:
        """Read `IN,OUT`."""
        try:
            read, written = (float(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"prices are written IN,OUT per million tokens, as 0.15,0.60; got '{text}'") from None
        return cls(read, written)


@dataclass(frozen=True)
class Usage:
    """Counts over any number of questions; `uncounted` requests are those whose reply told no tokens.

    Example:
        >>> usage = Usage(requests=2, cached=3, tokens_read=1000, tokens_written=500)
        >>> print(usage.describe(Prices(1.0, 2.0)))
        2 requests, 3 answers from the cache, 1,000 tokens read, 500 written, cost 0.0020
    """

    requests: int = 0
    cached: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    uncounted: int = 0

    def with_reply(self, reply: Any) -> Usage:
        """Return the counts with one more reply, a parsed chat completion or None where there was none."""
        told = reply.get("usage") if isinstance(reply, dict) else None
        read, written = (_count(told, name) for name in ("prompt_tokens", "completion_tokens"))
        if read is None or written is None:
            return replace(self, requests=self.requests + 1, uncounted=self.uncounted + (reply is not None))
        return replace(
            self,
            requests=self.requests + 1,
            tokens_read=self.tokens_read + read,
            tokens_written=self.tokens_written + written,
        )

    def with_cached(self) -> Usage:
        """Return the counts with one more answer that needed no request."""
        return replace(self, cached=self.cached + 1)

    def cost(self, prices: Prices) -> float:
        """Return what the tokens cost; requests that told no tokens are not in it."""
        return (self.tokens_read * prices.read + self.tokens_written * prices.written) / 1e6

    def describe(self, prices: Prices | None = None) -> str:
        """Return one line for the user."""
        words = [f"{self.requests:,} requests", f"{self.cached:,} answers from the cache"]
        words += [f"{self.tokens_read:,} tokens read", f"{self.tokens_written:,} written"]
        if prices is not None:
            words.append(f"cost {self.cost(prices):.4f}")
        if self.uncounted:
            words.append(f"{self.uncounted:,} replies told no tokens")
        return ", ".join(words)


def _count(told: Any, name: str) -> int | None:
    value = told.get(name) if isinstance(told, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


# Asking a language model for an answer that fits a schema

_TAKES_NO_FORMAT = frozenset((400, 404, 415, 422, 501))


class LlmClient:
    """A language model behind an OpenAI-compatible endpoint (OpenAI, vLLM, Ollama, llama.cpp and others).

    The answer's schema is enforced by the server where it can (`json_schema`, then `json_object`, then words alone),
    and checked here in any case. Failures that may pass (rate limits, server errors, broken connections, timeouts,
    answers that do not fit) are tried again, up to `attempts` requests a question. `usage` counts what was spent.

    Args:
        endpoint: server and model.
        cache: where answers are kept; the user's cache folder by default.
        timeout: seconds for one request, from the look-up of the name to the last byte.
        attempts: most requests for one question.
        patience: seconds for one question, all its requests and pauses together.
        temperature: randomness of the answer; the server's default when None.
        sleep: waits the given seconds between attempts.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        cache: AnswerCache | None = None,
        timeout: float = 180.0,
        attempts: int = 5,
        patience: float = 900.0,
        temperature: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.endpoint, self.timeout, self.attempts, self.temperature = endpoint, timeout, attempts, temperature
        self.patience = patience
        self.cache = cache or AnswerCache(transport.default_folder())
        self.usage = Usage()
        self._sleep = sleep
        self._mode = 0

    def ask(self, prompt: str, schema: type[Answer], *, system: str = "") -> Answer:
        """Return the model's answer to `prompt` as an instance of `schema`, from the cache if it was asked before.

        Raises:
            LlmError: no server, no access, or no usable answer in `attempts` requests; the message says which.
        """
        key = self._key(prompt, schema, system)
        known = self._known(key, schema)
        if known is not None:
            self.usage = self.usage.with_cached()
            return known
        answer = self._ask(prompt, schema, system)
        self.cache.put(key, answer.model_dump_json(), model=self.endpoint.model, prompt=prompt)
        return answer

    def _key(self, prompt: str, schema: type[Answer], system: str) -> str:
        described = json.dumps(schema.model_json_schema(), sort_keys=True)
        return transport.answer_key(
            [
                without_secrets(self.endpoint.chat_url),
                self.endpoint.model,
                system,
                prompt,
                described,
                repr(self.temperature),
            ]
        )

    def _known(self, key: str, schema: type[Answer]) -> Answer | None:
        kept = self.cache.get(key)
        try:
            return None if kept is None else schema.model_validate_json(kept)
        except ValidationError:  # kept by a version that checked less
            return None

    def _ask(self, prompt: str, schema: type[Answer], system: str) -> Answer:
        complaint = trouble = ""
        attempt = 0
        deadline = Deadline(self.patience)
        while attempt < self.attempts:
            try:
                seconds = min(self.timeout, deadline.left())
            except TimeoutError:
                said = f"; the last: {trouble}" if trouble else ""
                raise LlmError(f"{self._who} gave no usable answer in {self.patience:,.0f} s{said}") from None
            reply, trouble = self._post(self._payload(prompt, schema, system, complaint), seconds)
            if reply is not None and reply.status in _TAKES_NO_FORMAT and self._mode + 1 < len(MODES):
                self._mode += 1  # not a failure: this server knows fewer ways of asking
                continue
            if reply is not None and reply.status == 200:
                try:
                    return self._read(reply, schema)
                except BadAnswer as error:
                    complaint = trouble = str(error)
            elif attempt + 1 < self.attempts:
                self._wait(attempt, reply, trouble)
            attempt += 1
        raise LlmError(f"{self._who} gave no usable answer in {self.attempts} attempts; the last: {trouble}")

    def _payload(self, prompt: str, schema: type[Answer], system: str, complaint: str) -> dict[str, Any]:
        mode = MODES[self._mode]
        if complaint:
            prompt += f"\n\nAn earlier answer was not usable ({complaint}). Answer again, in full."
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt + instructions("plain" if complaint else mode, schema)})
        payload = {"model": self.endpoint.model, "messages": messages, **response_format(mode, schema)}
        return payload if self.temperature is None else payload | {"temperature": self.temperature}

    def _post(self, payload: dict[str, Any], seconds: float) -> tuple[Reply | None, str]:
        """Return the reply, or None for a broken connection; and, where it is no answer, what is wrong."""
        key = transport.api_key(self.endpoint)
        try:
            reply = transport.post_json(
                self.endpoint.chat_url, payload, key=key, timeout=seconds, direct=self.endpoint.local
            )
        except transport.Unreachable as error:
            raise LlmError(f"{self._who} cannot be reached ({error}): check the URL and the network") from None
        except transport.Dropped as error:
            self.usage = self.usage.with_reply(None)
            return None, str(error)
        if reply.status != 200:
            self.usage = self.usage.with_reply(None)
            self._refuse_hopeless(reply, key)
            return reply, f"status {reply.status}, {self._message(reply, key)}"
        return reply, ""

    def _refuse_hopeless(self, reply: Reply, key: str | None) -> None:
        """Raise for a reply that no further attempt can better."""
        if reply.status in (401, 403):
            advice = f"set {transport.OWN_KEY} (or {transport.OPENAI_KEY}) to a key that it knows"
            sent = "refused the key" if key else "wants a key"
            raise LlmError(f"{self._who} {sent} (status {reply.status}): {advice}")
        if 300 <= reply.status < 400:
            where = "".join(filter(str.isprintable, address_shown(reply.headers.get("location", "another place"))))
            raise LlmError(f"{self._who} redirects to '{where}': pass the URL that it redirects to, if you trust it")
        last_mode = self._mode + 1 == len(MODES)
        quota = reply.status == 429 and b"insufficient_quota" in reply.body
        if quota or (reply.status not in transport.RETRIED and (last_mode or reply.status not in _TAKES_NO_FORMAT)):
            raise LlmError(f"{self._who} refused the question (status {reply.status}): {self._message(reply, key)}")

    def _wait(self, attempt: int, reply: Reply | None, trouble: str) -> None:
        asked = transport.retry_after(reply.headers) if reply is not None else None
        if asked is not None and asked > transport.LONGEST_PAUSE:
            raise LlmError(f"{self._who} asks to wait {asked:,.0f} s ({trouble}): repeat the command after that")
        self._sleep(transport.pause(attempt, random.random(), asked))

    def _read(self, reply: Reply, schema: type[Answer]) -> Answer:
        try:
            content = json.loads(reply.body)
        except (ValueError, RecursionError):
            content = {}
        self.usage = self.usage.with_reply(content)
        return read_answer(content, schema)

    def _message(self, reply: Reply, key: str | None) -> str:
        return _message(reply, (*((key,) if key else ()), *self.endpoint.secrets))

    @property
    def _who(self) -> str:
        return f"the language model '{self.endpoint.model}' at {address_shown(self.endpoint.url)}"


def _message(reply: Reply, secrets: Iterable[str]) -> str:
    """Return what a server says of its refusal in one short line, without the keys should it repeat one."""
    text = reply.body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        error = found.get("error", found) if isinstance(found, dict) else found
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        pass
    line = "".join(filter(str.isprintable, " ".join(text.split()))) or "no reason given"
    for secret in secrets:
        line = line.replace(secret, HIDDEN)
    return line if len(line) <= 200 else line[:197] + "..."


def open_client(url: str | None, model: str | None, prices: str | None = None) -> LlmClient | None:
    """Return the client that the options name, None where they name none.

    Raises:
        UserError: one option without the other, no URL, or prices that are none.

    Example:
        >>> open_client(None, None) is None
        True
    """
    if prices is not None:
        Prices.parse(prices)
        if url is None and model is None:
            raise UserError(
                f"{setting('llm_prices')} is for {setting('llm', 'URL')} and {setting('llm_model', 'NAME')}"
            )
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise UserError(f"{setting('llm', 'URL')} and {setting('llm_model', 'NAME')} belong together")
    return LlmClient(Endpoint(url, model))


def spent(client: LlmClient, prices: str | None) -> str:
    """Return one line on requests, tokens and cost."""
    return f"{client.endpoint.model}: {client.usage.describe(None if prices is None else Prices.parse(prices))}"
