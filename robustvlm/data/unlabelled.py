"""Images whose classes do not matter: whatever a source calls them, they are unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from robustvlm.data.nouns import same_things
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable
from robustvlm.data.specs import open_raw, parse_spec


class Unlabelled(DataSource):
    """The images of another source, of unknown class (-1); its labels need no names.

    Where `known` names classes that are known after all, images whose class says the same keep that class as their
    label, an index into `known`: they are not unknown, and whoever judges by them has to leave them out.

    Example:
        >>> source = open_unlabelled("emoji?split=test&copies=1")
        >>> {sample.label for sample in source.samples(limit=4)}
        {-1}
        >>> source = open_unlabelled("emoji?split=test&copies=1", known=["owl", "Apples"])
        >>> sorted({sample.label for sample in source.samples()})
        [-1, 0, 1]
    """

    def __init__(self, inner: DataSource, known: Sequence[str] = ()) -> None:
        super().__init__(inner.spec, ())
        self.inner = inner
        self.remarks = inner.remarks
        place = {name: number for number, name in enumerate(known)}
        self._known = {
            name: place[meant] for name, meant in same_things(inner.class_names, known, loosely=False).items()
        }

    def ids(self) -> list[str] | None:
        """Return the ids of the other source."""
        return self.inner.ids()

    def group(self, sample_id: str) -> str:
        """Return the group that the other source puts an image in."""
        return self.inner.group(sample_id)

    def things(self) -> tuple[str, ...]:
        """Return the names that the other source has for what its images show."""
        return self.inner.things()

    def check_label(self, label: int, where: str) -> None:
        """Take any label: it needs no name here."""

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        names = self.inner.class_names
        for item in self.inner._stream(keep):
            if not isinstance(item, Sample):
                yield item
                continue
            name = names[item.label] if 0 <= item.label < len(names) else None
            yield replace(item, label=UNKNOWN if name is None else self._known.get(name, UNKNOWN))

    def _identity(self) -> Iterable[str]:
        return self.inner._identity()


def open_unlabelled(spec: str, known: Sequence[str] = ()) -> Unlabelled:
    """Return the images that a data spec names, as images of unknown class unless it is one of `known`.

    Raises:
        UserError: an unknown kind or option, or missing data.
    """
    return Unlabelled(open_raw(parse_spec(spec)), known)
