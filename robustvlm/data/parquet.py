"""Images in Parquet files, in the format of the Hugging Face hub: `parquet:FILE`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from robustvlm.data.decode import decode
from robustvlm.data.labels import TextLabels, captions_of
from robustvlm.data.source import SAMPLED, UNKNOWN, DataSource, Sample, Unreadable, select
from robustvlm.data.specs import Spec
from robustvlm.data.splits import chosen_split, one_split
from robustvlm.errors import UserError, nearest
from robustvlm.text import one_line

# Which columns of a Parquet file hold images and labels, and the class names its schema carries

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")


@dataclass(frozen=True)
class Columns:
    """The columns that are read, whether labels are text, and the class names the schema knows.

    `label` is None for captions without classes; `captions` and `subgroup` are columns that were asked for.
    """

    image: str
    label: str | None
    text_labels: bool
    class_names: tuple[str, ...]
    captions: str | None = None
    subgroup: str | None = None

    @property
    def names(self) -> list[str]:
        """All columns that are read, each once."""
        every = (self.image, self.label, self.captions, self.subgroup)
        return list(dict.fromkeys(name for name in every if name is not None))


def find_columns(
    schema: pa.Schema,
    image: str | None,
    label: str | None,
    where: str,
    *,
    captions: str | None = None,
    subgroup: str | None = None,
) -> Columns:
    """Return the columns to read: those named, else the usual ones. With captions there may be no label, nor where its
    column is named "": every class is unknown then.

    Raises:
        UserError: a column that is missing or of another type than images, labels or texts have.
    """
    image = image or _usual(schema, IMAGE_COLUMNS, "image", where)
    if label is None and (captions is None or any(name in schema.names for name in LABEL_COLUMNS)):
        label = _usual(schema, LABEL_COLUMNS, "label", where)
    for name in (image, label or None, captions, subgroup):
        if name is not None and name not in schema.names:
            raise UserError(f"{where} has no column '{name}': {nearest(name, schema.names)}")
    kind = schema.field(image).type
    if not _is_image(kind):
        raise UserError(f"{where}: column '{image}' is {kind}; images are bytes or a struct with a field 'bytes'")
    if captions is not None and not _is_captions(schema.field(captions).type):
        kind = schema.field(captions).type
        raise UserError(f"{where}: column '{captions}' is {kind}; captions are texts or lists of texts")
    if not label:
        return Columns(image, None, False, (), captions, subgroup)
    kind = _plain(schema.field(label).type)
    if not (pa.types.is_integer(kind) or _is_text(kind)):
        raise UserError(f"{where}: column '{label}' is {kind}; labels are integers or text")
    names = () if _is_text(kind) else _class_names(schema.metadata or {}, label)
    return Columns(image, label, _is_text(kind), names, captions, subgroup)


def _usual(schema: pa.Schema, names: Sequence[str], what: str, where: str) -> str:
    found = next((name for name in names if name in schema.names), None)
    if found is None:
        shown = ", ".join(schema.names[:12])
        none = ", or write ?label= for images without labels" if what == "label" else ""
        raise UserError(f"{where} has no {what} column: name one of its columns with ?{what}=NAME ({shown}){none}")
    return found


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_bytes(kind.field(index).type)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_captions(kind: pa.DataType) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return _is_text(_plain(kind.value_type if listed else kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the names in the metadata: of the label's ClassLabel feature, or a plain list under `classes`."""
    names = _json(metadata.get(b"classes"))
    hub = _json(metadata.get(b"huggingface"))
    for step in ("info", "features", label):
        hub = hub.get(step) if isinstance(hub, dict) else None
    if isinstance(hub, dict) and hub.get("names"):
        names = hub["names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def _json(value: bytes | None) -> Any:
    try:
        return json.loads(value) if value else None
    except (ValueError, RecursionError):
        return None


# Images in Parquet files, in the format of the Hugging Face hub: `parquet:FILE`

_BATCH = 32
"""Rows decoded from Parquet at once; images are held one batch at a time."""
_GROUPS, _FEW, _MOST = 8, 8, 2**22
"""Of how many row groups a digest looks at the first images, how many are read at once, and bytes of each."""


class ParquetSource(DataSource):
    """Rows of one Parquet file, or of a folder of them; ids are `STEM/ROW`.

    The image column holds bytes or a struct with `bytes`; the label column integers, or text that names the class.
    Class names come from the schema's metadata (ClassLabel) where it has them. A null label is an unknown class, as is
    -1. A folder's files must be of one split, told by their names, unless `split` chooses one.

    Raises:
        UserError: no such file, not Parquet, no such column, a column of another type, a label without a class name,
            several splits in one folder.
    """

    def __init__(
        self,
        path: Path,
        *,
        image: str | None = None,
        label: str | None = None,
        captions: str | None = None,
        subgroup: str | None = None,
        split: str | None = None,
        spec: str | None = None,
    ) -> None:
        self._paths = _paths(path, split)
        opened = [_open(file) for file in self._paths]
        found = [
            find_columns(file.schema_arrow, image, label, str(at), captions=captions, subgroup=subgroup)
            for file, at in zip(opened, self._paths, strict=True)
        ]
        self._columns: Columns = found[0]
        for other, at in zip(found, self._paths, strict=True):
            if other.text_labels != found[0].text_labels:
                raise UserError(
                    f"labels are texts in one of {self._paths[0]} and {at}, numbers in the other: make them alike"
                )
            if (other.image, other.label, other.text_labels) != (found[0].image, found[0].label, found[0].text_labels):
                raise UserError(f"{at} has other columns than {self._paths[0]}: a folder must hold files of one schema")
        _check_same_names(self._paths, found)
        self._rows = [file.metadata.num_rows for file in opened]
        if not sum(self._rows):
            raise UserError(f"{path} holds no row")
        label_name, found_labels = self._columns.label, self._distinct_labels()
        self._texts = (
            TextLabels(found_labels, f"column '{label_name}' of {path}") if self._columns.text_labels else None
        )
        self._labels = [] if self._texts else sorted(found_labels)
        names = self._columns.class_names or (self._texts.marks if self._texts else ())
        super().__init__(spec or f"parquet:{path}", names)
        self.captioned = captions is not None

    @classmethod
    def from_spec(cls, spec: Spec) -> ParquetSource:
        """Open `parquet:FILE[?image=COLUMN&label=COLUMN&captions=COLUMN&subgroup=COLUMN&split=NAME]`."""
        spec.check_options("image", "label", "captions", "subgroup", "split")
        return cls(spec.path("file"), spec=spec.text, **spec.options)

    def ids(self) -> list[str]:
        """Return `STEM/ROW` for every row, in file order."""
        return [self._id(n, row) for n, rows in enumerate(self._rows) for row in range(rows)]

    def check(self) -> None:
        """Refuse labels that have no class name; say where numbers may begin at 1 instead of 0."""
        self.check_numbers(self._labels, f"column '{self._columns.label}'")

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for number, path in enumerate(self._paths):
            file, start = _open(path), 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                kept = [keep(self._id(number, start + row)) for row in range(rows)]
                if any(kept):
                    yield from self._group(file, group, [self._id(number, start + row) for row in range(rows)], kept)
                start += rows

    def _group(
        self, file: pq.ParquetFile, group: int, ids: list[str], kept: list[bool]
    ) -> Iterator[Sample | Unreadable]:
        """Yield the kept rows of a row group, batch by batch; a damaged group leaves a reason for each other row."""
        done = 0
        try:
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=self._columns.names, use_threads=False):
                for row in range(batch.num_rows):
                    if kept[done]:
                        yield self._sample(ids[done], batch, row)
                    done += 1
        except (pa.ArrowException, OSError) as error:
            reason = f"damaged Parquet data: {one_line(error, limit=120)}"
            yield from (
                Unreadable(name, reason) for name, wanted in zip(ids[done:], kept[done:], strict=True) if wanted
            )

    def _sample(self, image_id: str, batch: pa.RecordBatch, row: int) -> Sample | Unreadable:
        data = _bytes_of(batch.column(self._columns.image)[row])
        if data is None:
            return Unreadable(image_id, "no image bytes in this row")
        columns = self._columns
        label, captions, subgroup = (
            None if name is None else batch.column(name)[row].as_py()
            for name in (columns.label, columns.captions, columns.subgroup)
        )
        return decode(
            image_id,
            data,
            self._label(label),
            captions=captions_of(captions),
            subgroup="" if subgroup is None else str(subgroup),
        )

    def _label(self, value: Any) -> int:
        if self._texts is not None:
            return self._texts[value]
        return UNKNOWN if value is None else int(value)

    def _distinct_labels(self) -> set[Any]:
        found: set[Any] = set()
        if self._columns.label is None:
            return found
        for path in self._paths:
            try:
                for batch in _open(path).iter_batches(65536, columns=[self._columns.label]):
                    found.update(pc.unique(batch.column(0)).to_pylist())
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path}: cannot read the column '{self._columns.label}': {error}") from None
        return found - {None}

    def _id(self, number: int, row: int) -> str:
        return f"{self._paths[number].stem}/{row}"

    def _stored(self) -> Iterable[tuple[str, bytes]]:
        """Yield the first images of a few row groups: others in a group are read only with all before them."""
        starts = {}
        for number, path in enumerate(self._paths):
            meta, start = _open(path).metadata, 0
            for group in range(meta.num_row_groups):
                starts[self._id(number, start)] = (number, group, start)
                start += meta.row_group(group).num_rows
        chosen = select(starts, _GROUPS)
        for number, group, start in map(starts.__getitem__, chosen):
            yield from self._first_of(number, group, start, SAMPLED // len(chosen))

    def _first_of(self, number: int, group: int, start: int, count: int) -> Iterator[tuple[str, bytes]]:
        """Yield ids and stored bytes of the first images of a row group, as far as they can be read."""
        done, image = 0, self._columns.image
        with contextlib.suppress(pa.ArrowException, OSError):
            batches = _open(self._paths[number]).iter_batches(
                _FEW, row_groups=[group], columns=[image], use_threads=False
            )
            for batch in batches:
                for cell in batch.column(0)[: count - done]:
                    yield self._id(number, start + done), (_bytes_of(cell) or b"")[:_MOST]
                    done += 1
                if done == count:
                    return

    def _identity(self) -> Iterable[str]:
        for path, rows in zip(self._paths, self._rows, strict=True):
            yield " ".join([path.stem, str(rows), *self._columns.names])
            meta = _open(path).metadata
            for group in range(meta.num_row_groups):
                yield f"{meta.row_group(group).num_rows} {meta.row_group(group).total_byte_size}"
            for name in self._columns.names[1:]:  # images are known by the sizes of their groups
                digest = hashlib.blake2b(digest_size=16)
                for batch in _open(path).iter_batches(65536, columns=[name]):
                    digest.update(repr(batch.column(0).to_pylist()).encode())
                yield digest.hexdigest()


def _bytes_of(cell: pa.Scalar) -> bytes | None:
    value = cell.as_py()
    found: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    return found


def _paths(path: Path, split: str | None) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.parquet"))
        if not found:
            path, _ = chosen_split(path, split)
            found = sorted(path.glob("*.parquet"))
        else:
            found = one_split(found, split, path)
        if not found:
            raise UserError(f"the folder {path} holds no .parquet file")
        return found
    if not path.exists():
        raise UserError(f"no file {path}")
    if split is not None:
        raise UserError(f"{path} is one file: leave out ?split={split}, or pass the folder it lies in")
    return [path]


def _check_same_names(paths: list[Path], found: list[Columns]) -> None:
    """Refuse files that call one label by different names."""
    for path, columns in zip(paths, found, strict=True):
        if columns.class_names != found[0].class_names:
            pairs = zip_longest(found[0].class_names, columns.class_names)
            label, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise UserError(f"label {label} is '{one}' in {paths[0]} and '{other}' in {path}: files must agree")


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():  # to open a pipe would wait for its writer
        raise UserError(f"{path} is no regular file")
    try:
        # Buffered reading keeps pages, not whole column chunks, in memory.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {one_line(error)}") from None
