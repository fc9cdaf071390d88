"""A limit on what a run may cost: `20000passes`, `90s`, `10min`, `2h`; the run stops between two batched passes."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustvlm.attacks import Answer, Case, Goal, Objective, Oracle
from robustvlm.attacks.oracle import Passes
from robustvlm.core.ranks import Ranks
from robustvlm.errors import UserError

_FORM = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE]\+?[0-9]+)?)\s*([A-Za-z]+)\s*")
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_PASSES = ("pass", "passes")
_TIMES_KEPT = 31


class BudgetSpent(Exception):
    """The next batched pass would go beyond the budget."""


@dataclass(frozen=True)
class Budget:
    """What a run may cost: encoder passes over all its sessions and processes, or seconds of one session."""

    text: str = ""
    passes: float = math.inf
    seconds: float = math.inf


def parse_budget(text: str | None) -> Budget:
    """Return the budget of a text; without one there is no limit.

    Raises:
        UserError: no positive number with one of the units passes, s, min, h.

    Example:
        >>> parse_budget("1e6passes").passes, parse_budget("10min").seconds
        (1000000.0, 600.0)
    """
    if text is None:
        return Budget()
    match = _FORM.fullmatch(text)
    number, unit = (float(match[1]), match[2].lower()) if match else (0.0, "")
    if not 0 < number < math.inf or unit not in (*_PASSES, *_SECONDS):
        raise UserError(f"cannot read the budget '{text}': expected for example 20000passes, 90s, 10min or 2h")
    shown = " ".join(text.split())
    if unit in _PASSES:
        return Budget(shown, passes=number)
    return Budget(shown, seconds=number * _SECONDS[unit])


class Meter:
    """Watches what a run spends; also the place where a process notices that another one has failed.

    Passes are dealt out evenly whenever the processes meet, so that together they never exceed the budget.
    """

    def __init__(self, budget: Budget, passes: Passes, ranks: Ranks) -> None:
        self.budget, self.ranks = budget, ranks
        self._passes = passes
        self._began = time.monotonic()
        self._allowed = math.inf

    @property
    def _own(self) -> int:
        return self._passes.forward + self._passes.backward

    def deal_out(self, spent: int) -> None:
        """Allow this process its part of the passes that are left when `spent` are spent by all in all sessions."""
        self._allowed = self._own + (self.budget.passes - spent) / self.ranks.size

    def require(self, passes: int) -> None:
        """Raise BudgetSpent if so many more passes are not allowed, UserError if another process has failed."""
        self.ranks.check()
        if self._own + passes > self._allowed or time.monotonic() - self._began >= self.budget.seconds:
            raise BudgetSpent


class MeteredOracle(Oracle):
    """An oracle that asks before every look, and knows what passes were for and how fast batches of each size were.

    `seconds` holds the typical seconds of a batch, by number of rows and whether gradients were asked for; `spent` the
    passes by what they were made for, in the words of `runs.records.Passes`; those for "images" are not yet parted into
    rows of images and spare ones.
    """

    def __init__(self, model: Any, *, budget: Budget, ranks: Ranks, **options: Any) -> None:
        super().__init__(model, **options)
        self.meter = Meter(budget, self.passes, ranks)
        self.spent: Counter[str] = Counter()
        self._purpose = "images"
        self._times: dict[tuple[int, bool], list[float]] = {}

    @contextlib.contextmanager
    def made_for(self, purpose: str) -> Iterator[None]:
        """Count the passes made inside under another purpose."""
        before, self._purpose = self._purpose, purpose
        try:
            yield
        finally:
            self._purpose = before

    def note_spare(self, rows: int) -> None:
        """Count so many of the passes just made as spare ones: they only filled a batch up."""
        self.spent.update({self._purpose: -rows, "spare": rows})

    def look(
        self, x: Tensor, goal: Goal, objective: Objective, case: Case, *, gradient: bool = True
    ) -> tuple[Answer, Tensor, Tensor]:
        """As `Oracle.look`, or raise BudgetSpent before any pass is made."""
        self.meter.require(len(x) * self.eot * (2 if gradient else 1))
        return super().look(x, goal, objective, case, gradient=gradient)

    @contextlib.contextmanager
    def _counted(self, images: int, *, backward: bool) -> Iterator[None]:
        before = self.passes.seconds
        with super()._counted(images, backward=backward):
            yield
        self.spent[self._purpose] += images * (2 if backward else 1)
        times = self._times.setdefault((images, backward), [])
        if len(times) < _TIMES_KEPT:
            times.append(self.passes.seconds - before)

    @property
    def seconds(self) -> dict[tuple[int, bool], float]:
        # The first call of a size is slow (memory, kernels): of two the faster counts, of more the middle one.
        return {key: sorted(times)[(len(times) - 1) // 2] for key, times in self._times.items()}
