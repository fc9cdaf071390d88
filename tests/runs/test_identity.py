"""A run folder cannot lie: what lies in it is of its manifest, or it is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustvlm.commands.certify.store import CertifyLedger
from robustvlm.commands.common.store import Journal
from robustvlm.commands.soup.work import root_of
from robustvlm.core.probe import part
from robustvlm.defenses.pipeline import saved_model
from robustvlm.errors import UserError
from robustvlm.models.saved import Card, write_card
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import read_manifest, require_owner, require_unchanged, run_identity, write_checksums


def manifest(run: str | None = "1f", **changes: Any) -> dict[str, Any]:
    made = {"format": 1, "kind": "certify", "created": "now", "config": {"seed": 0}, "model": {}, "data": {}}
    return made | ({} if run is None else {"id": run}) | changes


def begin(folder: RunFolder, made: dict[str, Any] | None = None, **options: bool) -> None:
    with folder.opened(made or manifest(), **options):
        pass


def finish(folder: RunFolder, made: dict[str, Any] | None = None) -> None:
    """Make a finished run without a report."""
    begin(folder, made)
    folder.summary_path.write_text("{}")
    folder.results_path.write_text("rows")
    (folder.path / "certificates.jsonl").write_text("records")
    write_checksums(folder.path, made or manifest())


@pytest.mark.parametrize(
    "left", ["summary.json", "results.parquet", "journal.jsonl", "journal-2.jsonl", "features", "model.json"]
)
def test_results_without_a_manifest_are_given_no_new_one(tmp_path: Path, left: str) -> None:
    folder = RunFolder(tmp_path, "run")
    begin(folder)
    folder.manifest_path.unlink()
    (folder.path / left).write_text("x")
    for options in ({}, {"resume": True}):
        with pytest.raises(UserError, match=r"no manifest.json that says|there is no run to resume"):
            begin(folder, **options)
    assert not folder.manifest_path.exists()
    begin(folder, fresh=True)
    assert sorted(path.name for path in folder.path.iterdir()) == ["manifest.json", "run.lock"]


@pytest.mark.parametrize("fresh", [False, True])
def test_results_without_manifest_and_lock_are_not_ours_to_delete(tmp_path: Path, fresh: bool) -> None:
    folder = RunFolder(tmp_path, "run")
    folder.path.mkdir()
    folder.results_path.write_text("rows")
    with pytest.raises(UserError, match=r"bring it back, or choose another --name$"):
        begin(folder, fresh=fresh)
    assert folder.results_path.read_text() == "rows"


def test_a_run_that_was_killed_before_its_manifest_begins(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    folder.path.mkdir()
    (folder.path / "run.lock").touch()
    (folder.path / ".manifest.json.ab.part").write_text("{")
    begin(folder)
    assert folder.manifest() == manifest()


@pytest.mark.parametrize("name", ["summary.json", "results.parquet", "certificates.jsonl"])
def test_a_changed_or_missing_result_is_refused(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path, "run")
    finish(folder)
    assert folder.finished
    require_unchanged(folder.path, manifest())
    (folder.path / name).write_text("of another run")
    with pytest.raises(UserError, match=f"'{name}' in .* is not what the run wrote"):
        require_unchanged(folder.path, manifest())
    (folder.path / name).unlink()
    with pytest.raises(UserError, match=f"'{name}' of the run .* is gone"):
        require_unchanged(folder.path, manifest())


def test_results_and_digests_of_another_run_are_refused_together(tmp_path: Path) -> None:
    one, other = RunFolder(tmp_path, "one"), RunFolder(tmp_path, "other")
    finish(one), finish(other, manifest("2e"))
    for name in ("summary.json", "results.parquet", "checksums.json"):
        shutil.copy(other.path / name, one.path / name)
    with pytest.raises(UserError, match=r"not those of its manifest.json"):
        require_unchanged(one.path, manifest())


@pytest.mark.parametrize("change", [{"config": {"seed": 1}}, {"created": "then"}, {"model": {"fingerprint": "ab"}}])
def test_a_manifest_that_was_edited_after_the_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path, "run")
    finish(folder)
    with pytest.raises(UserError, match=r"not those of its manifest.json"):
        require_unchanged(folder.path, manifest(**change))


def test_a_file_that_the_run_did_not_write_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    finish(folder)
    folder.attacked_path.write_text("of another run")
    with pytest.raises(UserError, match=r"'attacked.parquet' in .* is no file of this run: remove it"):
        require_unchanged(folder.path, manifest())


def test_without_digests_a_run_has_not_ended_and_one_of_an_earlier_version_passes(tmp_path: Path) -> None:
    folder, old = RunFolder(tmp_path, "run"), RunFolder(tmp_path, "old")
    finish(folder)
    (folder.path / "checksums.json").unlink()
    assert not folder.finished
    with pytest.raises(UserError, match="has not ended"):
        require_unchanged(folder.path, manifest())
    finish(old, manifest(None))
    assert old.finished
    require_unchanged(old.path, manifest(None))


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    one, other = RunFolder(tmp_path, "one"), RunFolder(tmp_path, "other")
    begin(one), begin(other, manifest("2e"))
    CertifyLedger(one).close()
    CertifyLedger(one).close()  # goes on
    CertifyLedger(other).close()
    shutil.copy(other.journal_path, one.journal_path)
    with pytest.raises(UserError, match="is the journal of another run"):
        CertifyLedger(one)
    with Journal(one.path / "journal-1.jsonl") as journal:  # of a version that wrote no owner
        journal.append({"kind": "check", "name": "a", "level": "note", "message": "m"})
    one.journal_path.unlink()
    with pytest.raises(UserError, match="is the journal of another run"):
        CertifyLedger(one)


def test_a_run_of_an_earlier_version_goes_on_with_its_journal(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "old")
    begin(folder, manifest(None))
    with Journal(folder.journal_path) as journal:
        journal.append({"kind": "check", "name": "a", "level": "note", "message": "m"})
    ledger = CertifyLedger(folder)
    assert [check.name for check in ledger.checks] == ["a"]
    ledger.close()


def test_the_identity_survives_the_way_through_a_file() -> None:
    made = manifest(config={"eps": (0.1, 2 / 255), "levels": {1: "a", 10: "b", 2: "c"}})
    assert run_identity(json.loads(json.dumps(made))) == run_identity(made)
    with pytest.raises(UserError, match="is another run's"):
        require_owner("ab", made, Path("x"))
    with pytest.raises(UserError, match="not known to be of this run"):
        require_owner(None, made, Path("x"))
    require_owner(None, manifest(None), Path("x"))


def test_a_model_that_answers_otherwise_is_refused_by_what_differs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    probes = [
        {"format": 1, "parts": {"logits": part(np.array([[x, 0.0]]), tolerance=1e-3)}} for x in (1.0, 1.0001, 2.0)
    ]
    begin(folder, manifest(probe=probes[0], model={"spec": "mine:make"}))
    begin(folder, manifest(probe=probes[1], model={"spec": "mine:make"}))
    begin(folder, manifest(model={"spec": "mine:make"}))
    with pytest.raises(UserError, match=r"'mine:make' is not the one .*: its logits of fixed inputs differ by 1 where"):
        begin(folder, manifest(probe=probes[2], model={"spec": "mine:make"}))


@pytest.mark.parametrize(
    "change",
    [
        {"config": 5}, {"config": None}, {"model": []}, {"data": []}, {"data": {"class_names": 5}}, {"format": "1"},
        {"kind": 5}, {"name": []}, {"versions": 3}, {"plan": {"notes": 5}}, {"data": {"levels": [5]}}, {"id": 5},
        {"probe": 5}, {"created": {}}, {"data": {"class_names": ["a", 3]}},
    ],
)  # fmt: skip
def test_a_manifest_of_the_wrong_shape_is_one_clear_line(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest() | change))
    with pytest.raises(UserError, match=r"is damaged|is not the manifest") as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["run.lock", "journal.jsonl", "results.parquet", "gallery", "features/a.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_a_strangers_folder_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    folder = RunFolder(tmp_path, "run")
    begin(folder)
    precious = tmp_path / "precious"
    precious.write_text("x")
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(precious) if kind == "link" else os.mkfifo(path)
    with pytest.raises(UserError, match=f"is a {kind}, which no run makes|is no file but a {kind}"):
        begin(folder)
    assert precious.read_text() == "x"


def test_a_folder_that_goes_away_is_noticed_at_the_next_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    begin(folder)
    ledger = CertifyLedger(folder)
    shutil.rmtree(folder.path)
    with pytest.raises(UserError, match="was deleted or moved while it was at work"):
        ledger.add_cost(passes=1, seconds=1.0, model_seconds=1.0)


def test_leftovers_inside_the_folders_of_a_training_are_swept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    begin(folder)
    left = folder.path / "training" / "purifier" / ".last.safetensors.ab.part"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    begin(folder)
    assert not left.exists()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cards_that_lead_back_to_themselves_are_refused(tmp_path: Path, length: int) -> None:
    folders = [tmp_path / str(number) for number in range(length)]
    for folder in folders:
        folder.mkdir()
    for number, folder in enumerate(folders):
        write_card(folder, Card("build", base=str(folders[(number + 1) % length]), base_fingerprint="ab"))
    for ask in (saved_model, root_of):
        with pytest.raises(UserError, match="stands on itself"):
            ask(str(folders[0]))
