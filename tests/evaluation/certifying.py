"""Short ways to make certify runs in tests, to interrupt and watch them, and to compare what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from robustvlm.commands.certify.config import Settings
from robustvlm.commands.certify.setup import PreparedCertify, prepare_certify
from robustvlm.commands.certify.store import CertifyFact, CertifyObserver, Forecast


def prepared(photos: Path, model: str = "Encoder", *, name: str = "run", **options: Any) -> PreparedCertify:
    """Prepare a run on an image folder; it lies in "runs" beside the folder."""
    options = {"samples": 300, "sigma": 0.05, "lanes": 64, "claim": "class", "alpha": 0.01, **options}
    settings = Settings(model=f"small_encoders:{model}", data=f"imagefolder:{photos}?empty=1", device="cpu", **options)
    return prepare_certify(settings, out=photos.parent / "runs", name=name)


def rows(run: PreparedCertify, *, without: tuple[str, ...] = ("seconds", "passes")) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(run.folder.results_path).to_pylist()
    return [{key: value for key, value in row.items() if key not in without} for row in found]


class Interrupt(CertifyObserver):
    """Presses Ctrl-C when `images` images are done."""

    def __init__(self, images: int) -> None:
        self.left = images

    def image_done(self, fact: CertifyFact | None) -> None:
        del fact
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


class Watch(CertifyObserver):
    def __init__(self) -> None:
        self.forecasts: list[Forecast] = []
        self.passes = 0

    def forecast(self, forecast: Forecast) -> None:
        self.forecasts.append(forecast)

    def passed(self, rows: int, used: int) -> None:
        assert 0 < used <= rows
        self.passes += rows
