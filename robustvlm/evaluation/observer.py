"""What an evaluation reports while it works; the command line draws it, a library user may ignore it."""

from __future__ import annotations

from robustvlm.runs.summary import Estimate


class Observer:
    """Receives progress and does nothing with it; override what you want to show."""

    def forecast(self, estimate: Estimate) -> None:
        """The clean pass is done; `estimate` says what is left to do."""

    def begin_stage(self, title: str, total: int | None, done: int) -> None:
        """A stage begins: `total` images in it (None: not known), `done` of them known from an earlier session."""

    def passed(self, used: int, passes: int) -> None:
        """A batched pass was made with `used` occupied rows; `passes` counts encoder passes, forward and backward."""

    def image_done(self, outcome: str | None) -> None:
        """An image of the stage is finished; `outcome` is None in the clean pass."""
