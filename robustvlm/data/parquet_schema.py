"""Which columns of a Parquet file hold images and labels, and the class names its schema carries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from robustvlm.errors import UserError, nearest

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")


@dataclass(frozen=True)
class Columns:
    """The image and label columns, whether labels are text, and the class names the schema knows."""

    image: str
    label: str
    text_labels: bool
    class_names: tuple[str, ...]


def find_columns(schema: pa.Schema, image: str | None, label: str | None, where: str) -> Columns:
    """Return the columns to read: those named, else the usual ones.

    Raises:
        UserError: a column that is missing or of another type than images or labels have.
    """
    image = image or _usual(schema, IMAGE_COLUMNS, "image", where)
    label = label or _usual(schema, LABEL_COLUMNS, "label", where)
    for name in (image, label):
        if name not in schema.names:
            raise UserError(f"{where} has no column '{name}': {nearest(name, schema.names)}")
    kind = schema.field(image).type
    if not _is_image(kind):
        raise UserError(f"{where}: column '{image}' is {kind}; images are bytes or a struct with a field 'bytes'")
    kind = _plain(schema.field(label).type)
    if not (pa.types.is_integer(kind) or _is_text(kind)):
        raise UserError(f"{where}: column '{label}' is {kind}; labels are integers or text")
    names = () if _is_text(kind) else _class_names(schema.metadata or {}, label)
    return Columns(image, label, _is_text(kind), names)


def _usual(schema: pa.Schema, names: Sequence[str], what: str, where: str) -> str:
    found = next((name for name in names if name in schema.names), None)
    if found is None:
        shown = ", ".join(schema.names[:12])
        raise UserError(f"{where} has no {what} column: name one of its columns with ?{what}=NAME ({shown})")
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
