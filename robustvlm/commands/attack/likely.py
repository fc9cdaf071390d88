"""What an attack run will likely cost, learned from the images that it has finished; never a bound.

The forecast before the first attack can only say what it costs if all images fall at once, and if none ever falls. As
images finish, the passes that each took and the share that withstood tell more:

* A stage (an attack at one eps) is judged by its first 8, 16, 32, ... images, all of them finished: those that finish
  first are the ones that fall, so whatever has finished by now would look too cheap.
* The mean of the images still to come lies within two standard errors of theirs, the share that goes on to the next
  attack in its 95% interval; both never leave what is possible at all.
* A stage that has not shown so many images counts with the least and the most that an image can cost, for as many
  images as are likely to reach it; nothing is said while one is to come whose most is not known.

Images are taken for alike whatever their place in the data: where these are sorted by class, the range may be too
narrow. Checks at the end count with nothing at least; what attacks of other packages and second looks cost is not known
before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from robustvlm.attacks import FOOLED, LaneAttack
from robustvlm.commands.attack.cost import MeteredOracle, looks_per_image
from robustvlm.commands.attack.store import AttackFact, CleanFact, Ledger, Stage
from robustvlm.stats import rate

# So many images of a stage must be finished before anything is said; then twice as many, and so on.
FEWEST = 8
# Standard errors on either side.
_ERRORS = 2.0


@dataclass(frozen=True)
class Outlook:
    """One stage: what its first images have shown, and what is left of it.

    Args:
        ready: images that have come to this stage and are not finished in it; others may follow from the one before.
        least, most: passes that one image can cost; `most` is infinite where nothing bounds it.
        passes: of its first finished images, see `first_finished`; withstood: how many of those go on.
    """

    ready: int
    least: int
    most: float
    passes: Sequence[int] = ()
    withstood: int = 0


def first_finished(finished: Sequence[bool]) -> int:
    """Return how many of the first images to judge by: the largest of 8, 16, 32, ... that are all finished, else 0.

    Where all images of a stage are finished, all count.

    Example:
        >>> first_finished([True] * 20 + [False] * 5), first_finished([True] * 7 + [False]), first_finished([True] * 9)
        (16, 0, 9)
    """
    done = finished.index(False) if False in finished else len(finished)
    if done < FEWEST:
        return 0
    return done if done == len(finished) else FEWEST * 2 ** int(math.log2(done // FEWEST))


def passes_left(stages: Sequence[Outlook]) -> tuple[float, float]:
    """Return the likely range of passes that images still need, over stages that they go through in this order.

    Example:
        >>> first = Outlook(ready=10, least=2, most=100, passes=[20] * 8, withstood=8)
        >>> passes_left([first])
        (200.0, 200.0)
        >>> passes_left([Outlook(ready=10, least=2, most=100)])
        (20.0, 1000.0)
    """
    low = high = 0.0
    few = many = 0.0  # images that come from the stage before
    for stage in stages:
        few, many = few + stage.ready, many + stage.ready
        low += few * _mean(stage, few, -1)
        high += many * _mean(stage, many, +1)
        share = rate(stage.withstood, len(stage.passes))
        few, many = few * share.low, many * share.high
    return low, high


def _mean(stage: Outlook, images: float, side: int) -> float:
    """Return an end of the range in which the mean passes of so many further images lie."""
    count = len(stage.passes)
    if not images:
        return 0.0
    if not count:
        return stage.least if side < 0 else stage.most
    mean = sum(stage.passes) / count
    variance = sum((passes - mean) ** 2 for passes in stage.passes) / max(count - 1, 1)
    error = math.sqrt(variance * (1 / count + 1 / images))
    return min(max(mean + side * _ERRORS * error, stage.least), stage.most)


def in_all(left: tuple[float, float], *, paid: int, under_way: int, dearer: float, checks: int = 0) -> tuple[int, int]:
    """Return the likely passes of the whole run.

    Args:
        left: see `passes_left`. paid: passes spent so far, on whatever.
        under_way: passes that images have had which are not finished; they are no longer to come.
        dearer: passes paid for each that counts for an image, so far: full batches hold spare rows.
        checks: passes that checks at the end may take.

    Example:
        >>> in_all((100.0, 300.0), paid=50, under_way=120, dearer=1.5)
        (50, 320)
    """
    low, high = (paid + max(0, math.ceil(dearer * (passes - under_way))) for passes in left)
    return low, high + checks


def _key(stage: Stage) -> tuple[object, ...]:
    return stage.threat.eps, stage.goal.spec, stage.attack.name


class LikelyCost:
    """What a run will likely cost, from the facts in its ledger.

    Args:
        ledger: the run's record; oracle: what it has spent; stages: all of them, in order.
        leave, everyone: see `Ledger.remaining`.

    Attributes:
        counted: passes that have counted for an image in this session.
        checks: passes that checks after the attacks may take.
    """

    def __init__(
        self, ledger: Ledger, oracle: MeteredOracle, stages: Sequence[Stage], *, leave: bool, everyone: bool
    ) -> None:
        self.ledger, self.oracle, self.stages, self.leave, self.everyone = ledger, oracle, stages, leave, everyone
        self.counted = self.checks = 0
        before = ledger.cost
        self._paid_before = before.forward_passes + before.backward_passes
        self._finished_before = self._finished

    @property
    def _finished(self) -> int:
        return sum(fact.passes for fact in self.ledger.found.values())

    def now(self, at: Stage) -> tuple[int, int] | None:
        """Return the likely passes of the whole run; None as long as the stage it is at has not shown enough."""
        remaining = [self._remaining(stage) for stage in self.stages]
        found: dict[tuple[object, ...], dict[int, AttackFact]] = {}
        for (*of, index), fact in self.ledger.found.items():
            found.setdefault(tuple(of), {})[index] = fact
        outlooks = {
            stage.title: self._outlook(place, remaining, found.get(_key(stage), {}))
            for place, stage in enumerate(self.stages)
        }
        unknown = any(item.most == math.inf and not item.passes for item in outlooks.values())
        if unknown or not outlooks[at.title].passes:
            return None
        goals = dict.fromkeys(stage.goal.spec for stage in self.stages)
        left = [
            passes_left([outlooks[stage.title] for stage in self.stages if stage.goal.spec == goal]) for goal in goals
        ]
        spent = self.oracle.spent
        return in_all(
            (sum(low for low, _ in left), sum(high for _, high in left)),
            paid=self._paid_before + sum(spent.values()),
            under_way=max(0, self.counted - (self._finished - self._finished_before)),
            dearer=max(1.0, spent["images"] / self.counted if self.counted else 1.0),
            checks=self.checks,
        )

    def _outlook(
        self, place: int, remaining: Sequence[dict[str, CleanFact]], done: Mapping[int, AttackFact]
    ) -> Outlook:
        """Return what a stage has shown by now, `done` by image, and what is left of it."""
        stage = self.stages[place]
        before = [at for at in range(place) if self.stages[at].goal.spec == stage.goal.spec]
        busy = {name for at in before for name in remaining[at]}
        ready = {fact.index for name, fact in remaining[place].items() if name not in busy}
        images = sorted(ready | done.keys())
        first = images[: first_finished([index in done for index in images])]
        withstood = [index for index in first if not (self.leave and done[index].outcome == FOOLED)]
        least, most = 0, math.inf
        if isinstance(stage.attack, LaneAttack):
            least = self.oracle.eot * (2 if stage.attack.uses_gradient else 1)
            if self.oracle.confirmed:  # else second looks come on top, as many as there are claims
                targets = max((len(fact.targets) for fact in self.ledger.clean.values()), default=1)
                most = least * looks_per_image(stage.attack, targets)
        return Outlook(len(ready), least, most, [done[index].passes for index in first], len(withstood))

    def _remaining(self, stage: Stage) -> dict[str, CleanFact]:
        return self.ledger.remaining(
            stage.threat.eps, stage.goal.spec, stage.attack.name, leave=self.leave, everyone=self.everyone
        )
