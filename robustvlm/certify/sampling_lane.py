"""An image in work: its samples on their way, and its finding once they are complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from robustvlm.certify.noise import CHUNK, Address
from robustvlm.certify.sampling import Certifier, Finding, Stage

# Complete images that may wait for their finding; each holds its samples.
_BACKLOG = 4


@dataclass(frozen=True)
class Task:
    """One image to certify: pixels [3, S, S] in [0, 1] at the resolution where the noise is added."""

    image_id: str
    index: int
    pixels: Tensor = field(repr=False)
    label: int = -1


@dataclass(frozen=True)
class Sampled:
    """The finding for one image, with what it was drawn from.

    Attributes:
        passes: encoder passes spent on it, unused ones included; seconds: its share of the time.
        sigma: noise level of its samples. image: digest of its pixels. seeds: of its noise, by stage.
    """

    task: Task
    finding: Finding
    passes: int
    seconds: float
    sigma: float
    image: str
    seeds: dict[str, int]


class Lane:
    """An image in work: how many rows of its current stage are on their way."""

    def __init__(self, task: Task, certifier: Certifier, pixels: Tensor, address: Address) -> None:
        self.task, self.certifier, self.pixels, self.address = task, certifier, pixels, address
        self.stage: Stage | None = None
        self.taken = self.sent = self.passes = 0
        self.seconds = 0.0

    def piece(self, room: int, *, perhaps: bool) -> Piece | None:
        """Return the next rows to run, at most `room`; None if nothing more is surely (or perhaps) needed now."""
        wanted = self.certifier.request()
        if wanted is None:
            return None
        if wanted.stage != self.stage:
            if self.sent > self.taken:  # the rest of the stage before, called off
                return None
            self.stage, self.taken, self.sent = wanted.stage, 0, 0
        left = (wanted.most if perhaps else wanted.sure) - (self.sent - self.taken)
        rows = min(left, room, CHUNK - self.sent % CHUNK)
        if rows <= 0:
            return None
        piece = Piece(self, wanted.stage, self.sent, rows)
        self.sent += rows
        self.passes += rows
        return piece


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `start + rows` of a stage of a lane, all of one chunk of noise."""

    lane: Lane
    stage: Stage
    start: int
    rows: int


class Verdicts:
    """Works out the findings of images whose samples are complete.

    Args:
        beside: in a thread, while the next passes run: bisections over thousands of samples would keep a GPU waiting.
    """

    def __init__(self, *, beside: bool) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1) if beside else None
        self._waiting: deque[tuple[Lane, Future[Finding]]] = deque()

    def __enter__(self) -> Verdicts:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def of(self, lanes: list[Lane], *, everything: bool) -> Iterator[Sampled]:
        """Yield the findings of these lanes and earlier ones, as far as they are there; with `everything`, all."""
        if self._pool is None:
            yield from (_sampled(lane, lane.certifier.finding()) for lane in lanes)
            return
        self._waiting.extend((lane, self._pool.submit(lane.certifier.finding)) for lane in lanes)
        while self._waiting and (everything or len(self._waiting) > _BACKLOG or self._waiting[0][1].done()):
            lane, found = self._waiting.popleft()
            yield _sampled(lane, found.result())


def _sampled(lane: Lane, finding: Finding) -> Sampled:
    seeds = {stage: lane.address.stream(stage) for stage in ("pilot", "estimation")}
    return Sampled(lane.task, finding, lane.passes, lane.seconds, lane.certifier.sigma, lane.address.image, seeds)
