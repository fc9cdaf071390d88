"""The terminal tables show the summary's numbers, narrow or wide, whatever the names hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pages import terminal as shown

from robustvlm.commands.attack.plots import ranked, ranking
from robustvlm.commands.attack.record import AttackedRun, load_run, smaller_eps, verdict
from robustvlm.commands.attack.summary import GroupSummary, summarise
from robustvlm.report.words import findings, interval, manifest_rows, percent
from robustvlm.runs.records import Check, UnreadableImage
from robustvlm.stats import rate

WriteRun = Callable[..., Path]


def group(name: str, fooled: int, correct: int) -> GroupSummary:
    return GroupSummary(
        name=name, images=correct, clean_correct=correct, fooled=fooled, attack_success_rate=rate(fooled, correct)
    )


@pytest.fixture(scope="module")
def run(write_run: WriteRun, tmp_path_factory: pytest.TempPathFactory) -> AttackedRun:
    folder = write_run(tmp_path_factory.mktemp("terminal") / "run", images=100, n_classes=30)
    return load_run(folder)


def test_every_rate_is_shown_with_its_interval(run: AttackedRun) -> None:
    text = shown(run)
    for at in run.summary.per_eps:
        for value in (at.robust_accuracy, at.attack_success_rate):
            assert percent(value.value) in text
            assert interval(value) in text
    assert "Right when clean" in text
    assert "Forward passes 12,345" in " ".join(text.split())
    assert "broken.png" in text


def test_the_verdict_comes_first(run: AttackedRun) -> None:
    flat = " ".join(shown(run).split())
    assert flat.startswith(f"{verdict(run.summary)} {smaller_eps(run.summary)}")


def test_hostile_names_neither_style_nor_move_the_cursor() -> None:
    names = ["[bold red]x[/]", "\x1b[2J\x1b[H", "a\nb", "n" * 3000]
    manifest = {
        "config": {
            "model": "tiny",
            "data": "emoji",
            "norm": "L2",
            "eps": [0.5],
            "eps_text": ["0.5"],
            "attack": ["pgd"],
        },
        "data": {"class_names": names, "superclasses": None},
    }
    rows = [
        {"index": i, "image_id": str(i), "label": i, "clean_prediction": i, "attack": "pgd", "eps": 0.5,
         "outcome": "fooled", "steps": 1, "passes": 1} for i in range(4)
    ]  # fmt: skip
    checks = [Check(name="x", level="warning", message="\x1b[31m[blink]")]
    unreadable = [UnreadableImage(id="\x1b]0;title\x07", reason="[/]")]
    summary = summarise(rows, manifest, checks=checks, unreadable=unreadable)
    text = shown(AttackedRun(Path("run"), manifest, summary, pa.Table.from_pylist(rows)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold red]x[/]" in text
    assert "n" * 41 not in text


def test_narrow_terminals_do_not_overflow(run: AttackedRun) -> None:
    assert max(map(len, shown(run, width=60).splitlines())) <= 60


def test_ranking_is_by_rate_then_evidence() -> None:
    groups = [group("a", 1, 1), group("b", 4, 4), group("c", 0, 3), group("none", 0, 0), group("d", 1, 2)]
    groups.append(group("e", 0, 1))
    assert [g.name for g in ranked(groups)] == ["b", "a", "d", "e", "c"]


@pytest.mark.parametrize(("n", "worst", "best"), [(3, 3, 0), (24, 24, 0), (25, 10, 10), (200, 10, 10)])
def test_long_rankings_show_both_ends(n: int, worst: int, best: int) -> None:
    found = ranking([group(f"{i:03d}", i, n) for i in range(n)])
    assert (len(found.worst), len(found.best), found.total, found.never) == (worst, best, n, 1)
    if best:
        assert found.best[-1].name == "000"


def test_checks_are_sorted_by_gravity() -> None:
    checks = [Check(name=level, level=level, message="") for level in ("ok", "fault", "note", "warning")]
    assert [f.level for f in findings(checks)] == ["fault", "warning", "note", "ok"]


def test_long_manifest_values_are_cut() -> None:
    rows = dict(manifest_rows({"data": {"class_names": ["x" * 9] * 1000, "superclasses": {"a": "b"}}, "empty": {}}))
    assert len(rows["data.class_names"]) == 300
    assert rows["data.superclasses"] == '{"a": "b"}'
    assert rows["empty"] == "{}"
