"""Asking a language model for an answer that fits a schema."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from robustvlm.core.foreign_text import without_secrets
from robustvlm.core.network import Deadline
from robustvlm.llm.answers import MODES, Answer, BadAnswer, instructions, read_answer, response_format
from robustvlm.llm.cache import AnswerCache, answer_key, default_folder
from robustvlm.llm.endpoint import OPENAI_KEY, OWN_KEY, Endpoint, LlmError, api_key
from robustvlm.llm.retry import LONGEST_PAUSE, RETRIED, pause, retry_after
from robustvlm.llm.transport import Dropped, Reply, Unreachable, post_json
from robustvlm.llm.usage import Usage

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
        self.cache = cache or AnswerCache(default_folder())
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
        return answer_key(
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
        key = api_key(self.endpoint)
        try:
            reply = post_json(self.endpoint.chat_url, payload, key=key, timeout=seconds, direct=self.endpoint.local)
        except Unreachable as error:
            raise LlmError(f"{self._who} cannot be reached ({error}): check the URL and the network") from None
        except Dropped as error:
            self.usage = self.usage.with_reply(None)
            return None, str(error)
        if reply.status != 200:
            self.usage = self.usage.with_reply(None)
            self._refuse_hopeless(reply, key)
            return reply, f"status {reply.status}, {_message(reply, key)}"
        return reply, ""

    def _refuse_hopeless(self, reply: Reply, key: str | None) -> None:
        """Raise for a reply that no further attempt can better."""
        if reply.status in (401, 403):
            advice = f"set {OWN_KEY} (or {OPENAI_KEY}) to a key that it knows"
            sent = "refused the key" if key else "wants a key"
            raise LlmError(f"{self._who} {sent} (status {reply.status}): {advice}")
        if 300 <= reply.status < 400:
            where = "".join(filter(str.isprintable, reply.headers.get("location", "another place")))
            raise LlmError(f"{self._who} redirects to {where}: pass the URL that it redirects to, if you trust it")
        last_mode = self._mode + 1 == len(MODES)
        quota = reply.status == 429 and b"insufficient_quota" in reply.body
        if quota or (reply.status not in RETRIED and (last_mode or reply.status not in _TAKES_NO_FORMAT)):
            raise LlmError(f"{self._who} refused the question (status {reply.status}): {_message(reply, key)}")

    def _wait(self, attempt: int, reply: Reply | None, trouble: str) -> None:
        asked = retry_after(reply.headers) if reply is not None else None
        if asked is not None and asked > LONGEST_PAUSE:
            raise LlmError(f"{self._who} asks to wait {asked:,.0f} s ({trouble}): repeat the command after that")
        self._sleep(pause(attempt, random.random(), asked))

    def _read(self, reply: Reply, schema: type[Answer]) -> Answer:
        try:
            content = json.loads(reply.body)
        except (ValueError, RecursionError):
            content = {}
        self.usage = self.usage.with_reply(content)
        return read_answer(content, schema)

    @property
    def _who(self) -> str:
        return f"the language model '{self.endpoint.model}' at {without_secrets(self.endpoint.url)}"


def _message(reply: Reply, key: str | None) -> str:
    """Return what a server says of its refusal in one short line, without the key should it repeat that."""
    text = reply.body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        error = found.get("error", found) if isinstance(found, dict) else found
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        pass
    line = "".join(filter(str.isprintable, " ".join(text.split()))) or "no reason given"
    line = line.replace(key, "***") if key else line
    return line if len(line) <= 200 else line[:197] + "..."
