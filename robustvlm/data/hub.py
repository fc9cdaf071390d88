"""Data sets of the Hugging Face hub, or local folders in its formats: `hf:NAME`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from robustvlm.core.files import beginning
from robustvlm.core.network import download_seconds, within
from robustvlm.data.decode import decode
from robustvlm.data.labels import TextLabels, captions_of
from robustvlm.data.parquet import IMAGE_COLUMNS, LABEL_COLUMNS
from robustvlm.data.source import SAMPLED, UNKNOWN, DataSource, Sample, Unreadable, select
from robustvlm.data.specs import Spec
from robustvlm.data.splits import is_junk, split_in, split_kind
from robustvlm.errors import MissingExtra, UserError, nearest
from robustvlm.text import one_line

_TEXT = "text"
_OPTIONS = ("split", "config", "revision", "image", "label", "captions", "subgroup", "streaming")


class HubSource(DataSource):
    """A split of a hub data set; ids are `SPLIT/INDEX`.

    The split is downloaded to the library's cache and read from there, so a limit selects ids evenly. With
    `streaming` nothing is stored, but a limit takes the first images, whatever their class.

    Raises:
        UserError: the package `datasets` is missing, no such data set, split or column, or a column of another type.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        image: str | None = None,
        label: str | None = None,
        captions: str | None = None,
        subgroup: str | None = None,
        streaming: bool = False,
        spec: str | None = None,
    ) -> None:
        self.name, self.split, self.streaming = name, split or "test", streaming
        data = _load(name, config=config, split=split, revision=revision, streaming=streaming)
        features = dict(data.features or data._resolve_features().features)
        self._image = _column(features, image, IMAGE_COLUMNS, _is_image, "image", name)
        usual = _label_columns(features)
        texts = any(_is_text(features[key]) for key in usual if key in features)
        fits = _is_label_or_text if label is not None or texts else _is_label
        self._captions, self._subgroup = captions, subgroup
        for column in (captions, subgroup):
            if column is not None and column not in features:
                raise UserError(f"'{name}' has no column '{column}': {nearest(column, features)}")
        self._label: str | None = None
        if label != "" and (captions is None or label is not None or any(key in features for key in LABEL_COLUMNS)):
            self._label = _column(features, label, usual, fits, "label", name)
        names = getattr(features.get(self._label), "names", None) or ()
        self._texts = None
        if self._label is not None and _is_text(features[self._label]):
            if streaming:
                raise UserError(
                    f"the labels of '{name}' are texts, which cannot be numbered while streaming: leave it out"
                )
            values = [text for text in data.unique(self._label) if text is not None]
            self._texts = TextLabels(values, f"column '{self._label}' of {name}")
            names = self._texts.marks
            if label is None and self._label == _TEXT and len(names) == len(data):
                raise UserError(
                    f"the column '{_TEXT}' of '{name}' has another text for each of its {len(data)} images: name a "
                    f"column of classes with ?label=NAME ({', '.join(features)})"
                )
        # Decoding is ours, so that a damaged image is a recorded fault and not the end of the run.
        read = (self._image, self._label, captions, subgroup)
        self._data = data.select_columns(list(dict.fromkeys(column for column in read if column is not None)))
        if _kind(features[self._image]) == "Image":
            self._data = self._data.cast_column(self._image, _datasets().Image(decode=False))
        super().__init__(spec or f"hf:{name}", tuple(names))
        self.captioned = captions is not None
        if label is None and self._label == _TEXT:
            self.remarks.append(f"the texts of the column '{_TEXT}' are taken as classes: {len(names)} of them")
        own = str(getattr(data, "split", None) or self.split)
        if own != self.split:
            self.remarks.append(f"the data were saved as the split '{own}'")

    @classmethod
    def from_spec(cls, spec: Spec) -> HubSource:
        """Open `hf:NAME[?split=&config=&revision=&image=&label=&captions=&subgroup=&streaming=1]`."""
        spec.check_options(*_OPTIONS)
        if not spec.rest:
            raise UserError("'hf' names no data set: write hf:NAME, for example hf:uoft-cs/cifar10")
        options = {name: value for name, value in spec.options.items() if name != "streaming"}
        return cls(spec.rest, streaming=spec.flag("streaming"), spec=spec.text, **options)

    def ids(self) -> list[str] | None:
        """Return `SPLIT/INDEX` for every image, or None when streaming."""
        return None if self.streaming else [f"{self.split}/{i}" for i in range(len(self._data))]

    def check(self) -> None:
        """Refuse labels that have no class name; say where numbers may begin at 1 instead of 0."""
        if self._texts is None and self._label is not None and not self.streaming:
            labels = {label for label in self._data.unique(self._label) if label is not None}
            self.check_numbers(labels, f"column '{self._label}'")

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        if self.streaming:
            for i, row in enumerate(self._data):
                if keep(f"{self.split}/{i}"):
                    yield self._sample(f"{self.split}/{i}", row)
            return
        for i in range(len(self._data)):
            if keep(f"{self.split}/{i}"):
                yield self._sample(f"{self.split}/{i}", self._data[i])

    def _sample(self, image_id: str, row: dict[str, Any]) -> Sample | Unreadable:
        data, label = _data_of(row[self._image]), None if self._label is None else row[self._label]
        if not data:
            return Unreadable(image_id, "no image bytes in this row")
        meant = self._texts[label] if self._texts is not None else UNKNOWN if label is None else int(label)
        captions = () if self._captions is None else captions_of(row[self._captions])
        part = None if self._subgroup is None else row[self._subgroup]
        return decode(image_id, data, meant, captions=captions, subgroup="" if part is None else str(part))

    def _stored(self) -> Iterable[tuple[str, bytes]]:
        ids = self.ids() or []
        place = {name: number for number, name in enumerate(ids)}
        for name in select(ids, SAMPLED):
            data = _data_of(self._data[place[name]][self._image])
            yield name, beginning(data) if isinstance(data, Path) else data if isinstance(data, bytes) else b""

    def _identity(self) -> Iterable[str]:
        asked = [name for name in (self._captions, self._subgroup) if name is not None]
        yield " ".join([self.split, self._image, str(self._label), *asked])
        if self.streaming:
            yield self.name
            return
        yield str(len(self._data))
        for column in [name for name in (self._label, *asked) if name is not None]:
            for batch in self._data.select_columns([column]).iter(batch_size=4096):
                yield repr(batch[column])


def _data_of(value: Any) -> Any:
    """Return the bytes of an image, or its path: local image folders hold paths, data from the hub the bytes."""
    if not isinstance(value, dict):
        return value
    return value["bytes"] if value.get("bytes") is not None else value.get("path") and Path(value["path"])


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", extra="hub") from None
    return datasets


def _load(name: str, *, config: str | None, split: str | None, revision: str | None, streaming: bool) -> Any:
    library = _datasets()
    path = Path(name).expanduser()
    try:
        if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
            data = library.load_from_disk(str(path))
            own = str(data.split) if data.split is not None else None
            if split is not None and own != split:
                raise UserError(
                    f"'{name}' is one saved split ({own or 'it does not say which'}): leave out ?split={split}"
                )
            return data
        asked, split = split, split or "test"
        if (path / "dataset_dict.json").is_file():
            splits = library.load_from_disk(str(path))
            if split not in splits:
                raise UserError(f"'{name}' has no split '{split}': {nearest(split, splits)}")
            return splits[split]
        target = str(path) if path.exists() else name
        fetch = partial(library.load_dataset, target, config, split=split, revision=revision, streaming=streaming)
        if int(library.__version__.split(".")[0]) < 4:
            fetch = partial(fetch, trust_remote_code=False)  # these versions know data sets that are programs
        try:
            return within(download_seconds(), fetch)
        except ValueError:
            # Of a folder without splits the library makes one, called train.
            only = _only_split(library, path, config) if asked is None and path.is_dir() else None
            if only is None:
                raise
            return within(download_seconds(), partial(fetch, split=only))
    except UserError:
        raise
    except Exception as error:  # network, hub and format faults come in many types
        raise UserError(f"cannot open the data set '{name}' (split {split}): {one_line(error)}") from None


def _only_split(library: Any, folder: Path, config: str | None) -> str | None:
    """Return the one split of a folder; None for several, and for one that is named: it may be meant for training."""
    found = library.get_dataset_split_names(str(folder), config)
    told = any(split_kind(entry.stem) or split_in(entry.stem) for entry in folder.iterdir() if not is_junk(entry.name))
    return str(found[0]) if len(found) == 1 and not told else None


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _is_image(feature: Any) -> bool:
    return _kind(feature) == "Image" or getattr(feature, "dtype", "") in {"binary", "large_binary"}


def _label_columns(features: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names by which labels are known; where there is none of them, image folders have them as `text`."""
    labelled = any(_is_label_or_text(features[key]) for key in LABEL_COLUMNS if key in features)
    others = [key for key in features if _is_label(features[key])]
    return LABEL_COLUMNS if labelled or others else (_TEXT,)


def _is_label(feature: Any) -> bool:
    return _kind(feature) == "ClassLabel" or str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


def _is_text(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")) in {"string", "large_string"}


def _is_label_or_text(feature: Any) -> bool:
    return _is_label(feature) or _is_text(feature)


def _column(
    features: dict[str, Any],
    named: str | None,
    usual: tuple[str, ...],
    fits: Callable[[Any], bool],
    what: str,
    name: str,
) -> str:
    if named is not None and named not in features:
        raise UserError(f"'{name}' has no column '{named}': {nearest(named, features)}")
    if named is not None and not fits(features[named]):
        raise UserError(f"the column '{named}' of '{name}' does not hold {what}s: it is {features[named]}")
    order = [named] if named is not None else [*(key for key in usual if key in features)]
    found = next((key for key in order if fits(features[key])), None)
    if found is None:
        # No usual name: the one column of the kind, if there is only one.
        others = [key for key in features if fits(features[key])]
        found = others[0] if len(others) == 1 else None
    if found is None:
        raise UserError(f"'{name}' has no {what} column: name one with ?{what}=NAME ({', '.join(features)})")
    return found
