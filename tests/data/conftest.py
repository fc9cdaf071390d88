"""Small images and image folders for the tests of data sources."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encode(
    colour: tuple[int, ...] | int = (200, 30, 60), *, size: int = 8, mode: str = "RGB", kind: str = "PNG"
) -> bytes:
    """Return one plain image as file bytes."""
    buffer = io.BytesIO()
    Image.new(mode, (size, size), colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def plain() -> Callable[..., bytes]:
    """The encoder of plain images."""
    return encode


@pytest.fixture
def noise() -> bytes:
    """A 64x64 PNG that does not compress."""
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of four images each."""
    root = tmp_path / "photos"
    for name in ("cat", "dog", "pickup_truck"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            (root / name / f"{i}.png").write_bytes(encode((i * 20, 0, 0)))
    return root
