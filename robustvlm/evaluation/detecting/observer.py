"""What a detect run reports while it works; the command line draws it, a library user may ignore it."""

from __future__ import annotations


class DetectObserver:
    """Receives progress and does nothing with it; override what you want to show."""

    def begin(self, title: str, total: int | None, done: int) -> None:
        """A stage begins: `total` images (None: not known), `done` of them known from an earlier session."""

    def advance(self, images: int) -> None:
        """So many more images of the stage are finished."""
