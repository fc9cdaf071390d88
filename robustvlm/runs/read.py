"""Finished runs read back: which folder is meant, its JSON files, and its rows; one clear error for what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robustvlm.core.files import first_line, read_json, replacing, require_regular
from robustvlm.errors import UserError, nearest
from robustvlm.runs.manifest import Manifest, read_manifest


def find_run(name: str | Path, *, root: Path = Path("runs")) -> Path:
    """Return the folder of a run given by path, or by its name under `root`; UserError when there is none."""
    for folder in (Path(name), root / name):
        if folder.is_dir():
            return folder
    known = [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    none = f"there are no runs under '{root}/': make one with `robustvlm attack` or `robustvlm certify`"
    hint = nearest(str(name), known) if known else none
    raise UserError(f"no run '{name}': expected a run folder or the name of one under '{root}/'; {hint}")


def read_manifest_of(folder: Path) -> Manifest:
    """Return the manifest of a run folder; UserError when there is none or it is damaged."""
    try:
        return read_manifest(folder / "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{folder}' is no run folder: expected a manifest.json in it") from None


def read_object(path: Path, if_absent: str) -> dict[str, Any]:
    """Return the JSON object in a file of a run folder; UserError when it is missing, damaged or no object."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise UserError(if_absent) from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read '{path}': expected a JSON object, got {type(content).__name__}")
    return content


def read_rows(path: Path, wanted: pa.Schema, *, if_absent: str, again: str) -> pa.Table:
    """Return the table of a finished run, all its columns, after a look at those that are `wanted`.

    Args:
        wanted: names and types; a type of the same family (another width) will do. Fields that are not nullable must
            hold a value in every row.
        if_absent: what to say where there is no file; again: how the run is made again.

    Raises:
        UserError: there is no such file, it is damaged, or a column is missing or of another kind.
    """
    try:
        require_regular(path)
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(if_absent) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read '{path}' ({first_line(error)}): {again}") from None
    for field in wanted:
        if field.name not in table.column_names:
            raise UserError(f"'{path}' lacks the column '{field.name}': {again}")
        column = table.column(table.column_names.index(field.name))
        if _family(column.type) != _family(field.type) and not (field.nullable and pa.types.is_null(column.type)):
            raise UserError(f"the column '{field.name}' of '{path}' is {column.type}, expected {field.type}: {again}")
        if column.null_count and not field.nullable:
            raise UserError(f"the column '{field.name}' of '{path}' has rows without a value: {again}")
    return table


def required(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """Return some fields of a schema, as ones that every row has a value of.

    Example:
        >>> from robustvlm.commands.attack.store import SCHEMA
        >>> required(SCHEMA, ["label"]).field("label").nullable
        False
    """
    return pa.schema([pa.field(name, schema.field(name).type, nullable=False) for name in names])


def _family(kind: pa.DataType) -> str:
    tests = (
        ("whole numbers", pa.types.is_integer),
        ("numbers", pa.types.is_floating),
        ("text", lambda one: pa.types.is_string(one) or pa.types.is_large_string(one)),
        ("truth values", pa.types.is_boolean),
    )
    return next((name for name, test in tests if test(kind)), str(kind))


def write_rows(path: Path, table: pa.Table) -> None:
    """Write the rows as Parquet, atomically."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
