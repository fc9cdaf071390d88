"""Are two result folders equal, but for what time and chance of the machine decide?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

_TIMED = ("cost", "estimate", "created", "session", "git_commit")
_JOURNALS = (".jsonl", ".lock", ".html")
_SEALS = "checksums.json"
"""Digests of the files that are compared themselves, by values: the bytes of equal tensors may differ."""


def differences(found: Path, expected: Path, *, ignored: frozenset[str] = frozenset()) -> list[str]:
    """Return what differs between two folders, one line each; files that are missing or left over among it.

    Args:
        ignored: lines, without their values, that do not count: what differs between two straight runs.
    """
    if not found.is_dir():
        return ["no results"]
    here, there = ({path.relative_to(root).as_posix() for path in _files(root)} for root in (found, expected))
    lines = [f"missing: {name}" for name in sorted(there - here)] + [
        f"left over: {name}" for name in sorted(here - there)
    ]
    for name in sorted(here & there):
        lines += [f"{name}: {line}" for line in _compared(found / name, expected / name)]
    return [line for line in lines if line.partition(" = ")[0] not in ignored]


def _files(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if path.is_file() and path.suffix not in _JOURNALS and path.name != _SEALS)


def _compared(found: Path, expected: Path) -> Iterator[str]:
    if found.suffix == ".parquet":
        yield from _rows(found, expected)
    elif found.suffix == ".safetensors":
        yield from _tensors(found, expected)
    elif found.suffix == ".json":
        one, two = (dict(_leaves(json.loads(path.read_text()))) for path in (found, expected))
        for key in sorted(one.keys() | two.keys()):
            if not _same(one.get(key), two.get(key)):
                yield f"{key} = {one.get(key)} not {two.get(key)}"
    elif found.read_bytes() != expected.read_bytes():
        yield "other bytes"


def _rows(found: Path, expected: Path) -> Iterator[str]:
    one, two = (pq.read_table(path) for path in (found, expected))
    if one.column_names != two.column_names or len(one) != len(two):
        yield "other rows or columns"
        return
    for name in one.column_names:
        if name == "seconds":
            continue
        for row, (a, b) in enumerate(zip(one[name].to_pylist(), two[name].to_pylist(), strict=True)):
            if not _same(a, b):
                yield f"row {row} {name} = {str(a)[:60]} not {str(b)[:60]}"


def _tensors(found: Path, expected: Path) -> Iterator[str]:
    from safetensors.torch import load_file

    one, two = (load_file(path) for path in (found, expected))
    for key in sorted(one.keys() | two.keys()):
        if key not in one or key not in two or one[key].shape != two[key].shape or not one[key].equal(two[key]):
            yield f"{key} = other weights"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            # A manifest has an identity by chance, which binds the other files to it.
            if key not in _TIMED and "second" not in key and (path, key) != ("", "id"):
                yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def _same(a: Any, b: Any) -> bool:
    return (
        a == b
        or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
        or repr(a) == repr(b)
    )
