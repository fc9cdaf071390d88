"""The data sets of torchvision: `torchvision:NAME:ROOT`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from robustvlm.core.files import beginning
from robustvlm.core.network import download_seconds, within
from robustvlm.data.decode import DecodeError, to_rgb
from robustvlm.data.names import readable
from robustvlm.data.source import SAMPLED, DataSource, Sample, Unreadable, select
from robustvlm.data.specs import Spec
from robustvlm.errors import UserError, nearest
from robustvlm.text import one_line

_DIGITS = tuple("0123456789")
# Sets without a list of names in torchvision whose classes are plain.
_NAMES = {"SVHN": _DIGITS, "USPS": _DIGITS}
# Where sets keep the paths of their images, alone or each with its class.
_FILES = ("_image_files", "samples", "_samples", "imgs")


class TorchvisionSource(DataSource):
    """A classification set of torchvision by its class name; ids are `SPLIT/INDEX`.

    Nothing is downloaded unless `download` is true. `split` is `test` unless given; sets with `train=True/False` take
    `train` and `test`. Sets that name their parts otherwise take those of `_PARTS`, and need one where none is `test`;
    of sets without parts all images are read, which is said. Sets without class names need --classes.

    Raises:
        UserError: no such set or split, not downloaded, or a set whose targets are not class labels.

    Example:
        >>> TorchvisionSource("FakeData", Path()).ids()[:2]
        ['test/0', 'test/1']
    """

    def __init__(
        self, name: str, root: Path, *, split: str | None = None, download: bool = False, spec: str | None = None
    ) -> None:
        kind = _find(name)
        # Of sets without parts, too: ids and what data are known by have been called so from the beginning.
        self.split = split or "test"
        self._data = _construct(kind, root, split, download)
        names = getattr(self._data, "classes", None) or _NAMES.get(kind.__name__, ())
        super().__init__(spec or f"torchvision:{name}:{root}", readable([_first_name(item) for item in names]))
        if not _has_parts(kind):
            self.remarks.append(f"{kind.__name__} has no part for tests: all its images are read, as test/0 and on")

    @classmethod
    def from_spec(cls, spec: Spec) -> TorchvisionSource:
        """Open `torchvision:NAME:ROOT[?split=SPLIT&download=1]`."""
        spec.check_options("split", "download")
        name, colon, root = spec.rest.partition(":")
        if not name or not colon:
            raise UserError(f"'{spec.text}' must be torchvision:NAME:ROOT, for example torchvision:CIFAR10:data")
        path = Path(root or ".").expanduser()
        return cls(name, path, split=spec.options.get("split"), download=spec.flag("download"), spec=spec.text)

    def ids(self) -> list[str]:
        """Return `SPLIT/INDEX` for every image."""
        return [f"{self.split}/{i}" for i in range(len(self._data))]

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for i, name in enumerate(self.ids()):
            if keep(name):
                yield self._item(name, i)

    def _item(self, name: str, index: int) -> Sample | Unreadable:
        try:
            image, label = self._data[index]
            rgb = to_rgb(image) if isinstance(image, Image.Image) else None
        except (DecodeError, MemoryError) as error:
            return Unreadable(name, one_line(error))
        except Exception as error:  # each set reads its files in its own way
            return Unreadable(name, f"damaged image: {one_line(error)}")
        if rgb is None or not _is_label(label):
            raise UserError(
                f"'{self.spec}' gives {type(label).__name__} targets: only sets with one class an image serve"
            )
        return Sample(name, rgb, int(label))

    def _stored(self) -> Iterable[tuple[str, bytes]]:
        place = {name: number for number, name in enumerate(self.ids())}
        pixels: Any = getattr(self._data, "data", None)
        listed = next((files for key in _FILES if isinstance(files := getattr(self._data, key, None), list)), None)
        for name in select(place, SAMPLED):
            if hasattr(pixels, "shape") and len(pixels) == len(place):
                yield name, np.asarray(pixels[place[name]]).tobytes()
            elif listed is not None and len(listed) == len(place):
                file = listed[place[name]]
                yield name, beginning(Path(str(file[0] if isinstance(file, tuple | list) else file)))

    def _identity(self) -> Iterable[str]:
        yield f"{type(self._data).__name__} {self.split} {len(self._data)}"
        for name in ("targets", "labels", "_labels"):
            targets = getattr(self._data, name, None)
            if targets is not None:
                yield from (str(target) for target in list(targets))


_PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "EMNIST": {
        name + suffix: {"split": name, "train": train}
        for name in datasets.EMNIST.splits
        for suffix, train in (("", False), ("-train", True))
    },
    "INaturalist": {
        name: {"version": name} for name in ("2021_valid", "2021_train", "2021_train_mini", "2019", "2018", "2017")
    },
    "LSUN": {name: {"classes": name} for name in ("val", "train")},
    "Omniglot": {"test": {"background": False}, "train": {"background": True}},
}
"""Sets whose parts have other options than `split` and `train`; not given, torchvision reads those for training."""


def _has_parts(kind: Any) -> bool:
    return kind.__name__ in _PARTS or bool({"split", "train"} & set(inspect.signature(kind.__init__).parameters))


def _part_of(kind: Any, split: str | None) -> dict[str, Any]:
    """Return the options that choose a part of a set of `_PARTS`."""
    parts = _PARTS[kind.__name__]
    chosen = split or "test"
    if chosen not in parts:
        what = f"has no part '{chosen}'" if split else "has no part that is for tests by its name"
        raise UserError(f"{kind.__name__} {what}: pass ?split= and one of {', '.join(parts)}")
    return parts[chosen]


def _find(name: str) -> Any:
    sets = {
        key: value
        for key, value in vars(datasets).items()
        if inspect.isclass(value) and issubclass(value, datasets.VisionDataset) and key not in _GENERIC
    }
    folded = {key.lower(): value for key, value in sets.items()}
    if name.lower() not in folded:
        raise UserError(f"torchvision has no data set '{name}': {nearest(name, sets)}")
    return folded[name.lower()]


_GENERIC = frozenset({"VisionDataset", "DatasetFolder", "ImageFolder"})


def _construct(kind: Any, root: Path, split: str | None, download: bool) -> Any:
    accepted = inspect.signature(kind.__init__).parameters
    if split is not None and not _has_parts(kind):
        raise UserError(f"{kind.__name__} has no splits in torchvision: leave out ?split={split}")
    settings: dict[str, Any] = {"root": str(root)} if "root" in accepted else {}
    chosen = split or "test"
    if kind.__name__ in _PARTS:
        settings |= _part_of(kind, split)
    elif "split" in accepted:
        settings["split"] = chosen
    elif "train" in accepted:
        if chosen not in {"train", "test"}:
            raise UserError(f"{kind.__name__} has the splits train and test, got '{chosen}'")
        settings["train"] = chosen == "train"
    if "download" in accepted or kind.__name__ == "EMNIST":  # which passes it on
        settings["download"] = download
    try:
        if download:
            return within(download_seconds(), partial(kind, **settings))
        return kind(**settings)
    except (RuntimeError, FileNotFoundError, NotADirectoryError) as error:
        if download or "download" not in settings:
            raise UserError(f"{kind.__name__} could not be opened at {root}: {one_line(error)}") from None
        raise UserError(
            f"{kind.__name__} is not at {root} (or damaged): add ?download=1 to download it, or give its folder"
        ) from None
    except Exception as error:  # wrong splits and the like, in each set's own words
        raise UserError(f"torchvision refused {kind.__name__}: {one_line(error)}") from None


def _is_label(value: Any) -> bool:
    if isinstance(value, (int, bool)):
        return True
    return getattr(value, "ndim", None) == 0 and "int" in str(getattr(value, "dtype", ""))


def _first_name(value: Any) -> str:
    """Return a class name; ImageNet's are tuples of synonyms."""
    name = value[0] if isinstance(value, tuple) else value
    # MNIST's are of the form "7 - seven".
    return str(name).partition(" - ")[0]
