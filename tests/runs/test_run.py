"""A run of a small command: started, killed between its last files, gone on with, read back, and refused."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from robustvlm.errors import UserError
from robustvlm.runs.manifest import CHECKSUMS as DIGESTS
from robustvlm.runs.run import Command, Facts, FinishedRun, Run, Session, read_finished
from robustvlm.runs.settings import Observer, Settings, Shared, argument, option


class Count(Settings):
    """Count."""

    model: str = argument("tiny", "What.")
    upto: int = option(3, "How far.", at_least=1)
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    resume: bool | None = Shared.RESUME


COUNT = Command("count", Count, "toy_count")


class Total(BaseModel):
    total: int


@dataclass(frozen=True)
class Counting:
    facts: Facts
    upto: int

    def run(self, session: Session) -> None:
        session.observer.begin("Counting", self.upto)
        for _ in range(self.upto):
            session.observer.advance()
        with session.results() as folder:
            (folder / "summary.json").write_text(json.dumps({"total": self.upto}))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("toy_count")

    def write_report(folder: Path, out: Path | None = None) -> Path:
        path = out or folder / "report.html"
        path.write_text("report of " + (folder / "summary.json").read_text())
        return path

    facts = {"spec": "tiny", "fingerprint": "ab"}
    module.__dict__.update(
        RESULTS=("summary.json",),
        open_work=lambda s: Counting(Facts((s.model, "numbers"), s.stored(), facts, remarks=["one"]), s.upto),
        read_run=lambda folder: read_finished(folder, "summary.json", Total, kind="count"),
        write_report=write_report,
    )
    monkeypatch.setitem(sys.modules, "toy_count", module)
    return module


class Steps(Observer):
    def __init__(self, *, last: int | None = None) -> None:
        self.seen, self.last = 0, last
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def advance(self, count: int = 1, **shown: str) -> None:
        del shown
        if self.seen == self.last:
            raise KeyboardInterrupt
        self.seen += count


def start(out: Path, observer: Observer | None = None, **options: object) -> FinishedRun[Total]:
    return COUNT.start(observer=observer, out=out, **options)


def test_a_run_is_made_once_and_read_afterwards(tmp_path: Path) -> None:
    first, again = Steps(), Steps()
    run = start(tmp_path, first)
    assert (run.summary.total, run.kind, first.seen) == (3, "count", 3)
    assert run.manifest["config"] == {"model": "tiny", "upto": 3}
    assert run.manifest["remarks"] == ["one"]
    assert run.name.startswith("count-tiny-numbers-")
    assert start(tmp_path, again) == run
    assert again.seen == 0
    assert start(tmp_path, upto=4).name != run.name
    assert start(tmp_path, again, fresh=True).summary == run.summary
    assert again.seen == 3


@pytest.mark.parametrize("lost", ["report.html", DIGESTS, "summary.json"])
def test_a_crash_between_the_last_files_is_mended(tmp_path: Path, lost: str) -> None:
    run, steps = start(tmp_path), Steps()
    report = run.report.read_text()
    (run.folder / lost).unlink()
    run.report.write_text("old") if lost != "report.html" else None
    assert start(tmp_path, steps).summary == run.summary
    assert run.report.read_text() == report
    assert steps.seen == (0 if lost == "report.html" else 3)  # results that are whole are not made again


def test_an_interrupted_run_has_no_results_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, Steps(last=1), name="r")
    with pytest.raises(UserError, match="has not ended: give its count command again"):
        read_finished(tmp_path / "r", "summary.json", Total, kind="count")
    assert start(tmp_path, name="r", resume=True).summary.total == 3


def test_a_run_that_goes_on_under_other_versions_says_so_and_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def under(commit: str, torch: str, observer: Observer | None = None) -> FinishedRun[Total]:
        monkeypatch.setattr("robustvlm.runs.manifest.versions", lambda: {"robustvlm": "1.0", "torch": torch})
        monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: commit)
        return start(tmp_path, observer, name="r")

    for commit, torch, warned in (
        ("ab", "2.4", ""),
        ("ab", "2.4", ""),
        ("cd", "2.5", "torch: 2.4 -> 2.5; commit: ab -> cd"),
        ("cd", "2.5", "torch: 2.4 -> 2.5; commit: ab -> cd"),
    ):
        steps = Steps(last=1)
        with pytest.raises(KeyboardInterrupt):
            under(commit, torch, steps)
        assert [warned in said for said in steps.warned] == ([True] if warned else [])
    last, read = Steps(), Steps()
    run = under("ab", "2.4", last)
    assert last.warned == []
    assert under("ef", "2.6", read).manifest == run.manifest  # a finished run is only read
    assert read.warned == []
    assert run.manifest["versions"] == {"robustvlm": "1.0", "torch": "2.4"}
    assert run.manifest["sessions"] == [{"versions": {"robustvlm": "1.0", "torch": "2.5"}, "git_commit": "cd"}]


def test_what_is_wrong_is_found_before_anything_is_written(tmp_path: Path) -> None:
    for options, said in (
        ({"name": "../x"}, "the run name '../x' is not allowed"),
        ({"resume": True}, "there is no run to resume"),
        ({"upto": 0}, "upto must be at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=said):
            start(tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()
    start(tmp_path, name="r")
    with pytest.raises(UserError, match=r"made with other settings \(upto: 3 -> 5\)"):
        start(tmp_path, name="r", upto=5)


def test_results_that_were_changed_and_runs_of_another_kind_are_refused(tmp_path: Path) -> None:
    run = start(tmp_path)
    with pytest.raises(UserError, match="is no soup run: expected a run of kind 'soup', got 'count'"):
        read_finished(run.folder, "summary.json", Total, kind="soup")
    (run.folder / "summary.json").write_text('{"total": 4}')
    with pytest.raises(UserError, match=r"'summary.json' in .* is not what the run wrote"):
        start(tmp_path)


def test_one_process_says_so_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustvlm.core.ranks import Ranks

    monkeypatch.setattr("robustvlm.runs.run.current_ranks", lambda: Ranks(rank=1, size=2))
    with pytest.raises(UserError, match="`robustvlm count` works in one process: start it without torchrun"):
        Run(COUNT, Count(out=tmp_path))
