"""Image folders: labels, ids, links, faults."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

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


def tree(root: Path, data: bytes, *paths: str) -> str:
    """Write the same image at every path (a folder where it ends in "/") and return the spec of the folder."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).mkdir() if path.endswith("/") else (root / path).write_bytes(data)
    return f"imagefolder:{root}"


def test_labels_follow_numbers_in_their_natural_order(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    spec = tree(tmp_path, plain(), *(f"class_{i}/a.png" for i in range(12)))
    assert [item.id for item in open_data(spec).samples()] == [f"class_{i}/a.png" for i in range(12)]
    names = tmp_path / "names.txt"
    names.write_text("".join(f"name{i}\n" for i in range(12)))
    source = open_data(spec, classes=names)
    for item in source.samples():
        assert isinstance(item, Sample)
        assert source.class_names[item.label] == "name" + item.id.split("/")[0].removeprefix("class_")


def test_a_part_of_the_classes_keeps_their_labels(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbirds\ncat\ndog\n")
    source = open_data(tree(tmp_path / "x", plain(), "dog/a.png", "bird/a.png"), classes=names)
    assert source.class_names == ("ant", "birds", "cat", "dog")
    assert [item.label for item in source.samples() if isinstance(item, Sample)] == [1, 3]
    assert source.remarks == ["the data holds 2 of the 4 classes named: the others stand for no image"]
    names.write_text("dog\nant\nbirds\ncat\n")
    moved = open_data(tree(tmp_path / "x", plain()), classes=names)
    assert [item.label for item in moved.samples() if isinstance(item, Sample)] == [2, 0]
    assert moved.fingerprint() != source.fingerprint()


def test_what_is_no_class_and_no_image_is_named(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    junk = ("__MACOSX/cat/a.png", "@eaDir/a.png", ".ipynb_checkpoints/a.png", "cat/@eaDir/a.png", "dog/._a.png")
    none = ("lost+found/", "empty/", "notes/readme.txt", "beside.png")
    spec = tree(tmp_path, plain(), "cat/a.png", "dog/a.png", *junk, *none)
    (tmp_path / "notes" / "readme.txt").write_text("no image")
    (tmp_path / "dog" / "list.csv").write_text("a,b")
    source = open_data(spec)
    assert source.class_names == ("cat", "dog")
    assert source.ids() == ["cat/a.png", "dog/a.png"]
    for name in (
        "__MACOSX",
        "2 x '@eaDir'",
        ".ipynb_checkpoints",
        "empty (no image",
        ".csv",
        "images beside the class",
    ):
        assert name in source.remarks[0]
    assert open_data(spec + "?empty=1").class_names == ("cat", "dog", "empty", "notes")


def test_images_are_known_by_what_is_in_them(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    spec = tree(tmp_path, plain(), "cat/a.png", "cat/noend", "cat/odd.dat", "cat/B.JPE")
    (tmp_path / "cat" / "c.jfif").write_bytes(plain(kind="JPEG"))
    (tmp_path / "cat" / "d.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (tmp_path / "cat" / "e.txt").write_text("BM is no bitmap, MM no TIFF")
    items = {item.id: item for item in open_data(spec).samples()}
    assert set(items) == {f"cat/{name}" for name in ("a.png", "noend", "odd.dat", "B.JPE", "c.jfif", "d.heic")}
    fault = items.pop("cat/d.heic")
    assert isinstance(fault, Unreadable) == (fault.id == "cat/d.heic")
    assert all(isinstance(item, Sample) for item in items.values())


@pytest.mark.parametrize(
    "paths",
    [
        ("train/cat/a.png", "train/dog/a.png", "test/cat/a.png", "test/dog/b.png"),
        ("train/cat/a.png", "train/dog/a.png", "test/cat/a.png", "test/dog/b.png", "annotations/a.png"),
        ("Training/cat/a.png", "Testing/cat/a.png", "Testing/dog/b.png"),
        ("seg_train/cat/a.png", "seg_test/cat/a.png", "seg_test/dog/b.png", "seg_pred/a.png"),
        ("cat/train/a.png", "cat/test/a.png", "dog/train/a.png", "dog/test/b.png"),
    ],
)
def test_training_and_test_images_are_not_mixed(
    tmp_path: Path, plain: Callable[..., bytes], paths: tuple[str, ...]
) -> None:
    spec = tree(tmp_path, plain(), *paths)
    with pytest.raises(UserError, match=r"splits.*choose one with \?split=\w*[tT]est"):
        open_data(spec)
    source = open_data(spec + "?split=test")
    assert source.class_names == ("cat", "dog")
    assert len(list(source.samples())) == 2
    with pytest.raises(UserError, match="no split 'val'"):
        open_data(spec + "?split=val")


def test_splits_that_hold_images_are_no_classes(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    with pytest.raises(UserError, match=r"'train2017', 'val2017' of .* are splits"):
        open_data(tree(tmp_path / "a", plain(), "train2017/a.png", "val2017/a.png"))
    names = open_data(tree(tmp_path / "b", plain(), "train station/a.png", "test tube/a.png")).class_names
    assert names == ("test tube", "train station")


def test_a_split_beside_something_else_is_told(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    spec = tree(tmp_path, plain(), "train/cat/a.png", "train/dog/a.png", "meta/a.png")
    (remark,) = open_data(spec).remarks
    assert remark.startswith("'train' is taken for a class, and its folders ('cat', 'dog') are none")
    assert open_data(spec + "?split=train").class_names == ("cat", "dog")


def test_a_train_may_be_a_vehicle(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    spec = tree(tmp_path / "a", plain(), "train/a.png", "bus/a.png", "test tube/a.png")
    assert open_data(spec).class_names == ("bus", "test tube", "train")
    with pytest.raises(
        UserError, match=r"looks like a split, not like a class: pass imagefolder:.*/test or .split=test"
    ):
        open_data(tree(tmp_path / "b", plain(), "test/cat/a.png", "test/dog/a.png", "labels/"))


def test_names_of_macos_are_those_of_the_list(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    words = ["\uace0\uc591\uc774", "\uac1c", "caf\u00e9"]
    spec = tree(tmp_path / "x", plain(), *(f"{unicodedata.normalize('NFD', word)}/a.png" for word in words))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(words), encoding="utf-8")
    source = open_data(spec, classes=names)
    for item in source.samples():
        assert isinstance(item, Sample)
        assert source.class_names[item.label] == unicodedata.normalize("NFC", item.id.split("/")[0])
    assert set(open_data(spec).class_names) == set(words)
    with pytest.raises(UserError, match="2 times"):
        open_data(tree(tmp_path / "y", plain(), "caf\u00e9/a.png", "cafe\u0301/a.png"))


@pytest.mark.parametrize("name", ["ca\x1b[2Jt", "ca\u202et", "ca\x07t"])
def test_names_that_would_steer_a_terminal_are_refused(tmp_path: Path, plain: Callable[..., bytes], name: str) -> None:
    with pytest.raises(UserError, match=r"control character U\+") as caught:
        open_data(tree(tmp_path, plain(), f"{name}/a.png", "dog/a.png"))
    assert str(caught.value).isprintable()


def test_classes_that_hold_only_folders_are_told(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    source = open_data(tree(tmp_path, plain(), "animal/cat/a.png", "animal/dog/a.png", "vehicle/car/a.png"))
    assert source.class_names == ("animal", "vehicle")
    assert "as 'cat' in 'animal', and those are no classes" in source.remarks[0]
    assert not open_data(tree(tmp_path, plain(), "animal/a.png")).remarks


def test_beside_one_folder_with_images_the_empty_ones_are_the_other_classes(tmp_path: Path) -> None:
    for name in ("ape", "bee", "cat"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "bee" / "0.png")
    source = open_data(f"imagefolder:{tmp_path}")
    assert source.class_names == ("ape", "bee", "cat")
    assert [sample.label for sample in source.samples()] == [1]
    assert source.remarks == ["only 'bee' holds images: the empty folders count as classes"]


def test_the_content_follows_the_images_and_not_their_place(folder: Path, tmp_path: Path) -> None:
    before = ImageFolder(folder)
    known, named = before.content(), before.fingerprint()
    moved = folder.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*.png"):
        os.utime(path, (1, 1))
    assert known is not None
    assert ImageFolder(moved).content() == known
    changed = moved / "cat" / "0.png"
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    assert ImageFolder(moved).fingerprint() == named  # which looks at names and sizes
    assert ImageFolder(moved).content() != known
