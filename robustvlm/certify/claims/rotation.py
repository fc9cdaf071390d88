"""The vote at every angle of a range (T30): the votes at a grid of angles, each within reach of those around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from robustvlm.certify.certifier import Certifier, Finding, Stage, Stop
from robustvlm.certify.claims.base import Asked, Claim, Materials, Plan, sampling_of
from robustvlm.certify.claims.vote import vote_winner, votes_for
from robustvlm.certify.classes import vote_radius
from robustvlm.certify.limits import best_vote_radius
from robustvlm.certify.means import clopper_pearson_lower
from robustvlm.certify.normal import Array
from robustvlm.certify.rotation import Cell, cells, rounding
from robustvlm.certify.threats.plane import rotate

COPIES = (32, 64, 128, 256)
"""Numbers of copies at each angle that the pilot chooses from."""
MOST = 180.0
_SURE, _SPREADS, _STRICT = 0.05, 2.0, 1.0 - 1e-9


class RotationRadius(Certifier):
    """The largest angle up to which the hard vote keeps its class, or whether it keeps it up to the angle asked for.

    The pilot, at the image itself, names the class, how many copies each angle gets and how far each reaches. Row i of
    the estimation is a copy of the image at the centre of cell i // copies; cells are tested from the inside outwards,
    each at alpha, up to the first that fails (no correction for their number: `robustvlm.certify.rotation`).
    """

    def __init__(
        self, *, text: ArrayLike, sigma: float, alpha: float, n: int, n_pilot: int, radius: float | None = None
    ) -> None:
        self.text = np.asarray(text, dtype=np.float64)
        super().__init__(
            ("pilot", n_pilot), ("estimation", n - n_pilot), sigma=sigma, alpha=alpha,
            settings=(self.text, radius, "rotation"), looks=("estimation",),
        )  # fmt: skip
        self.asked, self.label = radius, -1
        self.copies, self.reach, self.reached = 0, 0.0, 0.0
        self._cells: list[Cell] = []
        self._more: Iterator[Cell] | None = None
        self._centre: tuple[int, Tensor] | None = None
        self._image: Tensor | None = None
        self._passed = self._votes = self._seen = 0
        self._failed_cell = False

    @property
    def limit(self) -> float:
        """The largest angle that is asked about, in degrees."""
        return MOST if self.asked is None else self.asked

    def shown(self, pixels: Tensor, stage: Stage, start: int, rows: int) -> Tensor:
        if stage != "estimation":
            return super().shown(pixels, stage, start, rows)
        self._image = pixels
        numbers = [(start + i) // max(1, self.copies) for i in range(rows)]
        return torch.cat([self._turned(pixels, number).expand(numbers.count(number), *pixels.shape)
                          for number in dict.fromkeys(numbers)])  # fmt: skip

    def _turned(self, pixels: Tensor, number: int) -> Tensor:
        cell = self._cell(number)
        if cell is None:  # rows that nobody will look at
            return pixels[None]
        if self._centre is None or self._centre[0] != number:
            self._centre = number, rotate(pixels, math.radians(cell.centre)).to(pixels)
        return self._centre[1][None]

    def _cell(self, number: int) -> Cell | None:
        """Return a cell by its place in the order; None behind the last."""
        if self.copies == 0 or self._image is None or self.reach <= 2.0 * rounding(self._image):
            return None
        if self._more is None:
            self._more = cells(self._image, self.reach, self.limit)
        while len(self._cells) <= number and (found := next(self._more, None)) is not None:
            self._cells.append(found)
        return self._cells[number] if number < len(self._cells) else None

    def _absorb(self, stage: Stage, rows: Array) -> None:
        if stage == "pilot":
            self.label = vote_winner(rows, self.text)
            self._choose(int(votes_for(rows, self.text, self.label).sum()), len(rows))
        else:
            self._count(int(votes_for(rows, self.text, self.label).sum()), len(rows))

    def _choose(self, votes: int, n: int) -> None:
        """Choose copies and reach: what covers most for the copies that it takes, if votes fall as they may."""
        share = float(clopper_pearson_lower(votes, n, _SURE))
        best = 0.0
        for copies in COPIES:
            likely = math.floor(copies * share - _SPREADS * math.sqrt(copies * share * (1.0 - share)))
            radius = vote_radius(max(0, likely), copies, self.sigma, self.alpha)
            if radius / copies > best:
                best, self.copies, self.reach = radius / copies, copies, radius * _STRICT

    def _count(self, votes: int, n: int) -> None:
        self._votes += votes
        self._seen += n
        cell = self._cell(self._passed)
        if cell is None:  # so little reach that the rounding of pixels takes all of it
            self._failed_cell = True
            return
        possible = self._votes + self.copies - self._seen
        if not vote_radius(possible, self.copies, self.sigma, self.alpha) > cell.distance:
            self._failed_cell = True
        elif self._seen == self.copies:
            self._passed += 1
            self._votes = self._seen = 0
            beyond = self._cell(self._passed)
            self.reached = self.limit if beyond is None else beyond.near

    def _decided(self) -> bool:
        if self.counts["estimation"] == 0:
            return self.label < 0 or self.copies == 0
        return self._failed_cell or self.reached >= self.limit

    def finding(self) -> Finding:
        far = self.reached >= self.limit
        stop: Stop = "certified" if far else "futile" if self._failed_cell or self.copies == 0 else "exhausted"
        return Finding(
            radius=self.reached if self.asked is None or far else 0.0,
            stop=stop,
            n=self.counts["estimation"],
            n_pilot=self.counts["pilot"],
            failed=self.failed,
            prediction=self.label,
            mean=self.mean,
        )


def rotation_plan(claim: Claim, asked: Asked, materials: Materials) -> Plan:
    """Return the plan of the vote at every angle of a range."""

    def best(n: int) -> float:
        able = claim.rest(asked, n) >= COPIES[0]
        able = able and best_vote_radius(COPIES[-1], asked.alpha, asked.sigma) > 2.0 * rounding(torch.zeros(3, 16, 16))
        return MOST if able else 0.0

    certifier = partial(RotationRadius, text=materials.classes, radius=asked.radius, **sampling_of(asked))
    return replace(
        claim.plan(asked, materials),
        statement="the class that most noisy copies are put into is the same at every angle of the range (hard vote)",
        theorem="T30",
        bound="clopper-pearson",
        stop_rule="fixed",
        alpha_split={"share of votes at each angle (Clopper-Pearson)": asked.alpha},
        best=best,
        certifier=certifier,
        label_source="pilot",
        deployed=False,
    )
