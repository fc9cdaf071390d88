"""Run folders: names that stay inside, one process at a time, and nobody else's files touched."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.errors import UserError
from robustvlm.runs import folder as folder_module
from robustvlm.runs.folder import RunFolder, default_name


def manifest(seed: int = 0) -> dict[str, Any]:
    return {"format": 1, "kind": "attack", "config": {"seed": seed}, "model": {}, "data": {}}


def begin(folder: RunFolder, seed: int = 0, **options: bool) -> dict[str, Any]:
    with folder.opened(manifest(seed), **options) as found:
        return found


def fill(folder: RunFolder) -> None:
    """Make a finished run, with everything that a run writes."""
    begin(folder)
    for path in (folder.summary_path, folder.journal_path, folder.results_path, folder.report_path):
        path.write_text("x")
    for pictures in (folder.gallery_path, folder.adversarial_path):
        pictures.mkdir()
        (pictures / "000001.safetensors").write_text("x")


def names(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file()}


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "-x", "a b", "a\n", "a\0", "ä", "~", "a:b", "x" * 121],
)
def test_names_that_could_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not allowed: use letters, digits"):
        RunFolder(tmp_path, name)


@given(st.text(max_size=20))
def test_an_allowed_name_is_one_component_inside_the_folder(name: str) -> None:
    try:
        path = RunFolder(Path("out"), name).path
    except UserError:
        return
    assert path.parent == Path("out")
    assert Path(os.path.normpath(path)) == path


@given(st.text(), st.text())
def test_the_default_name_is_always_allowed_and_tells_settings_apart(model: str, data: str) -> None:
    first, second = (default_name("attack", model, data, {"seed": seed}) for seed in (0, 1))
    assert RunFolder(Path("out"), first).name == first
    assert first != second
    assert first == default_name("attack", model, data, {"seed": 0})


def test_a_new_run_writes_its_manifest_and_is_found_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "not" / "there" / "yet", "run")
    assert folder.manifest() is None
    begin(folder)
    assert folder.manifest() == manifest()
    older = json.loads(folder.manifest_path.read_text()) | {"created": "long ago"}
    folder.manifest_path.write_text(json.dumps(older))
    assert begin(folder)["created"] == "long ago", "the manifest of the run that is continued holds"


def test_a_changed_config_is_refused_by_key_and_changes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    fill(folder)
    before = {name: (folder.path / name).read_bytes() for name in names(folder.path)}
    with pytest.raises(UserError, match=r"other settings \(seed: 0 -> 1\).*--name.*--fresh"):
        begin(folder, seed=1)
    assert before == {name: (folder.path / name).read_bytes() for name in names(folder.path)}


def test_fresh_starts_over_under_new_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    fill(folder)
    begin(folder, seed=1, fresh=True)
    assert names(folder.path) == {"manifest.json", "run.lock"}
    assert folder.manifest() == manifest(1)


def test_fresh_without_a_run_just_starts(tmp_path: Path) -> None:
    assert begin(RunFolder(tmp_path, "run"), fresh=True) == manifest()


def test_resume_insists_on_a_run_and_creates_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", "typo")
    with pytest.raises(UserError, match=r"no run to resume in .*typo.*leave out --resume"):
        begin(folder, resume=True)
    assert not (tmp_path / "out").exists()
    begin(folder)
    assert begin(folder, resume=True) == manifest()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"name": "a web app"}'])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, content: str | None, fresh: bool) -> None:
    theirs = tmp_path / "thesis"
    theirs.mkdir()
    (theirs / "chapter1.tex").write_text("years of work")
    if content is not None:
        (theirs / "manifest.json").write_text(content)
    before = names(theirs)
    with pytest.raises(UserError, match="choose another --name"):
        begin(RunFolder(tmp_path, "thesis"), fresh=fresh)
    assert names(theirs) == before


def test_fresh_leaves_files_that_no_run_wrote(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    fill(folder)
    (folder.path / "notes.txt").write_text("mine")
    begin(folder, fresh=True)
    assert (folder.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("deleted", range(8))
def test_fresh_that_was_killed_on_the_way_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    folder = RunFolder(tmp_path, "run")
    fill(folder)
    order = folder_module._FILES
    monkeypatch.setattr(folder_module, "_FILES", order[:deleted])
    folder._clear()
    monkeypatch.setattr(folder_module, "_FILES", order)
    if 0 < deleted < 8:
        assert not folder.finished, "what is left must not pass for a finished run"
    begin(folder, seed=1, fresh=True)
    assert names(folder.path) == {"manifest.json", "run.lock"}


def test_links_are_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("x")
    (tmp_path / "run").symlink_to(theirs, target_is_directory=True)
    with pytest.raises(UserError, match="is no folder"):
        begin(RunFolder(tmp_path, "run"), fresh=True)
    own = RunFolder(tmp_path, "own")
    begin(own)
    own.gallery_path.symlink_to(theirs, target_is_directory=True)
    begin(own, fresh=True)
    assert not own.gallery_path.exists()
    assert (theirs / "precious").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="is no folder"):
        begin(RunFolder(tmp_path, "run"))
    with pytest.raises(UserError, match=r"cannot write to .* \(Not a directory\): choose another folder with --out"):
        begin(RunFolder(tmp_path / "run", "below"))


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    fill(folder)
    for left in (folder.path / ".results.parquet.ab12.part", folder.gallery_path / ".000007.safetensors.xy.part"):
        left.write_text("half")
    before = names(folder.path)
    begin(folder)
    assert names(folder.path) == {name for name in before if not name.endswith(".part")}


def hold(out: str, ready: Any) -> None:
    with RunFolder(Path(out), "run").opened(manifest()):
        ready.set()
        signal.pause()


def test_a_second_process_is_kept_out_until_the_first_is_gone_however_it_went(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready))
    process.start()
    try:
        assert ready.wait(60)
        for options in ({}, {"fresh": True}, {"resume": True}):
            with pytest.raises(UserError, match=r"another process is working on the run in .*run'"):
                begin(RunFolder(tmp_path, "run"), **options)
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    assert begin(RunFolder(tmp_path, "run")) == manifest()


def test_journals_of_several_processes_are_found_and_deleted_by_fresh(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    fill(folder)
    for rank in (10, 2, 1):
        folder.journal_of(rank).write_text("")
    (folder.path / "journal-notes.jsonl").write_text("the user's own")
    assert [path.name for path in folder.journals()] == [
        "journal.jsonl",
        "journal-1.jsonl",
        "journal-2.jsonl",
        "journal-10.jsonl",
    ]
    begin(folder, fresh=True)
    assert names(folder.path) == {"manifest.json", "run.lock", "journal-notes.jsonl"}


def test_other_processes_join_the_run_of_rank_0_and_no_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    with pytest.raises(UserError, match="all machines must see one folder"):
        folder.joined(manifest())
    with folder.opened(manifest()):
        assert folder.joined(manifest()) == manifest()
        with pytest.raises(UserError, match="seed: 0 -> 1"):
            folder.joined(manifest(1))
