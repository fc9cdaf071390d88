"""Image folders: labels, ids, links, faults."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from robustvlm.data.imagefolder import ImageFolder
from robustvlm.data.source import Sample, Unreadable
from robustvlm.data.specs import open_data
from robustvlm.errors import UserError


def test_labels_follow_the_sorted_folders(folder: Path) -> None:
    source = ImageFolder(folder)
    assert source.class_names == ("cat", "dog", "pickup truck")
    assert source.ids()[:5] == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/3.png", "dog/0.png"]
    items = list(source.samples())
    assert [item.id for item in items] == source.ids()
    assert [item.label for item in items if isinstance(item, Sample)] == [0] * 4 + [1] * 4 + [2] * 4


def test_ids_and_fingerprint_do_not_depend_on_where_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    before = ImageFolder(folder)
    ids, print_before = before.ids(), before.fingerprint()
    moved = folder.rename(tmp_path / "elsewhere")
    assert ImageFolder(moved).ids() == ids
    assert ImageFolder(moved).fingerprint() == print_before
    (moved / "cat" / "0.png").unlink()
    assert ImageFolder(moved).fingerprint() != print_before


def test_unreadable_files_are_recorded(folder: Path) -> None:
    (folder / "cat" / "0.png").write_bytes(b"")
    (folder / "dog" / "1.png").write_bytes(b"no image")
    (folder / "dog" / "notes.txt").write_text("no image by its name, so not listed")
    (folder / "dog" / ".hidden.png").write_bytes(b"")
    items = list(ImageFolder(folder).samples())
    assert [item.id for item in items if isinstance(item, Unreadable)] == ["cat/0.png", "dog/1.png"]
    assert len(items) == 12


def test_nested_folders_belong_to_their_class(folder: Path, plain: Callable[..., bytes]) -> None:
    (folder / "cat" / "2024" / "may").mkdir(parents=True)
    (folder / "cat" / "2024" / "may" / "x.JPG").write_bytes(plain(kind="JPEG"))
    item = next(ImageFolder(folder).samples(keep=lambda name: name == "cat/2024/may/x.JPG"))
    assert isinstance(item, Sample)
    assert item.label == 0


def test_links_do_not_loop_or_leave_the_folder(folder: Path, tmp_path: Path, plain: Callable[..., bytes]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(plain())
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "cat" / "self").symlink_to(folder / "cat")
    (folder / "cat" / "out.png").symlink_to(outside / "secret.png")
    (folder / "dog" / "out").symlink_to(outside)
    (folder / "dog" / "twin.png").symlink_to(folder / "dog" / "0.png")
    (folder / "dog" / "broken.png").symlink_to(folder / "dog" / "gone.png")
    os.symlink("round.png", folder / "dog" / "round.png")
    faults = {item.id: item.reason for item in ImageFolder(folder).samples() if isinstance(item, Unreadable)}
    assert set(faults) == {"cat/out.png", "dog/out", "dog/broken.png", "dog/round.png"}
    assert "?links=1" in faults["cat/out.png"]
    followed = open_data(f"imagefolder:{folder}?links=1")
    assert {"cat/out.png", "dog/out/secret.png"} <= set(followed.ids() or [])
    assert len(followed.ids() or []) == len(set(followed.ids() or []))


def test_an_unreadable_folder_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    faults = [item for item in ImageFolder(folder).samples() if isinstance(item, Unreadable)]
    assert faults == [Unreadable("dog", "permission denied")]


def test_a_file_name_that_is_no_text_gets_an_id_that_is(folder: Path, plain: Callable[..., bytes]) -> None:
    try:
        Path(os.fsdecode(bytes(folder / "cat") + b"/\xff.png")).write_bytes(plain())
    except OSError:
        pytest.skip("this file system refuses such names")
    source = ImageFolder(folder)
    assert all(name.encode("utf-8") for name in source.ids())
    assert len(list(source.samples())) == 13


def test_wordnet_folders_take_class_names(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    for wnid in ("n01443537", "n01440764"):
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "a.jpg").write_bytes(plain(kind="JPEG"))
    assert ImageFolder(tmp_path).class_names == ("tench", "goldfish")


def test_one_class_is_allowed(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.png").write_bytes(plain())
    assert len(list(open_data(f"imagefolder:{tmp_path}").samples())) == 1


def test_faults_are_one_clear_line(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    empty, flat, hollow, splits = (tmp_path / name for name in ("empty", "flat", "hollow", "splits"))
    for path in (empty, flat, hollow / "cat", splits / "train" / "cat", splits / "val" / "cat"):
        path.mkdir(parents=True)
    (flat / "a.png").write_bytes(plain())
    for path, message in (
        (tmp_path / "none", "no folder"),
        (flat / "a.png", "is a file: imagefolder expects a folder"),
        (empty, "holds nothing: imagefolder expects DIR/CLASS/IMAGE"),
        (flat, "1 images but no class subfolders"),
        (hollow, "has no image in a class folder: .*found 'cat .no image in it.'"),
        (splits, "subfolders 'train', 'val' of .* are splits, not classes: choose one with .split=val, or pass .*/val"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_data(f"imagefolder:{path}")
        assert "\n" not in str(caught.value)
