"""The client against a real server on loopback: what it sends, what it takes, what it does when things go wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from scripted import Act, break_off, completion, drop, hang, serving, status, trickle

from robustvlm.errors import UserError
from robustvlm.llm import Endpoint, LlmClient, LlmError, Prices
from robustvlm.llm.transport import AnswerCache

Make = Callable[..., LlmClient]


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    legs: int


CAT = {"name": "cat", "legs": 4}


def test_sends_one_typed_question_and_reads_the_answer(make_client: Make) -> None:
    with serving(completion(CAT)) as script:
        client = make_client(script, temperature=0.5)
        answer = client.ask("Which animal?", Animal, system="Be brief.")
    assert answer == Animal(name="cat", legs=4)
    assert script.paths == ["/v1/chat/completions"]
    (request,) = script.requests
    assert request["model"] == "test-model"
    assert request["temperature"] == 0.5
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    schema = request["response_format"]["json_schema"]
    assert schema["strict"] is True
    # What servers that enforce a schema strictly insist on.
    assert schema["schema"]["additionalProperties"] is False
    assert set(schema["schema"]["required"]) == {"name", "legs"}
    assert script.keys == [None]


def test_cache_answers_without_a_request_and_tells_questions_apart(make_client: Make, tmp_path: Path) -> None:
    with serving(completion(CAT), completion({"name": "bird", "legs": 2})) as script:
        first = make_client(script)
        assert first.ask("A?", Animal) == first.ask("A?", Animal)
        assert make_client(script).ask("A?", Animal).name == "cat"
        assert len(script.requests) == 1
        assert make_client(script).ask("B?", Animal).name == "bird"
        assert make_client(script, temperature=1.0).ask("A?", Animal).name == "bird"
        assert len(script.requests) == 3
    assert (first.usage.requests, first.usage.cached) == (1, 1)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".json"]


def test_damaged_cache_files_are_asked_again(make_client: Make, tmp_path: Path) -> None:
    with serving(completion(CAT)) as script:
        make_client(script).ask("A?", Animal)
        (file,) = (tmp_path / "cache").glob("*.json")
        for content in ("", "[]", '{"format": 1}', '{"format": 1, "answer": {"name": 3}}'):
            file.write_text(content)
            assert make_client(script).ask("A?", Animal).name == "cat"
        assert len(script.requests) == 5


def test_a_cache_that_cannot_be_written_costs_no_answer(make_client: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with serving(completion(CAT)) as script:
        assert make_client(script, cache=AnswerCache(tmp_path / "file" / "cache")).ask("A?", Animal).legs == 4


@pytest.mark.parametrize(
    "fault", [status(500), status(503), status(429), drop, break_off], ids=["500", "503", "429", "drop", "break off"]
)
def test_passing_faults_are_tried_again(make_client: Make, slept: list[float], fault: Act) -> None:
    with serving(fault, fault, completion(CAT)) as script:
        client = make_client(script)
        assert client.ask("A?", Animal).name == "cat"
    assert len(script.requests) == client.usage.requests == 3
    assert 0.25 <= slept[0] < 0.5 <= slept[1] < 1.0


def test_all_requests_of_a_question_together_have_a_deadline(make_client: Make) -> None:
    with serving(hang) as script:
        began = time.monotonic()
        with pytest.raises(LlmError, match=r"no usable answer in 0 s; the last: no .*answer in time"):
            make_client(script, timeout=0.2, patience=0.3, attempts=50).ask("A?", Animal)
        assert time.monotonic() - began < 3.0


def test_a_key_in_the_address_is_not_shown(make_client: Make) -> None:
    with serving(status(404)) as script:
        client = make_client(script)
        client.endpoint = Endpoint(f"{script.url}?api_key=s3cret", "m")
        with pytest.raises(LlmError) as raised:
            client.ask("A?", Animal)
    assert script.paths[0].endswith("?api_key=s3cret")
    assert "api_key=***" in str(raised.value)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (status(307, Location="http://h/v2?code=s3cret"), r"redirects to 'http://h/v2\?code=\*\*\*': pass"),
        (status(413, {"error": "no such code: s3cret"}), r"no such code: \*\*\*$"),
        (status(401), r"v1\?code=\*\*\* "),
    ],
)
def test_a_key_of_any_name_in_the_address_is_not_shown(make_client: Make, fault: Act, said: str) -> None:
    with serving(fault) as script:
        client = make_client(script)
        client.endpoint = Endpoint(f"{script.url}?code=s3cret", "m")
        with pytest.raises(LlmError, match=said) as raised:
            client.ask("A?", Animal)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("slow", [hang, trickle])
def test_slow_answers_are_given_up(make_client: Make, slow: Act) -> None:
    with serving(slow, completion(CAT)) as script:
        assert make_client(script, timeout=0.25).ask("A?", Animal).name == "cat"
    assert len(script.requests) == 2


def test_attempts_are_capped_and_the_last_trouble_is_told(make_client: Make, slept: list[float]) -> None:
    told = r"'test-model' .* in 3 attempts; .* status 500, out of steam \[31m$"
    fault = status(500, {"error": {"message": "out of\nsteam \x1b[31m"}})
    with serving(fault) as script, pytest.raises(LlmError, match=told):
        make_client(script, attempts=3).ask("A?", Animal)
    assert len(script.requests) == 3
    assert len(slept) == 2


def test_retry_after_is_honoured_up_to_a_minute(make_client: Make, slept: list[float]) -> None:
    with serving(status(429, Retry_After="7"), completion(CAT)) as script:
        make_client(script).ask("A?", Animal)
        assert slept == [7.0]
    with serving(status(503, Retry_After="3600")) as script:
        with pytest.raises(LlmError, match="asks to wait 3,600 s"):
            make_client(script).ask("B?", Animal)
        assert len(script.requests) == 1


BAD = {
    "no JSON": completion("I would rather talk about dogs {"),
    "wrong type": completion({"name": "cat", "legs": "many"}),
    "field missing": completion({"name": "cat"}),
    "field too many": completion(CAT | {"wings": 0}),
    "empty": completion(""),
    "nothing": completion(None),
    "no choice": status(200, {"error": {"message": "overloaded"}}),
    "no object": status(200, [1, 2]),
    "cut off": completion('{"name": "ca', finish_reason="length"),
    "refusal": completion(None, refusal="no"),
}


@pytest.mark.parametrize("kind", BAD)
def test_unusable_answers_are_asked_again_with_the_reason(make_client: Make, slept: list[float], kind: str) -> None:
    with serving(BAD[kind], completion(CAT)) as script:
        assert make_client(script).ask("A?", Animal).name == "cat"
    asked_again = script.requests[1]["messages"][-1]["content"]
    assert "An earlier answer was not usable" in asked_again
    assert '"legs"' in asked_again  # the schema in words too, for servers that ignore response_format
    assert not slept


def test_unusable_answers_are_never_cached(make_client: Make, tmp_path: Path) -> None:
    with serving(BAD["wrong type"]) as script:
        for _ in range(2):
            with pytest.raises(LlmError, match="in 2 attempts; the last: legs: Input should be a valid integer"):
                make_client(script, attempts=2).ask("A?", Animal)
    assert len(script.requests) == 4
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("refused", [1, 2])
def test_servers_without_schemas_are_asked_in_a_plainer_way(
    make_client: Make, slept: list[float], refused: int
) -> None:
    no_format = status(400, {"error": {"message": "response_format is not supported"}})
    with serving(*[no_format] * refused, completion(CAT)) as script:
        client = make_client(script, attempts=1)
        assert client.ask("A?", Animal).name == "cat"
        client.ask("B?", Animal)
    formats = [request.get("response_format", {}).get("type") for request in script.requests]
    assert formats == [*["json_schema", "json_object", None][: refused + 1], formats[refused]]
    assert '"legs"' in script.requests[-1]["messages"][-1]["content"]
    assert not slept


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            status(401, {"error": {"message": "bad key secret-key"}}),
            r"refused the key \(status 401\): set ROBUSTVLM_LLM",
        ),
        (status(403), r"refused the key \(status 403\)"),
        (status(400, {"error": "no model"}), r"refused the question \(status 400\): no model"),
        (status(413, {"error": "see secret-key"}), r"refused the question \(status 413\): see \*\*\*$"),
        (status(429, {"error": {"code": "insufficient_quota", "message": "pay"}}), r"\(status 429\): pay"),
        (status(307, Location="http://127.0.0.1:1/steal"), "redirects to 'http://127.0.0.1:1/steal'"),
    ],
)
def test_hopeless_faults_end_at_once_and_never_show_the_key(
    make_client: Make, slept: list[float], monkeypatch: pytest.MonkeyPatch, fault: Act, message: str
) -> None:
    monkeypatch.setenv("ROBUSTVLM_LLM_KEY", "secret-key")
    with serving(fault) as script, pytest.raises(LlmError, match=message) as caught:
        make_client(script).ask("A?", Animal)
    assert "secret-key" not in str(caught.value)
    assert len(script.requests) <= 3  # at most once in every mode
    assert not slept


def test_no_server_is_one_clear_line(make_client: Make) -> None:
    with serving(completion(CAT)) as script:
        pass
    with pytest.raises(LlmError, match=r"cannot be reached .*: check the URL and the network"):
        make_client(script).ask("A?", Animal)


def test_the_key_is_sent_and_written_nowhere(
    make_client: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "general-key")
    with serving(completion(CAT)) as script:
        make_client(script).ask("A?", Animal)
        monkeypatch.setenv("ROBUSTVLM_LLM_KEY", "own-key")
        make_client(script).ask("B?", Animal)
    assert script.keys == ["Bearer general-key", "Bearer own-key"]
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "cat" in written
    assert "-key" not in written


def test_usage_counts_every_request_and_what_it_costs(make_client: Make) -> None:
    with serving(status(500), completion(CAT), completion(CAT, tokens=False)) as script:
        client = make_client(script)
        client.ask("A?", Animal)
        client.ask("B?", Animal)
        client.ask("B?", Animal)
    usage = client.usage
    assert (usage.requests, usage.cached, usage.tokens_read, usage.tokens_written) == (3, 1, 100, 20)
    assert usage.uncounted == 1
    assert usage.cost(Prices(10.0, 50.0)) == pytest.approx((100 * 10 + 20 * 50) / 1e6)
    assert "1 replies told no tokens" in usage.describe()


@pytest.mark.parametrize(
    "url", ["", "localhost:11434", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1"]
)
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"must be a URL such as http://localhost:11434/v1"):
        Endpoint(url, "m")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("localhost:1/v1?api-key=s3cret", "localhost:1/v1?api-key=***"),
        ("localhost:1/v1?code=s3cret&v=2", "localhost:1/v1?code=***&v=***"),
        ("host/v1?s3cret", "host/v1?***"),
        ("me:s3cret@host/v1", "***@host/v1"),
        ("me:s3/cr?et@host/v1", "***@host/v1"),
        ("ftp://me:s3cret@host/v1?code=s3cret#s3cret", "ftp://***@host/v1?code=***"),
        ("http://host/v1?code=s3 cret", "http://host/v1?code=***"),
        ("http://host/vä?code=s3cret", "http://host/vä?code=***"),
    ],
)
def test_addresses_that_are_refused_are_shown_without_what_may_be_a_key(url: str, shown: str) -> None:
    with pytest.raises(UserError, match=r"must be a URL such as http://localhost:11434/v1") as caught:
        Endpoint(url, "m")
    assert str(caught.value).endswith(f"got '{shown}'")


def test_urls_with_passwords_are_refused_without_repeating_them() -> None:
    with pytest.raises(UserError, match="no user name or password") as caught:
        Endpoint("https://me:hidden@host/v1", "m")
    assert "hidden" not in str(caught.value)


def test_questions_to_the_model_are_plain_json(make_client: Make) -> None:
    with serving(
        completion(f"<think>{json.dumps({'name': 1})}</think>Here: ```json\n{json.dumps(CAT)}\n```")
    ) as script:
        assert make_client(script).ask("Ä?", Animal).name == "cat"
    content: Any = script.requests[0]["messages"][-1]["content"]
    assert content == "Ä?"
