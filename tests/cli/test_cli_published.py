"""Published attacks and the second opinion from the command line."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustvlm.cli.main import main

QUICK = ["attack", "tiny", "--limit", "5", "--lanes", "4", "--device", "cpu", "--eps", "1/255", "--checks", "none"]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Take the handler that the program installs away again."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["robustvlm", *QUICK, "--out", str(out), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_second_opinion_in_the_summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--attack", "pgd:steps=1", "--second-opinion", "torchattacks:PGD:steps=2", "--json")
    assert call(monkeypatch, tmp_path, *words) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [item["attack"] for item in summary["per_eps"][0]["per_attack"]] == [
        "pgd:steps=1",
        "torchattacks:PGD:steps=2",
    ]
    assert "second opinion" in [check["name"] for check in summary["checks"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--attack", "torchattacks:PGDX"), "unknown attack 'PGDX' of torchattacks: did you mean"),
        (("--attack", "autoattack:best"), "unknown version 'best' of autoattack"),
        (("--second-opinion", "square"), "the second opinion must come from one attack of another program"),
        (("--attack", "torchattacks:PGD", "--norm", "L2"), "take --norm Linf, or for L2 one of PGDL2"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    assert call(monkeypatch, tmp_path, *words) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
