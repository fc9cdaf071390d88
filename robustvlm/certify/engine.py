"""The sampling engine: full batches of noisy copies of many images, each image leaving once its claim is decided.

A pass costs the same whether its rows matter or not, so they are filled with pieces (up to a chunk of noise each) of
as many images as it takes: first what is surely needed, then, when no image waits, what may be needed. Each row of
noise comes from (seed, image, settings, stage, row number), so that an image's samples do not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustvlm.certify.certifier import Certifier, Finding, Stage
from robustvlm.certify.noise import CHUNK, Address, image_digest, noise_chunk, settings_digest
from robustvlm.certify.threats import PLAIN, find_threat
from robustvlm.core.batches import narrower_after
from robustvlm.core.device import Arriving, sent
from robustvlm.core.seeds import derive_seed, own_draws

# An image in work: its samples on their way, and its finding once they are complete

# Complete images that may wait for their finding; each holds its samples.
_BACKLOG = 4


@dataclass(frozen=True)
class Job:
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

    job: Job
    finding: Finding
    passes: int
    seconds: float
    sigma: float
    image: str
    seeds: dict[str, int]


class Lane:
    """An image in work: how many rows of its current stage are on their way."""

    def __init__(self, job: Job, certifier: Certifier, pixels: Tensor, address: Address) -> None:
        self.job, self.certifier, self.pixels, self.address = job, certifier, pixels, address
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
    seeds: dict[str, int] = {stage: lane.address.stream(stage) for stage in lane.certifier.streams}
    return Sampled(lane.job, finding, lane.passes, lane.seconds, lane.certifier.sigma, lane.address.image, seeds)


# The sampling engine: full batches of noisy copies of many images, each image leaving as soon as its claim is decided

Encode = Callable[[Tensor], Tensor]
"""From noisy images [R, 3, S, S] float32 to unit features [R, D]; each row a function of its own image alone."""

Keep = Callable[[Job, Stage, NDArray[np.float32]], None]
"""Told the features of a stage as they are used, in order (the cache)."""


@dataclass(frozen=True)
class _Pass:
    pieces: list[Piece]
    features: Arriving


class SamplingEngine:
    """Samples noisy features for a stream of images until every claim is decided.

    Args:
        encode: the encoder, with everything that happens after the noise.
        seed: run seed.
        lanes: rows of a full pass.
        device: where noise is made and the encoder runs.
        rungs: batch sizes, descending and starting with `lanes`, on which the encoder gives bit-identical rows; the
            smaller ones are used when no image waits. Default: full passes only.
        keep: told the features that certifiers used.
        on_pass: called after every pass with its rows and how many of them were needed or may be.
        settings: digest of all that decides the claims of this run, the encoder included; other settings draw other
            noise (see `robustvlm.certify.noise`). Default: that of each certifier, which does not know the encoder.
        random: the encoder draws at random by itself: each pass gets draws of its own that follow from its rows, so
            that a run made again gives the same bits, and the caller's random state is left alone.
        threat: name of what the noise is against (`robustvlm.certify.threats`).

    The noise level is the certifier's own.

    Example:
        >>> from robustvlm.certify.claims.feature import FeatureRadius
        >>> encode = lambda x: torch.nn.functional.normalize(x.flatten(1)[:, :4], dim=1)
        >>> engine = SamplingEngine(encode, seed=0, lanes=64)
        >>> jobs = [Job(str(i), i, torch.rand(3, 2, 2)) for i in range(3)]
        >>> found = engine.run(jobs, lambda job: FeatureRadius(cos0=0.5, sigma=0.1, alpha=0.01, n=400, n_pilot=100))
        >>> [sampled.finding.n for sampled in found]
        [300, 300, 300]
    """

    def __init__(
        self,
        encode: Encode,
        *,
        seed: int,
        lanes: int,
        device: torch.device | str = "cpu",
        rungs: Sequence[int] = (),
        keep: Keep | None = None,
        on_pass: Callable[[int, int], None] | None = None,
        settings: str | None = None,
        random: bool = False,
        threat: str = PLAIN,
    ) -> None:
        self.encode, self.seed, self.settings, self.random = encode, seed, settings, random
        self.threat = find_threat(threat)
        self.device = torch.device(device)
        self.rungs = tuple(rungs) or (lanes,)
        self.passes = 0
        self._keep, self._on_pass = keep, on_pass
        self._lanes: list[Lane] = []
        # On a GPU the next pass is on its way while the features of the last one are judged.
        self._depth = 1 if self.device.type == "cuda" else 0

    def run(self, jobs: Iterable[Job], certifier: Callable[[Job], Certifier]) -> Iterator[Sampled]:
        """Certify every job with a certifier of its own; findings come in order of completion."""
        queue, running = iter(jobs), deque[_Pass]()
        self._lanes = []
        with Verdicts(beside=self._depth > 0) as verdicts:
            yield from self._work(queue, certifier, running, verdicts)

    def _work(
        self, queue: Iterator[Job], certifier: Callable[[Job], Certifier], running: deque[_Pass], verdicts: Verdicts
    ) -> Iterator[Sampled]:
        while True:
            pieces, early = self._plan(queue, certifier)
            yield from verdicts.of(early, everything=False)
            began = time.perf_counter()
            try:
                if pieces:
                    running.append(_Pass(pieces, self._forward(pieces)))
                done = self._judge(running.popleft()) if len(running) > (self._depth if pieces else 0) else []
            except Exception as error:
                running.clear()
                self.rungs = narrower_after(error, self.rungs, self.device)
                for lane in self._lanes:  # the lost rows are made again, with the same noise
                    lane.sent = lane.taken
                continue
            rows = sum(piece.rows for piece in pieces)
            for piece in pieces:
                piece.lane.seconds += (time.perf_counter() - began) * piece.rows / rows
            last = not pieces and not running and not self._lanes and not early
            yield from verdicts.of(done, everything=last)
            if last:
                return

    def _plan(self, queue: Iterator[Job], certifier: Callable[[Job], Certifier]) -> tuple[list[Piece], list[Lane]]:
        """Return the pieces of the next pass: sure ones of the images in work, of new images, then possible ones.

        Beside them new images that need no sample, as their claim is out of reach; no more than a pass has rows.
        """
        pieces, early = list[Piece](), list[Lane]()
        room = self.rungs[0]
        for lane in self._lanes:
            room -= _fill(lane, pieces, room, perhaps=False)
        while room and len(early) < self.rungs[0]:
            job = next(queue, None)
            if job is None:
                break
            own = certifier(job)
            settings = self.settings or own.key
            self.threat.check_pixels(job.pixels)
            if self.settings is None and self.threat.name != PLAIN:
                settings = settings_digest(settings, self.threat.name)
            if own.of_image:  # a label that is changed after a look meets other noise, as other settings do
                settings = settings_digest(settings, *own.of_image)
            address = Address(self.seed, job.image_id, image_digest(job.pixels), settings)
            lane = Lane(job, own, sent(job.pixels, self.device, torch.float32), address)
            if own.request() is None:
                early.append(lane)
                continue
            self._lanes.append(lane)
            room -= _fill(lane, pieces, room, perhaps=False)
        used = self.rungs[0] - room
        room = self._rung(used) - used if used else 0
        moved = True
        while room and moved:  # in turn, so that no image runs far ahead of its decision
            moved = False
            for lane in self._lanes:
                piece = lane.piece(room, perhaps=True)
                if piece is not None:
                    pieces.append(piece)
                    room -= piece.rows
                    moved = True
        return pieces, early

    def _rung(self, used: int) -> int:
        return min(rung for rung in self.rungs if rung >= used)

    def _forward(self, pieces: list[Piece]) -> Arriving:
        """Run the pieces as one pass of an allowed size, spare rows repeating the first; return features [R, D]."""
        rows = sum(piece.rows for piece in pieces)
        parts = [self._noisy(piece) for piece in pieces]
        size = self._rung(rows)
        if size > rows:
            parts.append(parts[0][:1].expand(size - rows, -1, -1, -1))
        with torch.no_grad(), self._draws(pieces):
            features = self.encode(torch.cat(parts))
        self.passes += size
        if self._on_pass is not None:
            self._on_pass(size, rows)
        # On its way at once: behind the next pass, it would arrive when that one has ended.
        return Arriving(features[:rows].detach().float())

    def _draws(self, pieces: list[Piece]) -> contextlib.AbstractContextManager[None]:
        """Let a random encoder draw from a seed of this pass: draws that passes share would not be independent."""
        if not self.random:
            return contextlib.nullcontext()
        rows = (f"{piece.lane.address}:{piece.stage}:{piece.start}:{piece.rows}" for piece in pieces)
        return own_draws(self.device, derive_seed(self.seed, "draws of the encoder", *rows))

    def _noisy(self, piece: Piece) -> Tensor:
        """Return the image under fresh noise for every row, in float32, not clipped; the clean stage has no noise."""
        pixels = piece.lane.pixels
        if piece.stage == "clean":
            return pixels.expand(piece.rows, *pixels.shape)
        stream = piece.lane.address.stream(piece.stage)
        threat, first = self.threat, piece.start % CHUNK
        noise = noise_chunk(stream, piece.start // CHUNK, threat.draws(pixels.shape), self.device, kind=threat.kind)
        draws = noise[first : first + piece.rows]
        certifier = piece.lane.certifier
        return threat.noisy(certifier.shown(pixels, piece.stage, piece.start, piece.rows), draws, certifier.sigma)

    def _judge(self, done: _Pass) -> list[Lane]:
        """Hand the features to their certifiers; return the lanes that are decided, which leave."""
        features = done.features.wait().numpy()
        start = 0
        for piece in done.pieces:
            rows = features[start : start + piece.rows]
            start += piece.rows
            lane = piece.lane
            wanted = lane.certifier.request()
            if wanted is None or wanted.stage != piece.stage:  # decided by an earlier piece of this image
                if lane.stage == piece.stage:
                    lane.taken += piece.rows
                continue
            if self._keep is not None:
                self._keep(lane.job, piece.stage, rows)
            lane.certifier.take(rows)
            lane.taken += piece.rows
        decided = [lane for lane in self._lanes if lane.certifier.request() is None]
        self._lanes = [lane for lane in self._lanes if lane.certifier.request() is not None]
        return decided


def _fill(lane: Lane, pieces: list[Piece], room: int, *, perhaps: bool) -> int:
    """Add as many pieces of a lane as there are and fit; return their rows."""
    before = room
    while room:
        piece = lane.piece(room, perhaps=perhaps)
        if piece is None:
            break
        pieces.append(piece)
        room -= piece.rows
    return before - room
