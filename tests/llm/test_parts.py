"""The client's parts that need no server: pauses, keys, finding JSON."""

from __future__ import annotations

import contextlib
import datetime
import json
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.errors import UserError
from robustvlm.llm.client import BadAnswer, Prices, find_json
from robustvlm.llm.transport import LONGEST_PAUSE, AnswerCache, Endpoint, api_key, pause, retry_after


@given(st.integers(0, 40), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, 60))
def test_pauses_grow_stay_bounded_and_are_never_shorter_than_asked(attempt: int, jitter: float, asked: float) -> None:
    waited = pause(attempt, jitter, asked)
    assert (asked or 0.0) <= waited <= LONGEST_PAUSE
    assert pause(attempt + 1, jitter, asked) >= waited
    assert waited >= 0.25


def test_retry_after_takes_seconds_and_dates() -> None:
    now = datetime.datetime(2026, 1, 1, 12, 0, 0, tzinfo=datetime.timezone.utc)
    assert retry_after({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, now) == 30.0
    assert retry_after({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, now) == 0.0
    for text in ("", "-1", "nan", "inf", "tomorrow"):
        assert retry_after({"retry-after": text}, now) is None
    assert retry_after({}, now) is None


@pytest.mark.parametrize(
    ("url", "environment", "key"),
    [
        ("https://api.openai.com/v1", {"OPENAI_API_KEY": "general"}, "general"),
        ("http://localhost:8000/v1", {"OPENAI_API_KEY": "general"}, "general"),
        ("http://127.0.0.1:8000/v1", {"OPENAI_API_KEY": "general"}, "general"),
        ("http://10.1.2.3/v1", {"OPENAI_API_KEY": "general"}, None),
        ("http://localhost.evil.example/v1", {"OPENAI_API_KEY": "general"}, None),
        ("http://10.1.2.3/v1", {"OPENAI_API_KEY": "general", "ROBUSTVLM_LLM_KEY": "own"}, "own"),
        ("https://host/v1", {"OPENAI_API_KEY": "general", "ROBUSTVLM_LLM_KEY": " own\n"}, "own"),
        ("https://host/v1", {"ROBUSTVLM_LLM_KEY": ""}, None),
    ],
)
def test_which_key_goes_where(url: str, environment: dict[str, str], key: str | None) -> None:
    assert api_key(Endpoint(url, "m"), environment) == key


@pytest.mark.parametrize("key", ["a\r\nX-Evil: 1", "two words", "schlüssel"])
def test_keys_that_would_break_the_header_are_refused_unseen(key: str) -> None:
    with pytest.raises(UserError, match="ROBUSTVLM_LLM_KEY holds characters that no key has") as caught:
        api_key(Endpoint("https://host/v1", "m"), {"ROBUSTVLM_LLM_KEY": key})
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "chat"),
    [
        ("http://h:1/v1", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1/chat/completions"),
        ("https://h/deployments/x?api-version=2", "https://h/deployments/x/chat/completions?api-version=2"),
    ],
)
def test_where_questions_are_posted(url: str, chat: str) -> None:
    assert Endpoint(url, "m").chat_url == chat


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), _values, max_size=4), st.text(alphabet="ab \n`:", max_size=12))
def test_json_is_found_wherever_it_stands(value: dict[str, object], talk: str) -> None:
    assert find_json(f"{talk}{json.dumps(value)}{talk}") == value


def test_text_without_json_is_no_answer() -> None:
    for text in ("none", "{", "{'single': 1}", "<think>{}</think>", "{" * 3000):
        with pytest.raises(BadAnswer, match="no valid JSON object"):
            find_json(text)


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b"])
def test_prices_are_two_numbers(text: str) -> None:
    with pytest.raises(UserError, match="prices are written IN,OUT"):
        Prices.parse(text)


def test_prices_are_not_negative() -> None:
    for text in ("-1,2", "nan,1", "inf,1"):
        with pytest.raises(UserError, match="numbers of at least 0"):
            Prices.parse(text)


@pytest.mark.parametrize(
    "piece", ['{"a":', '{"', "{", "<think>", '{"a": [{', '{ "x', "{}{", '{"\\', "<think></think>{"], ids=repr
)
def test_a_long_answer_is_read_in_linear_time(piece: str) -> None:
    began = time.process_time()
    with contextlib.suppress(BadAnswer):
        find_json(piece * (400_000 // len(piece)))
    assert time.process_time() - began < 5.0  # quadratic, it takes minutes


@pytest.mark.parametrize("text", ['{"x: {"a": 1}', "{braces} {{}} {'b': 2} {\"a\": 1}", '{"q" {"a": 1} </think>'])
def test_json_is_found_behind_what_is_none(text: str) -> None:
    assert find_json(text) in ({"a": 1}, {})


@pytest.fixture
def cache(tmp_path: Path) -> AnswerCache:
    found = AnswerCache(tmp_path / "answers")
    found.put("k", '{"a": 1}', model="m", prompt="a secret question")
    return found


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_answers_are_for_nobody_else_to_read(cache: AnswerCache) -> None:
    assert (mode(cache.folder), mode(cache.folder / "k.json")) == (0o700, 0o600)
    assert cache.get("k") == '{"a": 1}'


def test_answers_that_others_can_read_are_closed(cache: AnswerCache) -> None:
    cache.folder.chmod(0o755)
    (cache.folder / "k.json").chmod(0o644)
    assert cache.get("k") == '{"a": 1}'
    assert (mode(cache.folder), mode(cache.folder / "k.json")) == (0o700, 0o600)


@pytest.mark.parametrize("where", ["folder", "file", "link"])
def test_answers_that_others_could_have_written_are_not_believed(cache: AnswerCache, where: str) -> None:
    file = cache.folder / "k.json"
    if where == "folder":
        cache.folder.chmod(0o777)
    elif where == "file":
        file.chmod(0o666)
    else:
        file.rename(cache.folder / "other.json")
        file.symlink_to("other.json")
    assert cache.get("k") is None
