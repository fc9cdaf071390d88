"""The images of an attack run: numbered in source order, decoded and resized ahead of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from robustvlm.core.framing import Framing
from robustvlm.data.pixels import to_pixels
from robustvlm.data.prefetch import prefetch
from robustvlm.data.source import DataSource, Sample, Unreadable


@dataclass(frozen=True)
class Picture:
    """One image as the model takes it: pixels [3, H, W] in [0, 1]; label -1 is an unknown class.

    `source_size` is width and height of the image before it was resized.
    """

    id: str
    label: int
    pixels: Tensor = field(repr=False)
    source_size: tuple[int, int] = (0, 0)


class Images:
    """Streams the images of a source, any number of times.

    Args:
        source: the images; limit: how many of them, chosen by a hash of their ids.
        resolution: side in pixels, or a model's framing, which also says how it is brought about.
        ahead: how many images are made ready in the background; they are held in memory. 0 for a model on the CPU,
            which leaves no core idle.

    Example:
        >>> from robustvlm.data import open_data
        >>> images = Images(open_data("emoji"), limit=3, resolution=8)
        >>> [images.index(item.id) for item in images.stream()]
        [0, 1, 2]
    """

    def __init__(
        self,
        source: DataSource,
        *,
        limit: int | None = None,
        resolution: int | Framing,
        ahead: int = 0,
    ) -> None:
        self.source, self.limit = source, limit
        self._framing, self._ahead = Framing.of(resolution), ahead
        self._order: dict[str, int] = {}

    def index(self, name: str) -> int:
        """Return the number in source order of an image that a stream has come by; the same in every session."""
        return self._order[name]

    def stream(self, want: Callable[[str], bool] | None = None) -> Iterator[Picture | Unreadable]:
        """Yield the images that are wanted, asked for by id once their number is known; unwanted ones are not decoded.

        Streams also name what no one asked for: damaged shards, and second images of the same name.
        """

        def keep(name: str) -> bool:
            self._order.setdefault(name, len(self._order))
            return want is None or want(name)

        ready = self._ready(keep)
        return prefetch(ready, self._ahead) if self._ahead else ready

    def _ready(self, keep: Callable[[str], bool]) -> Iterator[Picture | Unreadable]:
        for item in self.source.samples(limit=self.limit, keep=keep):
            self._order.setdefault(item.id, len(self._order))  # the faults of a stream are not asked for
            if isinstance(item, Sample):
                pixels = to_pixels(item.image, self._framing)
                yield Picture(item.id, item.label, pixels, item.image.size)
            else:
                yield item
