"""What a run of any kind reports while it works; the command line draws it, a library user may ignore it."""

from __future__ import annotations


class Observer:
    """Receives progress and does nothing with it; override what you want to show. Only rank 0's is told anything.

    Example:
        >>> class Lines(Observer):
        ...     def begin(self, title, total=None, done=0):
        ...         print(title, total)
        >>> Lines().begin("Encoding", 10)
        Encoding 10
        >>> Lines().advance()
    """

    def say(self, line: str) -> None:
        """Something that a reader wants to know, such as what the run will cost."""

    def warn(self, text: str) -> None:
        """Something goes wrong, and the run goes on."""

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """A stage begins, and the one before it has ended.

        Args:
            total: how many pieces of work it has (images, steps); None: not known.
            done: how many of them are known from an earlier session.
        """

    def advance(self, count: int = 1, **shown: str) -> None:
        """So many more pieces of the stage are done; `shown` are words beside its bar, by a key each replaces."""

    def passed(self, used: int, passes: int) -> None:
        """A batched pass was made with `used` occupied rows; `passes` counts encoder passes, forward and backward."""
