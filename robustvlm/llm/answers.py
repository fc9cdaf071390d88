"""Getting a typed answer: asking for a JSON schema in the ways that servers know, and reading what comes back."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

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
