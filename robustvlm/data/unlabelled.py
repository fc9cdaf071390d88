"""Images whose classes do not matter: whatever a source calls them, they are unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable
from robustvlm.data.specs import KINDS, parse_spec


class Unlabelled(DataSource):
    """The images of another source, all of unknown class; its labels need no names.

    Example:
        >>> source = open_unlabelled("emoji?split=test&copies=1")
        >>> {sample.label for sample in source.samples(limit=4)}
        {-1}
    """

    def __init__(self, inner: DataSource) -> None:
        super().__init__(inner.spec, ())
        self.inner = inner
        self.remarks = inner.remarks

    def ids(self) -> list[str] | None:
        """Return the ids of the other source."""
        return self.inner.ids()

    def group(self, sample_id: str) -> str:
        """Return the group that the other source puts an image in."""
        return self.inner.group(sample_id)

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for item in self.inner._stream(keep):
            yield replace(item, label=UNKNOWN) if isinstance(item, Sample) else item

    def _identity(self) -> Iterable[str]:
        return self.inner._identity()


def open_unlabelled(spec: str) -> Unlabelled:
    """Return the images that a data spec names, as images of unknown class.

    Raises:
        UserError: an unknown kind or option, or missing data.
    """
    parsed = parse_spec(spec)
    return Unlabelled(KINDS[parsed.kind](parsed))
