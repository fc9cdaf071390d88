"""Short ways to make certify runs in tests, to interrupt and watch them, and to compare what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from robustvlm.commands.certify import CERTIFY, CertifySettings
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.commands.certify.summary import CertifySummary
from robustvlm.runs.run import Run
from robustvlm.runs.settings import Observer


class Certifying(Run):
    """A certify run with its settled settings at hand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(CERTIFY, CertifySettings(**options))
        self.config: CertifyConfig = self.work.config  # type: ignore[attr-defined]

    def summary(self, observer: Observer | None = None, **how: bool) -> CertifySummary:
        """Start, or go on, and return the summary."""
        found: CertifySummary = self.start(observer, **how).summary
        return found


def prepared(photos: Path, model: str = "Encoder", *, name: str = "run", **options: Any) -> Certifying:
    """Prepare a run on an image folder; it lies in "runs" beside the folder."""
    options = {"samples": 300, "sigma": 0.05, "lanes": 64, "claim": "class", "alpha": 0.01, **options}
    data, out = f"imagefolder:{photos}?empty=1", photos.parent / "runs"
    return Certifying(model=f"small_encoders:{model}", data=data, device="cpu", out=out, name=name, **options)


def replayed(photos: Path, of: str = "run", **options: Any) -> Certifying:
    """Prepare a run on the features that another run kept; it lies beside that one."""
    return Certifying(**{"claim": "class", "from_cache": of, "out": photos.parent / "runs", **options})


def rows(run: Run, *, without: tuple[str, ...] = ("seconds", "passes")) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(run.folder.results_path).to_pylist()
    return [{key: value for key, value in row.items() if key not in without} for row in found]


class Interrupt(Observer):
    """Presses Ctrl-C when `images` images are done."""

    def __init__(self, images: int) -> None:
        self.left = images

    def advance(self, count: int = 1, **shown: str) -> None:
        del shown
        self.left -= count
        if self.left < 0:
            raise KeyboardInterrupt


class Watch(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.passes = 0

    def say(self, line: str) -> None:
        self.said.append(line)

    def passed(self, used: int, passes: int) -> None:
        assert 0 < used <= passes
        self.passes += passes
