"""The torture program counts what it should: planted losses, tracebacks, hangs and silent successes, and no others."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.torture import disk, inputs, kills
from benchmarks.torture.bad import Bad, write_good_files
from benchmarks.torture.commands import COMMANDS, Bench, Command
from benchmarks.torture.compare import differences
from benchmarks.torture.forking import Body, Ended, run_forked
from benchmarks.torture.mutate import STRANGE, damaged, mistaken_json, strange_file
from robustvlm.commands.common.store import Journal, read_journal
from robustvlm.core.files import named_disk_errors, replacing

ITEM = Command("fake", "fake", "runs/r")
ROWS = 5

Step = Callable[[Path], None]


def honest(folder: Path) -> None:
    """A program that keeps its promise: what the journal holds is not done again, and the end is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):
        left.unlink()
    known = {fact["row"] for fact in read_journal(folder / "journal.jsonl")}
    with Journal(folder / "journal.jsonl") as journal:
        for row in sorted(set(range(ROWS)) - known):
            journal.append({"row": row})
    rows = sorted({fact["row"] for fact in read_journal(folder / "journal.jsonl")})
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps({"rows": rows, "seconds": time.time()}))


def loses_a_row(folder: Path) -> None:
    """Begins behind the place where it was stopped."""
    if (folder / "journal.jsonl").exists() and not (folder / "results.json").exists():
        with Journal(folder / "journal.jsonl") as journal:
            journal.append({"row": -1})
    honest(folder)


def cannot_go_on(folder: Path) -> None:
    if folder.exists() and not (folder / "results.json").exists():
        sys.exit("cannot go on")
    honest(folder)


def bench(tmp_path: Path, step: Step) -> Bench:
    def program(words: Sequence[str]) -> Body:
        del words
        return lambda: step(Path("runs/r").absolute())

    return Bench(tmp_path / "bench", timeout=20.0, program=program)


def test_an_honest_program_loses_nothing(tmp_path: Path) -> None:
    found = kills.torture(bench(tmp_path, honest), ITEM, 8, random.Random(0))
    assert found.events > 3 * ROWS, "lines of the journal, files opened, renamed and synced"
    assert found.at_events >= 4
    assert found.lost == 0, found.notes


@pytest.mark.parametrize(("step", "count"), [(loses_a_row, "differ"), (cannot_go_on, "failed")])
def test_a_lost_row_and_a_failed_resume_are_counted(tmp_path: Path, step: Step, count: str) -> None:
    found = kills.torture(bench(tmp_path, step), ITEM, 8, random.Random(0))
    assert getattr(found, count) > 0
    assert "killed at" in found.notes[0]


def fills(folder: Path) -> None:
    with named_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "results.json") as temporary:
            temporary.write_text(json.dumps("x" * 40_000))


def full(step: Step) -> Step:
    """End as the command line would."""

    def run(folder: Path) -> None:
        try:
            step(folder)
        except Exception as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run


def test_full_disks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_mount", lambda *_: False)
    found = disk.torture(bench(tmp_path / "good", full(fills)), ITEM, 2, random.Random(0))
    assert (found.filled, found.bad, found.failed, found.differ) == (2, 0, 0, 0), found.notes
    found = disk.torture(bench(tmp_path / "bad", fills), ITEM, 2, random.Random(0))
    assert (found.filled, found.bad, found.failed) == (2, 2, 0), "a traceback is no clear line"


def raises() -> None:
    raise ValueError("on purpose")


def refuses() -> None:
    print("error: expected a number, got x", file=sys.stderr)
    sys.exit(2)


def refuses_twice() -> None:
    print("error: one\nerror: two", file=sys.stderr)
    sys.exit(2)


@pytest.mark.parametrize(
    ("body", "wrong", "outcome"),
    [
        (raises, False, inputs.TRACEBACK),
        (refuses, True, inputs.REFUSED),
        (refuses_twice, True, inputs.OTHER),
        (lambda: sys.exit(3), False, inputs.OTHER),
        (lambda: None, True, inputs.SILENT),
        (lambda: None, False, inputs.WORKED),
        (lambda: print("1 image is unreadable"), True, inputs.WORKED),
        (lambda: time.sleep(60), False, inputs.HUNG),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), False, inputs.OTHER),
    ],
)
def test_every_outcome_is_told_apart(tmp_path: Path, body: Body, wrong: bool, outcome: str) -> None:
    timeout = 0.3 if outcome == inputs.HUNG else 20.0
    ended = run_forked(body, cwd=tmp_path / "place", timeout=timeout)
    bad = Bad("kind", "what", "line", wrong=wrong, clue="unreadable")
    tally = inputs.Tally()
    tally.add(bad, ended)
    assert tally.counts == {"kind": {outcome: 1}}
    assert len(tally.faults) == (outcome not in (inputs.REFUSED, inputs.WORKED))


def test_inputs_are_shared_among_processes(tmp_path: Path) -> None:
    def program(words: Sequence[str]) -> Body:
        return {"refuse": refuses, "raise": raises, "pass": lambda: None}[words[0]]

    bad = [Bad(line, str(n), line, wrong=True) for n, line in enumerate(["refuse", "raise", "pass"] * 2)]
    for workers in (1, 2):
        tortured = Bench(tmp_path / str(workers), timeout=20.0, program=program)
        tally = inputs.torture(tortured, bad, workers=workers)
        found = {"refuse": {inputs.REFUSED: 2}, "raise": {inputs.TRACEBACK: 2}, "pass": {inputs.SILENT: 2}}
        assert tally.counts == found
        assert len(tally.faults) == 4


def test_a_fault_that_the_program_calls_its_own_is_one() -> None:
    said = "error: a fault of robustvlm, please report it: KeyError: 'x'"
    assert inputs.judged(Bad("k", "w", "l"), Ended(3, "", said, 0.1)) == inputs.TRACEBACK


def test_bad_inputs_are_the_same_for_the_same_seed_and_reach_every_command(tmp_path: Path) -> None:
    many, again = (inputs.generate(800, random.Random(0)) for _ in range(2))
    assert [(bad.kind, bad.what, bad.line) for bad in many] == [(bad.kind, bad.what, bad.line) for bad in again]
    assert len(many) == 800
    words = {shlex.split(bad.line)[0] for bad in many}
    assert {item.words[0] for item in COMMANDS} <= words
    assert len({(bad.what, bad.line) for bad in many}) > 750, "hardly any is tried twice"
    place = tmp_path / "place"
    place.mkdir()
    write_good_files(place)
    for bad in many:
        if not bad.needs and bad.kind in ("images", "classes", "parquet", "shard", "tree"):
            bad.spoil(place)  # every one can be made
            write_good_files(place)


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_file_takes_the_place_of_any_other(tmp_path: Path, kind: str) -> None:
    for before in ("text", "folder", "missing"):
        path = tmp_path / before
        if before == "folder":
            (path / "inside").mkdir(parents=True)
        elif before == "text":
            path.write_text("x")
        strange_file(path, kind)
        assert path.exists(follow_symlinks=False) == (kind != "missing") if sys.version_info >= (3, 12) else True


def test_damage_is_seeded_and_does_damage() -> None:
    text = json.dumps({"seed": 1, "names": ["a", "b"], "inner": {"x": 0.5}})
    for seed in range(40):
        assert damaged(b"0123456789" * 9, random.Random(seed)) == damaged(b"0123456789" * 9, random.Random(seed))
        changed, what = mistaken_json(text, random.Random(seed))
        assert mistaken_json(text, random.Random(seed)) == (changed, what)
    assert sum(damaged(b"0123456789" * 9, random.Random(seed)) != b"0123456789" * 9 for seed in range(40)) > 35


def test_folders_are_compared_by_rows_weights_and_values(tmp_path: Path) -> None:
    def write(name: str, margin: float, seconds: float, weight: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        table = {"margin": [margin, float("nan")], "seconds": [seconds, seconds]}
        pq.write_table(pa.table(table), folder / "results.parquet")
        save_file({"w": torch.full((2,), weight)}, folder / "weights.safetensors")
        (folder / "summary.json").write_text(json.dumps({"asr": margin, "model_seconds": seconds, "cost": seconds}))
        (folder / "journal.jsonl").write_text(str(seconds))
        return folder

    straight = write("straight", 1.0, 2.0, 3.0)
    assert differences(write("same", 1.0, 5.0, 3.0), straight) == []
    found = differences(write("other", 1.5, 5.0, 4.0), straight)
    assert [line.partition(" = ")[0] for line in found] == [
        "results.parquet: row 0 margin", "summary.json: .asr", "weights.safetensors: w",
    ]  # fmt: skip
    (tmp_path / "same" / ".weights.part").write_text("x")
    (tmp_path / "same" / "summary.json").unlink()
    assert differences(tmp_path / "same", straight) == ["missing: summary.json", "left over: .weights.part"]
    assert differences(tmp_path / "nowhere", straight) == ["no results"]
