"""WebDataset shards: `wds:PATH` or `wds:URL`, tar files whose members share a key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from robustvlm.core.foreign_text import one_line
from robustvlm.data.classes import read_class_names
from robustvlm.data.decode import decode
from robustvlm.data.labels import label_of
from robustvlm.data.names import read_lines
from robustvlm.data.prompts import DEFAULT, check_templates
from robustvlm.data.shards import Shard, find_shards
from robustvlm.data.source import DataSource, Sample, Unreadable
from robustvlm.data.specs import Spec
from robustvlm.errors import MissingExtra, UserError

_IMAGES = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "jfif",
    "jpe",
    "jp2",
    "avif",
    "heic",
    "ppm",
    "pgm",
)
_LABELS = ("cls", "json", "txt")
_TEMPLATES = "zeroshot_classification_templates.txt"
_JSON_KEYS = ("label", "cls", "class")


class WebDatasetSource(DataSource):
    """Samples of tar shards, streamed in order; ids are `SHARD/KEY`.

    A sample has an image (jpg, png, webp, ...) and a label: `cls` or `txt` with a number or class name, or `json` with
    one under `label`, `cls` or `class`. Class names come from --classes or a file `classnames.txt` beside the shards
    or one folder above, templates from `zeroshot_classification_templates.txt` there, as CLIP_benchmark lays them out.
    A damaged shard is one recorded fault; its other samples and the next shards are still read.

    Raises:
        UserError: the package `webdataset` is missing, no shard there, no sample in any, a label that is no class.
    """

    def __init__(
        self, shards: list[Shard], *, image: str | None = None, label: str | None = None, spec: str = "wds"
    ) -> None:
        self._shards = shards
        self._images = (image,) if image else _IMAGES
        self._label_names = (label,) if label else _LABELS
        names, about_names = _names_beside(shards)
        templates, about_templates = _templates_beside(shards)
        super().__init__(spec, names, templates=templates)
        self.remarks += [*about_names, *about_templates]

    @classmethod
    def from_spec(cls, spec: Spec) -> WebDatasetSource:
        """Open `wds:PATH_OR_URL[?image=EXTENSION&label=EXTENSION&split=NAME]`; `{000..007}` and folders give shards."""
        spec.check_options("image", "label", "split")
        _library()
        options = spec.options
        return cls(find_shards(spec), image=options.get("image"), label=options.get("label"), spec=spec.text)

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        any_sample, first_fault = False, ""
        for shard in self._shards:
            faults: list[str] = []
            seen: set[str] = set()
            for row in _rows(shard, faults):
                any_sample = True
                item = self._item(f"{shard.name}/{row['__key__']}", row, keep, seen)
                if item is not None:
                    yield item
            for fault in faults:
                first_fault = first_fault or fault
                yield Unreadable(shard.name, f"damaged shard: {fault}")
        if not any_sample:
            raise UserError(f"'{self.spec}' holds no sample" + (f": {first_fault}" if first_fault else ""))

    def _item(
        self, name: str, row: dict[str, Any], keep: Callable[[str], bool], seen: set[str]
    ) -> Sample | Unreadable | None:
        path = PurePosixPath(row["__key__"])
        if path.is_absolute() or ".." in path.parts:
            return Unreadable(name, "a key that leads out of its shard")
        if name in seen:
            return Unreadable(name, "the same key twice in one shard: the members of a sample must stand side by side")
        seen.add(name)
        if not keep(name):
            return None
        image = next((row[key] for key in self._images if key in row), None)
        if image is None:
            return Unreadable(name, f"no image among its members ({_members(row)})")
        label = next(((key, row[key]) for key in self._label_names if key in row), None)
        if label is None:
            return Unreadable(name, f"no label among its members ({_members(row)})")
        return decode(name, image, self._meant(*label, f"'{name}'"))

    def _meant(self, kind: str, data: bytes, where: str) -> int:
        """Return the label as the source itself counts: by the names beside the shards, as long as there are any."""
        try:
            return _label(kind, data, self.marks or self.class_names, where)
        except UserError:
            if not self.marks or self._label_of is not None:
                raise
            return _label(kind, data, self.class_names, where)  # of the same order

    def _identity(self) -> Iterable[str]:
        return (f"{shard.name} {shard.size}" for shard in self._shards)


def _library() -> Any:
    try:
        from webdataset import tariterators
    except ImportError:
        raise MissingExtra("webdataset", extra="wds") from None
    return tariterators


def _rows(shard: Shard, faults: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as `__key__` and members by extension; what goes wrong is added to `faults`."""

    def handler(error: Exception) -> bool:
        faults.append(one_line(error.args[0] if error.args else error))
        return True

    tar = _library()
    try:
        with shard.open() as stream:
            members = tar.tar_file_expander([{"url": shard.name, "stream": stream}], handler=handler)
            yield from tar.group_by_keys(members, handler=handler)
    except OSError as error:
        faults.append(one_line(error))


def _label(kind: str, data: bytes, class_names: Sequence[str], where: str) -> int:
    """Return the label in a member's bytes: a number, or the name of a class."""
    text = data.decode("utf-8", "replace").strip()
    value: Any = text
    if kind.endswith("json"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"the label of {where} is not valid JSON") from None
        if isinstance(value, dict):
            value = next((value[key] for key in _JSON_KEYS if key in value), None)
    return label_of(value if isinstance(value, str) else json.dumps(value), class_names, where)


def _members(row: dict[str, Any]) -> str:
    return " ".join(sorted(key for key in row if not key.startswith("__")))[:80]


def _beside(shards: list[Shard], name: str) -> Path | None:
    """Return a file next to local shards or one folder above, as CLIP_benchmark lays them out."""
    first = shards[0].path
    folders = (first.parent, first.parent.parent) if first else ()
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _names_beside(shards: list[Shard]) -> tuple[tuple[str, ...], list[str]]:
    file = _beside(shards, "classnames.txt")
    if file is None:
        return (), []
    found, note = read_class_names(file)
    return tuple(found), [note] if note else []


def _templates_beside(shards: list[Shard]) -> tuple[tuple[str, ...], list[str]]:
    """Return the templates beside the shards; there the place of the name is written {c}."""
    file = _beside(shards, _TEMPLATES)
    if file is None:
        return DEFAULT, []
    lines = [line.replace("{c}", "{}") for line in read_lines(file, "templates")]
    found = check_templates(lines, f"the templates file {file}")
    return found, [f"{len(found)} prompt templates of {_TEMPLATES} beside the shards are used"]
