"""Makes the scripted server importable, and keeps the tests off real keys and the user's cache."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROBUSTVLM_LLM_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    # A proxy for the whole machine must not be asked for loopback.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.fixture
def slept() -> list[float]:
    """The pauses that a client made, none of them waited for."""
    return []


@pytest.fixture
def make_client(tmp_path: Path, slept: list[float]) -> Callable[..., Any]:
    """Make a client of a script, with its cache in the test's folder."""
    from robustvlm.llm import LlmClient
    from robustvlm.llm.transport import AnswerCache

    def make(script: Any, **settings: Any) -> LlmClient:
        cache = AnswerCache(tmp_path / "cache")
        return LlmClient(script.endpoint, **{"cache": cache, "sleep": slept.append, "timeout": 5.0} | settings)

    return make
