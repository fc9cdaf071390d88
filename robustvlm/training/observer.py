"""Who wants to know how training goes."""

from __future__ import annotations

from collections.abc import Mapping

from robustvlm.training.history import Estimate, Validation, Warned


class TrainingObserver:
    """Told of everything on rank 0; does nothing by itself.

    Example:
        >>> TrainingObserver().began(total=10, done=0)
    """

    def began(self, total: int, done: int) -> None:
        """Training begins, or goes on after `done` of `total` steps."""

    def estimated(self, estimate: Estimate) -> None:
        """What it will cost, measured on a first batch."""

    def stepped(self, step: int, terms: Mapping[str, float]) -> None:
        """`step` steps are made; `terms` are the latest means of the loss."""

    def validated(self, found: Validation) -> None:
        """The weights were validated."""

    def warned(self, warning: Warned) -> None:
        """Something goes wrong."""
