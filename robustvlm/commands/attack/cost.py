"""What an attack run may cost and will cost: passes and seconds, as a limit and as a forecast."""

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustvlm.attacks import Answer, Case, Goal, LaneAttack, Objective, Oracle
from robustvlm.attacks.objectives import Mixture
from robustvlm.attacks.oracle import Passes
from robustvlm.core.batches import batch_sizes
from robustvlm.core.ranks import Ranks
from robustvlm.errors import UserError
from robustvlm.runs.records import Estimate

# A limit on what a run may cost: `20000passes`, `90s`, `10min`, `2h`; the run stops between two batched passes

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
        self, x: Tensor, goal: Goal, objective: Objective | Mixture, case: Case, *, gradient: bool = True
    ) -> tuple[Answer, Tensor, Tensor]:
        """As `Oracle.look`, or raise BudgetSpent before any pass is made."""
        self.meter.require(len(x) * self.eot * (2 if gradient else 1))
        return super().look(x, goal, objective, case, gradient=gradient)

    def confirm(self, x: Tensor) -> Tensor:
        """As `Oracle.confirm`, or raise BudgetSpent before the pass; a second look that it cuts short is lost.

        The few questions that a run begins with are not cut short: they say whether it can be made at all.
        """
        if self._purpose != "questions":
            self.meter.require(len(x))
        return super().confirm(x)

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


# What the attacks of a run will cost, said before they begin: passes and seconds at least and at most


@dataclass(frozen=True)
class Work:
    """What one stage has still to do.

    Args:
        attack: an attack in lanes; the name alone of one of another package.
        images: the images it would attack if none fell before.
        n_targets: target classes of an image.
    """

    attack: LaneAttack | str
    images: Collection[Hashable]
    n_targets: int = 1


@dataclass(frozen=True)
class Speed:
    """How the run spends its passes, and how long they take.

    Args:
        rungs: allowed batch sizes, descending.
        seconds_of: seconds of a batch, by rows and whether gradients were asked for; at least of the largest size.
        eot: draws averaged in one look; second_looks: draws that confirm the answer for an image, 0 where none do.
        upholding: further draws that a success is to hold in.
        ranks: processes that share the images.
    """

    rungs: Sequence[int]
    seconds_of: Mapping[tuple[int, bool], float]
    eot: int = 1
    second_looks: int = 0
    upholding: int = 0
    ranks: int = 1

    def batches(self, images: int) -> list[int]:
        """Return the batch sizes in which so many images are looked at once by one process.

        Example:
            >>> Speed((8, 4), {}).batches(19)
            [8, 8, 4]
        """
        full, rest = divmod(images, self.rungs[0])
        return [self.rungs[0]] * full + (list(batch_sizes(self.rungs, rest)) if rest else [])

    def seconds(self, rows: int, gradient: bool) -> float:
        """Return the seconds of a batch; of one never timed, its part of the largest."""
        largest = self.rungs[0]
        return self.seconds_of.get((rows, gradient), self.seconds_of.get((largest, gradient), 0.0) * rows / largest)

    def cost(self, images: int, looks: int, *, gradient: bool, falling: int) -> tuple[int, float]:
        """Return passes of all processes and seconds of the slowest, to look `looks` times at each image.

        Args:
            falling: images of them whose success is to hold.
        """
        even, odd = divmod(images, self.ranks)
        shares = [self.batches(even + (rank < odd)) for rank in range(self.ranks)]
        rows = sum(map(sum, shares))
        passes = rows * (looks * self.eot * (2 if gradient else 1) + self.second_looks)
        per_look = self.eot * sum(self.seconds(batch, gradient) for batch in shares[0])
        confirming = self.second_looks * sum(self.seconds(batch, False) for batch in shares[0])
        mine = even + (odd > 0)
        upheld = self.upholding * self.seconds(min(falling, mine), False)
        return passes + self.upholding * falling, looks * per_look + confirming + upheld


def looks_per_image(attack: LaneAttack, n_targets: int) -> int:
    """Return how many points an attack evaluates for an image that it never fools.

    Example:
        >>> from robustvlm.attacks import parse_attacks
        >>> [looks_per_image(attack, 9) for attack in parse_attacks("pgd:steps=20:restarts=2,apgd-t")]
        [42, 1458]
    """
    return attack.n_runs(n_targets + 1) * attack.n_points()


def estimate(work: Sequence[Work], speed: Speed) -> Estimate:
    """Return the least the work can cost (each image falls at the first look) and the most (none ever falls).

    Second looks at more than one apparent success of an image, in low precision or of random models, come on top, which
    the estimate says: counted for every look they would make it many times as high as what is ever spent.

    Example:
        >>> from robustvlm.attacks import parse_attacks
        >>> stages = [Work(attack, range(10)) for attack in parse_attacks("apgd-ce:steps=9,apgd-dlr:steps=4")]
        >>> found = estimate(stages, Speed((5,), {(5, True): 0.1}))
        >>> found.passes_least, found.passes_most, found.seconds_most
        (20, 300, 3.0)
    """
    counted: set[Hashable] = set()
    least, most = (0, 0.0), (0, 0.0)
    for stage in work:
        first = set(stage.images) - counted
        if isinstance(stage.attack, str):
            continue
        counted |= first
        gradient = stage.attack.uses_gradient
        looks = looks_per_image(stage.attack, stage.n_targets)
        least = _plus(least, speed.cost(len(first), 1, gradient=gradient, falling=len(first)))
        # An image falls once, whenever that is.
        most = _plus(most, speed.cost(len(stage.images), looks, gradient=gradient, falling=len(first)))
    unknown = dict.fromkeys(stage.attack for stage in work if isinstance(stage.attack, str) and stage.images)
    return Estimate(
        images=len({image for stage in work for image in stage.images}),
        passes_least=least[0],
        passes_most=most[0],
        seconds_least=least[1],
        seconds_most=most[1],
        unknown=list(unknown),
        second_looks=speed.second_looks > 0,
    )


def _plus(a: tuple[int, float], b: tuple[int, float]) -> tuple[int, float]:
    return a[0] + b[0], a[1] + b[1]
