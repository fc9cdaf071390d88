"""Others' text, fit to be shown and stored."""

from __future__ import annotations

import json
import sys
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.cli.app import given_command
from robustvlm.errors import UserError
from robustvlm.text import ascii_json, secrets_cut, visible, visible_json, without_secrets

KEPT = [
    "wds:data/test-{000..007}.tar",
    "imagefolder:photos?links=1",
    "https://host/a.tar?part=7&version=2026-01-01",
    "http://localhost:11434/v1",
    "me@host writes: what is a://b?",
    "hf:org/name?split=test&revision=main",
    "wds:https://host/get?key=val%2Fshard-0.tar&expires=5",
    "https://host:8080/@eaDir/a.tar?author=bob&design=5&signal=6",
    "parquet:/data/a.parquet?image=img&label=session",
    "imagefolder:/photos/me:you@home",
    "C:\\photos\\dog@home",
]
CUT = {
    "https://me:s3cret@host/a": "https://***@host/a",
    "http://s3cret@host": "http://***@host",
    "https://me:s3c@ret@host/a": "https://***@host/a",
    "https://it's:s3cret@host/a": "https://***@host/a",
    "wds:HTTPS://me:s3cret@host/a.tar?image=jpg": "wds:HTTPS://***@host/a.tar?image=jpg",
    "https://me:s3/cr#et?x@host/a": "https://***@host/a",
    "(host='h', port=443): Max retries exceeded with url: /a.tar?Signature=s3cret&p=1 (timed out)": (
        "(host='h', port=443): Max retries exceeded with url: /a.tar?Signature=***&p=1 (timed out)"
    ),
    r"https://h/a?part=1\u0026sig=s3cret\u0026userSig=s3cret": r"https://h/a?part=1\u0026sig=***\u0026userSig=***",
    "https://h/a?X-Amz-Signature=s3cret&X-Amz-Date=now&id=5": "https://h/a?X-Amz-Signature=***&X-Amz-Date=***&id=5",
    "https://h/a?sv=1&se=2&sr=b&sig=s3cret%2Bx%3D": "https://h/a?sv=***&se=***&sr=***&sig=***",
    "https://h/a?Expires=1&Signature=s3cret&Key-Pair-Id=K": "https://h/a?Expires=***&Signature=***&Key-Pair-Id=***",
    "https://h/a?api_key=s3cret#access_token=s3cret": "https://h/a?api_key=***#access_token=***",
    "https://h/a?key=s3cret/s3cret": "https://h/a?key=***",
    "https://h/a?key=val/0.tar&Expires=1&sig=s3cret": "https://h/a?key=val/0.tar&Expires=***&sig=***",
    "https://h/a?code_token=s3cret;password=s3cret": "https://h/a?code_token=***;password=***",
    "see 'https://h/a?token=s3cret' (403)": "see 'https://h/a?token=***' (403)",
    "two: http://a:s3cret@h and http://b:s3cret@h": "two: http://***@h and http://***@h",
    "no URL, got 'localhost:1/v1?api-key=s3cret&v=1'": "no URL, got 'localhost:1/v1?api-key=***&v=1'",
    "Authorization: Bearer s3cret-s3cret": "Authorization: Bearer ***",
    "key hf_s3crets3crets3crets3cret": "key ***",
}


@pytest.mark.parametrize("text", KEPT)
def test_text_without_secrets_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(("text", "wanted"), CUT.items())
def test_secrets_are_cut_and_the_rest_stays(text: str, wanted: str) -> None:
    assert without_secrets(text) == wanted
    assert without_secrets(wanted) == wanted
    assert str(UserError(text)) == wanted


def test_a_command_is_kept_without_the_key_of_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "immunize",
        "tiny",
        "--llm",
        "http://h/v1?code=s3cret",
        "--llm=h/v1?code=s3cret",
        "--data",
        "emoji?split=test",
    ]
    monkeypatch.setattr(sys, "argv", ["robustvlm", *words])
    shown = "--llm 'http://h/v1?code=***' '--llm=h/v1?code=***' --data 'emoji?split=test'"
    assert given_command() == f"robustvlm immunize tiny {shown}"


def test_an_expiry_is_a_part_of_the_address_where_nothing_is_signed() -> None:
    assert without_secrets("https://h/a?se=2&date=5") == "https://h/a?se=2&date=5"


def test_what_looks_random_is_kept_apart_but_not_kept() -> None:
    one, two = ("https://h/a?k=" + 16 * pair for pair in ("a1", "b2"))
    cut = without_secrets(one)
    assert cut != without_secrets(two)
    assert "a1a1" not in cut
    assert without_secrets(one) == cut


def test_nested_data_keep_their_shape() -> None:
    found = secrets_cut({"a": ["x", ("http://u:p@h", 1)], "b": None, "c": 0.1})
    assert found == {"a": ["x", ["http://***@h", 1]], "b": None, "c": 0.1}


def test_long_text_takes_linear_time() -> None:
    began = time.process_time()  # not of the clock: others may use the machine
    for piece in (
        "a://",
        "a://b@",
        "://",
        "a://h?x=",
        "a://h?a=b&",
        "a.a+",
        "a://h?sig=" + "%61",
        "\x1b",
        "a://b:",
        "(/?=",
        " /a",
        "=a",
    ):
        text = piece * (100_000 // len(piece))
        without_secrets(text)
        visible(text)
    assert time.process_time() - began < 8.0


@pytest.mark.parametrize(
    "mark", ["\x1b", "\x9b", "\x00", "\x7f", "\u202e", "\u2066", "\u200b", "\ufeff", "\u2028", chr(0xDC80)]
)
def test_what_steers_or_hides_is_shown_as_an_escape(mark: str) -> None:
    shown = visible(f"a{mark}b")
    assert shown == "a" + mark.encode("unicode_escape").decode() + "b"
    content = json.dumps([mark], ensure_ascii=False)
    assert mark not in visible_json(content)
    assert json.loads(visible_json(content)) == [mark]


@pytest.mark.parametrize("text", ["né", "family 👨\u200d👩", "क्\u200dष", "two\nlines\tand a tab", "中"])
def test_writing_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


@given(st.recursive(st.none() | st.text() | st.floats(allow_nan=False), lambda inner: st.lists(inner, max_size=3)))
def test_json_stays_the_same_json(content: object) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=1)
    assert json.loads(visible_json(text)) == content
    assert json.loads(ascii_json(text)) == content
    assert ascii_json(text).isascii()


@given(st.text())
def test_what_is_shown_is_printable(text: str) -> None:
    shown = visible(text, lines=False)
    assert all(unicodedata.category(mark) not in ("Cc", "Cf", "Cs") or mark in "\u200c\u200d" for mark in shown)
    assert "\x1b" not in shown
    assert "\n" not in shown
