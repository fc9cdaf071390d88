"""torchvision's sets: one read from files written here, one made up by torchvision, and the faults."""

from __future__ import annotations

import inspect
import struct
from pathlib import Path

import numpy as np
import pytest

from robustvlm.data.source import Sample, Unreadable
from robustvlm.data.specs import open_data
from robustvlm.errors import UserError


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Six images in MNIST's own file format."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(6 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(6, 28, 28)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 6, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 6) + bytes([3, 1, 4, 1, 5, 9]))
    return tmp_path


def test_a_set_read_from_its_files(mnist: Path) -> None:
    source = open_data(f"torchvision:MNIST:{mnist}")
    assert source.class_names[:3] == ("0", "1", "2") or source.class_names[:3] == ("zero", "one", "two")
    assert source.ids() == [f"test/{i}" for i in range(6)]
    items = [item for item in source.samples() if isinstance(item, Sample)]
    assert [item.label for item in items] == [3, 1, 4, 1, 5, 9]
    assert items[0].image.mode == "RGB"
    assert items[0].image.getpixel((5, 0)) == (5, 5, 5)
    assert open_data(f"torchvision:mnist:{mnist}?split=train").ids()[0] == "train/0"  # type: ignore[index]


def test_fingerprint_follows_the_labels(mnist: Path) -> None:
    before = open_data(f"torchvision:MNIST:{mnist}").fingerprint()
    labels = mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x08")
    assert open_data(f"torchvision:MNIST:{mnist}").fingerprint() != before


def test_a_set_without_names_needs_them(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {i}" for i in range(10)))
    with pytest.raises(UserError, match="holds no class names: pass --classes"):
        open_data("torchvision:FakeData:.")
    source = open_data("torchvision:FakeData:.", classes=names)
    items = list(source.samples(limit=3))
    assert len(items) == 3
    assert all(isinstance(item, Sample) and item.image.size == (224, 224) for item in items)


def test_an_image_that_fails_is_recorded(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    real = MNIST.__getitem__

    def broken(self: MNIST, index: int) -> object:
        if index == 2:
            raise OSError("read error\non two lines")
        return real(self, index)

    monkeypatch.setattr(MNIST, "__getitem__", broken)
    items = list(open_data(f"torchvision:MNIST:{mnist}").samples())
    assert [item for item in items if isinstance(item, Unreadable)] == [
        Unreadable("test/2", "damaged image: read error on two lines")
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:CIFAR10:nowhere", r"CIFAR10 is not at nowhere \(or damaged\): add \?download=1"),
        ("torchvision:SVHN:nowhere", "SVHN is not at nowhere"),
        ("torchvision:STL10:nowhere", "STL10 is not at nowhere"),
        ("torchvision:CIFAR10:nowhere?split=val", "CIFAR10 has the splits train and test, got 'val'"),
        ("torchvision:SVHN:nowhere?split=dev", "torchvision refused SVHN"),
        ("torchvision:CIFAR12:nowhere", "no data set 'CIFAR12': did you mean 'CIFAR10'"),
        ("torchvision:CIFAR10", "must be torchvision:NAME:ROOT"),
        ("torchvision:CIFAR10:x?downlod=1", "no option 'downlod': did you mean 'download'"),
        ("torchvision:CIFAR10:x?download=maybe", "the option download must be 1 or 0, got 'maybe'"),
    ],
)
def test_faults_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_data(spec)
    assert "\n" not in str(caught.value)


def test_a_split_that_the_set_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"FakeData has no splits in torchvision: leave out \?split=train"):
        open_data("torchvision:FakeData:.?split=train")


def test_the_content_follows_the_pixels(mnist: Path) -> None:
    before = open_data(f"torchvision:MNIST:{mnist}")
    file = mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    after = open_data(f"torchvision:MNIST:{mnist}")
    assert before.fingerprint() == after.fingerprint()
    assert None is not before.content() != after.content()
    assert open_data(f"torchvision:MNIST:{mnist}").content() == after.content()


def test_the_part_that_is_read_is_the_one_that_is_named(mnist: Path) -> None:
    raw = mnist / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, of_mnist in (("train", "train"), ("test", "t10k")):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            data = (mnist / "MNIST" / "raw" / f"{of_mnist}-{kind}").read_bytes()
            data = data[:-1] + b"\x02" if part == "test" else data
            (raw / f"emnist-digits-{part}-{kind}").write_bytes(data)
    labels = {
        split: [item.label for item in open_data(f"torchvision:EMNIST:{mnist}?split={split}").samples()]  # type: ignore[union-attr]
        for split in ("digits", "digits-train")
    }
    assert labels == {"digits": [3, 1, 4, 1, 5, 2], "digits-train": [3, 1, 4, 1, 5, 9]}
    assert open_data(f"torchvision:EMNIST:{mnist}?split=digits-train").ids()[0] == "digits-train/0"  # type: ignore[index]


def test_sets_that_name_their_parts_otherwise_are_not_read_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    asked = {}

    def opened(self: object, root: str, **options: object) -> None:
        del self, root
        asked.update(options)
        raise RuntimeError("opened")

    for name in ("Omniglot", "INaturalist"):
        made = getattr(datasets, name)
        opened.__signature__ = inspect.signature(made.__init__)  # type: ignore[attr-defined]
        monkeypatch.setattr(made, "__init__", opened)
        spec = f"torchvision:{name}:{tmp_path}"
        if name == "INaturalist":
            with pytest.raises(UserError, match=r"no part that is for tests by its name: pass \?split= and one of 20"):
                open_data(spec)
            spec += "?split=2021_valid"
        with pytest.raises(UserError, match="is not at"):
            open_data(spec)
    assert asked["background"] is False
    assert asked["version"] == "2021_valid"
    with pytest.raises(UserError, match=r"LSUN has no part 'test': pass \?split= and one of val, train"):
        open_data(f"torchvision:LSUN:{tmp_path}?split=test")


def test_of_a_set_without_parts_all_images_are_read_under_the_ids_they_had(tmp_path: Path, mnist: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {i}" for i in range(10)))
    source = open_data("torchvision:FakeData:.", classes=names)
    assert source.ids()[0] == "test/0"  # type: ignore[index]
    assert next(iter(source._identity())) == "FakeData test 1000"
    assert "FakeData has no part for tests: all its images are read, as test/0 and on" in source.remarks
    assert "no part for tests" not in str(open_data(f"torchvision:MNIST:{mnist}").remarks)
