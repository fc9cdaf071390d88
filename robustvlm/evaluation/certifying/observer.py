"""What a certify run reports while it works; the command line draws it, a library user may ignore it."""

from __future__ import annotations

from dataclasses import dataclass

from robustvlm.runs.certify_rows import CertifyFact


@dataclass(frozen=True)
class Forecast:
    """What a run will cost and can give, said before it starts.

    Args:
        images: images still to certify (None: not known before streaming).
        samples: noisy copies per image, at most.
        passes, seconds: encoder passes and wall time at most, on all processes together; None with `images`.
        best_radius: the largest radius that the settings can give.
        cache_bytes: what the kept features will take on disk; 0 if none are kept.
    """

    images: int | None
    samples: int
    passes: int | None
    seconds: float | None
    best_radius: float
    cache_bytes: int = 0


class CertifyObserver:
    """Receives progress and does nothing with it; override what you want to show."""

    def forecast(self, forecast: Forecast) -> None:
        """The run is about to start; `forecast` says what it will cost."""

    def begin(self, total: int | None, done: int) -> None:
        """Certification begins: `total` images (None: not known), `done` of them known from an earlier session."""

    def passed(self, rows: int, used: int) -> None:
        """A batched pass of `rows` noisy images was made, `used` of them for samples."""

    def image_done(self, fact: CertifyFact | None) -> None:
        """An image is finished; None if it could not be read."""
