"""The shape of a run's folder: which files, columns, kinds of journal lines and keys it has, without their values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import safe_open

LEFT_OUT = ("report.html", "training")
"""What `make_before.py` left out."""
ADDED = {
    "says_classes",
    "spread",
    "worth",
    "worth_in_all",
    "things",
    "apart",
    "likely_least",
    "likely_most",
    "likely_after",
    "neighbourhood",
    "corrupted",
    "corruptions",
    "abstains",
    "abstained",
    "unknown_abstained",
    "rule",
    "undecided",
    "promised",
    "negatives",
    "watched",
    "content",
    "contents",
    "noisy_own",
    "unattacked",
    "named_files",
    "auroc_msp",
    "auroc_mcm",
    "drawn",
    "second_looks",
    "uncounted",
    "sessions",
}
"""Keys that later versions write besides; what an earlier one has written is read without them."""
_OPEN = {"versions", "options", "measures", "terms", "files", "levels", "superclasses", "auroc"}
"""Keys whose own keys are names, not words of the format."""


def shape_of(run: Path) -> dict[str, Any]:
    """Return, by file, columns with types, kinds of lines with their keys, keys with those one level below, tensors."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if path.is_dir() or name.parts[0] in LEFT_OUT:
            continue
        found[name.as_posix()] = _shape(path)
    return found


def _shape(path: Path) -> Any:
    if path.suffix == ".parquet":
        return [f"{field.name}: {field.type}" for field in pq.read_schema(path)]
    if path.suffix == ".jsonl":
        kinds: dict[str, set[str]] = {}
        for line in lines_of(path):
            kinds.setdefault(str(line.get("kind", "")), set()).update(line.keys() - ADDED)
        return {kind: sorted(keys) for kind, keys in sorted(kinds.items())}
    if path.suffix == ".json":
        return _keys(json.loads(path.read_text(encoding="utf-8")), depth=2)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            about = sorted(file.metadata() or {})
            return {"metadata": about} | {
                name: [str(file.get_slice(name).get_dtype()), len(file.get_slice(name).get_shape())] for name in names
            }
    return None


def _keys(value: Any, *, depth: int) -> Any:
    if isinstance(value, list):
        inside = [_keys(item, depth=depth) for item in value if isinstance(item, dict)]
        return inside[:1]
    if not isinstance(value, dict) or not depth:
        return None
    return {key: _keys(item, depth=0 if key in _OPEN else depth - 1) for key, item in value.items() if key not in ADDED}


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a JSONL file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
