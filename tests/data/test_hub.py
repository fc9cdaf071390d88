"""Hub data sets, from local folders in the hub's formats."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustvlm.data.source import Sample, Unreadable
from robustvlm.data.specs import open_data
from robustvlm.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)


@pytest.fixture
def saved(tmp_path: Path, plain: Callable[..., bytes]) -> Path:
    """Six images, one of them damaged, saved to disk by the library."""
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": plain((i, 0, 0)) if i != 4 else b"junk", "path": None} for i in range(6)]
    data = datasets.Dataset.from_dict({"img": images, "fine_label": [0, 1, 0, 1, 0, 1]}, features=features)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files" / "test.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["one", "splits", "files", "files?streaming=1"])
def test_local_formats(saved: Path, name: str) -> None:
    source = open_data(f"hf:{saved / name}")
    assert source.class_names == ("cat", "dog")
    items = list(source.samples())
    assert [item.id for item in items] == [f"test/{i}" for i in range(6)]
    assert source.ids() == (None if "streaming" in name else [f"test/{i}" for i in range(6)])
    assert [item.id for item in items if isinstance(item, Unreadable)] == ["test/4"]
    samples = [item for item in items if isinstance(item, Sample)]
    assert [item.label for item in samples] == [0, 1, 0, 1, 1]
    assert [item.image.getpixel((0, 0)) for item in samples] == [(i, 0, 0) for i in (0, 1, 2, 3, 5)]
    assert len(list(source.samples(limit=3))) == 3
    assert source.fingerprint() == open_data(f"hf:{saved / name}").fingerprint()


def test_an_image_folder(folder: Path) -> None:
    source = open_data(f"hf:{folder}?split=train")
    assert source.class_names == ("cat", "dog", "pickup_truck")
    assert sum(isinstance(item, Sample) for item in source.samples()) == 12


def test_faults_are_one_clear_line(saved: Path) -> None:
    for spec, message in (
        (f"{saved / 'splits'}?split=tests", "no split 'tests': did you mean 'test'"),
        (f"{saved / 'files'}?split=val", "cannot open the data set"),
        (f"{saved / 'files'}?image=imgs", "no column 'imgs': did you mean 'img'"),
        (f"{saved / 'files'}?image=fine_label", "does not hold images"),
        (f"{saved / 'files'}?label=img", "does not hold labels"),
        (f"{saved / 'files'}?stream=1", "no option 'stream': did you mean 'streaming'"),
        ("", "names no data set"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_data(f"hf:{spec}")
        assert "\n" not in str(caught.value)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {"datasets": None}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UserError, match=r"pip install 'robustvlm\[hub\]'"):
        open_data("hf:some/set")


def test_text_labels_and_splits_that_are_not_there(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"bytes": plain(), "path": None}] * 3, "label": ["10", "2", None]}
    datasets.Dataset.from_dict(rows, features=features, split="train").save_to_disk(tmp_path / "one")
    source = open_data(f"hf:{tmp_path / 'one'}")
    assert source.class_names == ("2", "10")
    assert [item.label for item in source.samples() if isinstance(item, Sample)] == [1, 0, -1]
    with pytest.raises(UserError, match=r"is one saved split .train."):
        open_data(f"hf:{tmp_path / 'one'}?split=test")


def test_one_of_several_numbers_is_not_taken_for_the_label(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "image_id": datasets.Value("int64"), "species": datasets.Value("int64")}
    )
    rows = {"image": [{"bytes": plain(), "path": None}], "image_id": [7], "species": [0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match=r"no label column: name one with .label=NAME"):
        open_data(f"hf:{tmp_path / 'one'}")


def described(folder: Path, plain: Callable[..., bytes], column: str, texts: list[Any], *, lines: bool = False) -> Path:
    """Write an image folder whose labels stand in metadata.csv, or in metadata.jsonl."""
    folder.mkdir(parents=True)
    rows = [{"file_name": f"{i}.png", column: text} for i, text in enumerate(texts)]
    for row in rows:
        (folder / row["file_name"]).write_bytes(plain((int(row["file_name"][0]), 0, 0)))
    if lines:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = "".join(f"{row['file_name']},{row[column]}\n" for row in rows)
        (folder / "metadata.csv").write_text(f"file_name,{column}\n{table}")
    return folder


@pytest.mark.parametrize(("column", "lines"), [("label", False), ("label", True), ("text", False), ("text", True)])
def test_image_folders_with_labels_as_texts(
    column: str, lines: bool, tmp_path: Path, plain: Callable[..., bytes]
) -> None:
    texts = ["dog", "cat", "dog", "ice cream"]
    described(tmp_path / "f/test", plain, column, texts, lines=lines)
    source = open_data(f"hf:{tmp_path / 'f'}")
    assert source.class_names == ("cat", "dog", "ice cream")
    found = {item.image.getpixel((0, 0))[0]: item.label for item in source.samples() if isinstance(item, Sample)}
    assert {i: source.class_names[label] for i, label in found.items()} == dict(enumerate(texts))
    assert any("the column 'text' are taken as classes" in remark for remark in source.remarks) == (column == "text")


def test_a_folder_that_names_no_split_is_taken_as_it_is(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    flat = described(tmp_path / "flat", plain, "label", ["dog", "cat", "dog"])
    source = open_data(f"hf:{flat}")
    assert source.class_names == ("cat", "dog")
    assert len(source.ids() or ()) == 3
    assert "the data were saved as the split 'train'" in source.remarks
    described(tmp_path / "told/train", plain, "label", ["dog", "cat", "dog"])
    with pytest.raises(UserError, match=r"split test.*'train'"):
        open_data(f"hf:{tmp_path / 'told'}")


def test_captions_are_no_classes(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    folder = described(tmp_path / "f/test", plain, "text", ["a dog", "a cat", "a red bike"]).parent
    with pytest.raises(UserError, match="another text for each of its 3 images: name a column of classes") as caught:
        open_data(f"hf:{folder}")
    assert "\n" not in str(caught.value)
    assert len(open_data(f"hf:{folder}?label=text").class_names) == 3


def test_a_single_saved_split_with_labels_as_texts(tmp_path: Path, plain: Callable[..., bytes]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    columns = {
        "image": [{"bytes": plain((i, 0, 0)), "path": None} for i in range(4)],
        "label": ["dog", "cat", "dog", None],
    }
    data = datasets.Dataset.from_dict(columns, features=features, split="validation")
    data.save_to_disk(str(tmp_path / "one"))
    source = open_data(f"hf:{tmp_path / 'one'}")
    assert [item.label for item in source.samples() if isinstance(item, Sample)] == [1, 0, 1, -1]
    assert source.remarks == ["the data were saved as the split 'validation'"]
    with pytest.raises(UserError, match=r"is one saved split \(validation\): leave out"):
        open_data(f"hf:{tmp_path / 'one'}?split=test")


def test_the_content_follows_the_images(saved: Path, plain: Callable[..., bytes]) -> None:
    known = [open_data(f"hf:{saved / name}").content() for name in ("one", "splits", "files")]
    assert None is not known[0] == known[1] == known[2]
    assert open_data(f"hf:{saved / 'files'}?streaming=1").content() is None
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": plain((i, 9, 0)), "path": None} for i in range(6)]
    data = datasets.Dataset.from_dict({"img": images, "fine_label": [0, 1, 0, 1, 0, 1]}, features=features)
    data.save_to_disk(str(saved / "other"))
    other = open_data(f"hf:{saved / 'other'}")
    assert other.fingerprint() == open_data(f"hf:{saved / 'one'}").fingerprint()
    assert other.content() != known[0]
