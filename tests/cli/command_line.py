"""The program as a test calls it, and what it leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Call = Callable[..., Ended]

# An attack on the encoder and the pictures that the fixture `place` writes.
OWN = ["attack", "own_encoders:Mean", "--data", "imagefolder:photos", "--attack", "pgd:steps=2"]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
