"""What was measured before is read again, unless it is of another model or of other options."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import MADE_WITH, require_made_with
from robustvlm.core.files import write_text
from robustvlm.core.object_graph import fingerprint
from robustvlm.models import load_model

from .rows import Plan
from .sets import BenchmarkSet
from .variants import Variant

Kept = dict[str, Any]
VARIANT = "variant"
"""What the rows of a table do not share."""


def made_with(benchmark: BenchmarkSet, plan: Plan, **more: Any) -> Kept:
    """Return all that the rows of one table must share: the model's weights, the images, and how much of everything."""
    told: dict[str, object] = {}
    for place, one in enumerate((benchmark.seen, *benchmark.transfer, benchmark.together)):
        told |= {f"{place} {name}": value for name, value in vars(one.images).items()}
    return {
        "model": load_model(benchmark.model).fingerprint,
        "train": benchmark.train.fingerprint(),
        "images": fingerprint(told),
        **asdict(plan),
        **more,
    }


def kept(path: Path, of: Mapping[str, Any], variant: Variant, make: Callable[[], Kept]) -> Kept:
    """Return what `path` holds, or what `make` returns, which is written there with what it was made with.

    Raises:
        UserError: the file was made with something else, or by a variant of that name with other options.
    """
    teacher = [] if variant.teacher is None else [load_model(variant.teacher).fingerprint]
    of = {**of, VARIANT: " ".join([repr(variant), *teacher])}
    if path.exists():
        found: Kept = json.loads(path.read_text(encoding="utf-8"))
        told = found.pop(MADE_WITH, None)
        require_made_with(path, told, of)
        return found
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**found, MADE_WITH: of}, indent=1) + "\n")
    return found
