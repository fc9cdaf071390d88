"""Hub data sets, from local folders in the hub's formats."""

from __future__ import annotations

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
