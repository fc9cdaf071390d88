"""The data sets of torchvision: `torchvision:NAME:ROOT`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from robustvlm.core.network import download_seconds, within
from robustvlm.data.decode import DecodeError, to_rgb
from robustvlm.data.names import readable
from robustvlm.data.source import DataSource, Sample, Unreadable
from robustvlm.data.specs import Spec
from robustvlm.errors import UserError, nearest
from robustvlm.text import one_line

_DIGITS = tuple("0123456789")
# Sets without a list of names in torchvision whose classes are plain.
_NAMES = {"SVHN": _DIGITS, "USPS": _DIGITS}


class TorchvisionSource(DataSource):
    """A classification set of torchvision by its class name; ids are `SPLIT/INDEX`.

    Nothing is downloaded unless `download` is true. `split` is `test` unless given; sets with `train=True/False` take
    `train` and `test`. Sets without class names need --classes.

    Raises:
        UserError: no such set or split, not downloaded, or a set whose targets are not class labels.

    Example:
        >>> TorchvisionSource("FakeData", Path()).ids()[:2]
        ['test/0', 'test/1']
    """

    def __init__(
        self, name: str, root: Path, *, split: str | None = None, download: bool = False, spec: str | None = None
    ) -> None:
        self.split = split or "test"
        kind = _find(name)
        self._data = _construct(kind, root, split, download)
        names = getattr(self._data, "classes", None) or _NAMES.get(kind.__name__, ())
        super().__init__(spec or f"torchvision:{name}:{root}", readable([_first_name(item) for item in names]))

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

    def _identity(self) -> Iterable[str]:
        yield f"{type(self._data).__name__} {self.split} {len(self._data)}"
        for name in ("targets", "labels", "_labels"):
            targets = getattr(self._data, name, None)
            if targets is not None:
                yield from (str(target) for target in list(targets))


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
    if split is not None and not {"split", "train"} & set(accepted):
        raise UserError(f"{kind.__name__} has no splits in torchvision: leave out ?split={split}")
    split = split or "test"
    settings: dict[str, Any] = {"root": str(root)} if "root" in accepted else {}
    if "split" in accepted:
        settings["split"] = split
    elif "train" in accepted:
        if split not in {"train", "test"}:
            raise UserError(f"{kind.__name__} has the splits train and test, got '{split}'")
        settings["train"] = split == "train"
    if "download" in accepted:
        settings["download"] = download
    try:
        if download:
            return within(download_seconds(), partial(kind, **settings))
        return kind(**settings)
    except (RuntimeError, FileNotFoundError, NotADirectoryError) as error:
        if download or "download" not in accepted:
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
