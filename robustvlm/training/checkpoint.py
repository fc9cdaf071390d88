"""Checkpoints: named tensors and a JSON text in one safetensors file, which appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from robustvlm.core.reading import parse_json, require_regular
from robustvlm.errors import UserError
from robustvlm.runs.files import replacing

LAST = "last.safetensors"
BEST = "best.safetensors"
_FACTS = "robustvlm"


def write_checkpoint(path: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write groups of named tensors, and facts that are plain JSON, atomically.

    Example:
        >>> import tempfile, torch
        >>> file = Path(tempfile.mkdtemp()) / "last.safetensors"
        >>> write_checkpoint(file, {"weights": {"w": torch.ones(2)}}, {"step": 3})
        >>> read_checkpoint(file)
        ({'weights': {'w': tensor([1., 1.])}}, {'step': 3})
    """
    flat = {
        f"{part}/{name}": t.detach().cpu().contiguous() for part, group in parts.items() for name, t in group.items()
    }
    if not path.parent.is_dir():
        raise UserError(f"the run's folder was deleted or moved while it was at work: '{path.parent}' is gone")
    with replacing(path) as temporary:
        save_file(flat, temporary, metadata={"format": "pt", _FACTS: json.dumps(facts)})


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return what `write_checkpoint` was given; raise UserError for a file that is damaged or something else."""
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        require_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            facts = dict(parse_json((file.metadata() or {})[_FACTS]))
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = file.get_tensor(key)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint '{path}' is damaged ({error}): start over with --fresh") from error
    return parts, facts
