"""Whether two runs of one command came to the same, on whatever machines."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import load_file
from shapes import ADDED, lines_of

_BESIDE = re.compile(r".*seconds.*|cost|encode_ms|fingerprint|looks|bpe_path|peak_memory|probe")
"""Keys of what it took, what else was looked at in the same place, and digests of what may differ in the last bits."""

_RENAMED = {"size of": "few images, in"}
"""Beginnings of names of checks by what they became."""
_LATER = {"fcsb_radius"}
"""Columns that are filled since where they were empty before."""
_CEASED = {"purify": {"best_by"}}
"""Keys of a kind of summary that are empty since: nothing ever chose a purifier's weights."""
_OF_LANES = re.compile(r"(lanes|gradient against noise)")
"""Checks that tell of the CPU: how many lanes give the same last digits, and images of one batch."""

_MARGIN = 2e-3
"""How far numbers of two CPUs may lie apart: rounding, carried through some steps of an attack or of training."""


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between the results of two finished runs: the files that each has taken digests of."""
    files = [json.loads((run / "checksums.json").read_text())["files"].keys() for run in (one, other)]
    found = [f"{name} is in one alone" for name in sorted(files[0] ^ files[1])]
    for name in sorted(files[0] & files[1]):
        found += [f"{name}: {said}" for said in _apart(_content(one / name), _content(other / name))]
    return found


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return list(lines_of(path))
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        return [row | {key: json.loads(row[key]) for key in ("certificate",) if key in row} for row in rows]
    if path.suffix == ".safetensors":
        return {key: value.float().flatten().tolist() for key, value in load_file(path).items()}
    if path.suffix == ".gz":  # the head of the file names the system in some releases of Python and not in others
        return gzip.decompress(path.read_bytes())
    return path.read_bytes()


def _apart(one: Any, other: Any, where: str = "") -> list[str]:
    if where.endswith(".checks"):
        one, other = ([item for item in each if not _OF_LANES.fullmatch(item["name"])] for each in (one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        kept = [{key for key in each if not _BESIDE.fullmatch(key) and key not in ADDED} for each in (one, other)]
        since = {key for key in _LATER if one.get(key) is not None and other.get(key) is None}
        since |= {key for key in _CEASED.get(str(one.get("kind")), ()) if one.get(key) is None}
        kept = [keys - since for keys in kept]
        one, other = (
            each | {"name": _renamed(each["name"])} if {"name", "level", "message"} == each.keys() else each
            for each in (one, other)
        )
        lost = [f"{where} has {key} in one alone" for key in sorted(kept[0] ^ kept[1])]
        return lost + [
            said for key in sorted(kept[0] & kept[1]) for said in _apart(one[key], other[key], f"{where}.{key}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) > len(other):
        one = [item for item in one if not (isinstance(item, dict) and item.get("column") in _LATER)]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [said for n, pair in enumerate(zip(one, other, strict=True)) for said in _apart(*pair, f"{where}[{n}]")]
    if isinstance(one, float) and isinstance(other, float | int):
        return [] if math.isclose(one, other, rel_tol=_MARGIN, abs_tol=_MARGIN) else [f"{where}: {one} and {other}"]
    return [] if one == other else [f"{where}: {str(one)[:80]} and {str(other)[:80]}"]


def _renamed(name: str) -> str:
    """Return the present name of a check."""
    for old, new in _RENAMED.items():
        if name.startswith(f"{old} "):
            return new + name.removeprefix(old)
    return name
