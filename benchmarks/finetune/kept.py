"""What was measured before is read again, unless it is of another model or of other options."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robustvlm.core.files import write_text
from robustvlm.errors import UserError
from robustvlm.models import load_model

from .rows import Plan
from .sets import BenchmarkSet

Kept = dict[str, Any]


def made_with(benchmark: BenchmarkSet, plan: Plan, **more: Any) -> Kept:
    """Return all that two rows of one table must share: the model's weights, what it is measured on, and how much."""
    images = {"images per condition": len(benchmark.seen.images.ids)}
    return {"model": load_model(benchmark.model).fingerprint, **images, **asdict(plan), **more}


def kept(path: Path, of: Mapping[str, Any], make: Callable[[], Kept]) -> Kept:
    """Return what `path` holds, or what `make` returns, which is written there with what it was made with.

    Raises:
        UserError: the file was made with something else.
    """
    if path.exists():
        found: Kept = json.loads(path.read_text(encoding="utf-8"))
        told = found.pop("made with", {})
        differ = [
            f"{name} {told.get(name)!r} (asked for: {value!r})" for name, value in of.items() if told.get(name) != value
        ]
        if differ:
            raise UserError(f"'{path}' was made with {', '.join(differ)}: pass that, or another --out")
        return found
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**found, "made with": dict(of)}, indent=1) + "\n")
    return found
