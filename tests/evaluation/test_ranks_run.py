"""Several processes on one run: the same results as one, whatever their number then and now; one failure ends all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from attacking import CURVE, Attacking, Interrupt, pictures, prepared, run_in_pieces, table

from robustvlm.commands.common.store import read_journal

Photos = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawing of reports in this process, no calls of git, and a cache of the test's own."""
    monkeypatch.setattr(
        "robustvlm.commands.attack.work.write_report", lambda folder: (folder / "report.html").write_text("report")
    )
    monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: None)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))


def torchrun(photos: Path, *words: str, model: str = "Encoder", **changed: str) -> subprocess.CompletedProcess[str]:
    """Run `robustvlm attack` on the photos in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "robustvlm", "attack", f"small_encoders:{model}", f"--data=imagefolder:{photos}?empty=1"]
    command += ["--device=cpu", "--checks=none"]  # as in `prepared`, whose runs are gone on with here
    command += [f"--{name}={value}" for name, value in (CURVE | changed).items()]
    command += [f"--out={photos.parent / 'runs'}", *words]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    settings = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=300)


def ours(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what our processes say on standard error; torchrun adds its own."""
    return [line for line in done.stderr.splitlines() if line.startswith(("error: ", "stopped", "interrupted"))]


@pytest.mark.equality
def test_two_processes_give_the_results_of_one(make_folder: Photos) -> None:
    photos = make_folder(14)
    alone = prepared(photos, name="alone", **CURVE)
    alone.run()

    done = torchrun(photos, "--name=two", "--json")
    assert done.returncode == 0, done.stderr
    two = prepared(photos, name="two", **CURVE)
    assert table(two).equals(table(alone))
    assert pictures(two.folder.gallery_path) == pictures(alone.folder.gallery_path)
    assert json.loads(done.stdout) == json.loads(two.folder.summary_path.read_text()), "one process prints"
    cost = json.loads(done.stdout)["cost"]
    assert sum(cost["passes"].values()) == cost["forward_passes"] + cost["backward_passes"]
    assert cost["passes"]["images"] == sum(table(two)["passes"].to_pylist())
    kinds = [[fact["kind"] for fact in read_journal(path)] for path in two.folder.journals()]
    assert [kind.count("clean") for kind in kinds] == [7, 7]
    assert all(kind.count("attack") > 5 for kind in kinds)


def _stopped_after(run: Attacking, images: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run.run(Interrupt(images))


@pytest.mark.equality
def test_a_run_of_several_processes_is_continued_by_one(make_folder: Photos) -> None:
    photos = make_folder(24)
    alone = prepared(photos, name="alone", **CURVE)
    alone.run()
    run = prepared(photos, **CURVE)
    _stopped_after(run, 40)
    # What three processes would have left: each fact in the journal of one of them, in any order.
    head, *lines = run.folder.journal_path.read_bytes().splitlines(keepends=True)
    for rank in range(3):
        run.folder.journal_of(rank).write_bytes(head + b"".join(lines[rank::3]))
    with run.folder.journal_of(2).open("ab") as torn:
        torn.write(b'{"kind":"cle')
    last = run_in_pieces(lambda: prepared(photos, **CURVE), [10])
    assert table(last).equals(table(alone))
    assert pictures(last.folder.gallery_path) == pictures(alone.folder.gallery_path)


@pytest.mark.equality
@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped_and_one_where_two_were_killed(make_folder: Photos) -> None:
    photos = make_folder(24)
    alone = prepared(photos, name="alone", **CURVE)
    alone.run()

    part = prepared(photos, name="part", **CURVE)
    _stopped_after(part, 30)
    done = torchrun(photos, "--name=part", "--resume")
    assert done.returncode == 0, done.stderr
    assert table(part).equals(table(alone))

    killed = prepared(photos, "KillsRank1", name="killed", **CURVE)
    done = torchrun(photos, "--name=killed", model="KillsRank1")
    assert done.returncode != 0
    kept = f"stopped; everything so far is kept in '{killed.folder.path}': repeat the command to go on"
    died = "error: rank 1 of 2 has died; what is finished is kept: repeat the command to go on"
    assert ours(done) in ([kept], [died]), "the other one ends by itself, or torchrun ends it, and says what to do"
    assert "Traceback" not in done.stderr.partition("torch.distributed.elastic")[0]
    killed.run(resume=True)
    assert table(killed).equals(table(alone))


@pytest.mark.slow
def test_mistakes_are_said_once_and_end_every_process(make_folder: Photos) -> None:
    photos = make_folder(6)
    done = torchrun(photos, "--name=two", attack="pdg")
    assert done.returncode != 0
    assert [line.partition(":")[2] for line in ours(done)] == [" unknown attack 'pdg': did you mean 'pgd'?"]


@pytest.mark.slow
def test_a_process_that_fails_takes_the_others_along(make_folder: Photos) -> None:
    photos = make_folder(24)
    done = torchrun(photos, "--name=two", model="FailsOnRank1")
    assert done.returncode != 0
    assert ours(done) == ["error: the disk of rank 1 is gone"]
    assert not prepared(photos, "FailsOnRank1", name="two", **CURVE).folder.finished
