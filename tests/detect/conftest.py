"""Makes the helper module beside the tests importable, and draws its features once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from detect_clouds import Clouds, draw_clouds


@pytest.fixture(scope="session")
def clouds() -> Clouds:
    return draw_clouds()
