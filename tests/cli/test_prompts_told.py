"""How far the encoding of class prompts is, as a shell without a terminal sees it."""

from __future__ import annotations

import pytest

from robustvlm.cli.terminal import Prompts


def test_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 5.0, 11.0, 12.0, 30.0, 60.0])
    monkeypatch.setattr("robustvlm.cli.terminal.time.monotonic", lambda: next(now))
    told = Prompts()
    for done, total, left in ((256, 80_000, None), (512, 80_000, 900.0), (768, 80_000, 800.0), (1024, 80_000, 700.0)):
        told(done, total, left)
    told(79_000, 80_000, 12.4)
    told(0, 0, None)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "768 of 80,000 class prompts encoded, about 13 min left",
        "79,000 of 80,000 class prompts encoded, about 12 s left",
        "another process encodes these class prompts: waiting for it",
    ]


def test_a_terminal_shows_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    Prompts(shown.append)(256, 80_000, None)
    assert shown == ["256 of 80,000 class prompts encoded"]
    assert capsys.readouterr().err == ""
