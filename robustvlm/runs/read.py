"""Finding a run and reading what any command left in its folder, with one clear error for whatever is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustvlm.core.reading import read_json
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
