"""What a row of the batch holds: a sub-run of an image, its counters and the best point met so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustvlm.attacks.base import FAILED, FOOLED, ROBUST, Job, Result
from robustvlm.attacks.threat import perturbation_norms


@dataclass(frozen=True)
class Fact:
    """What the model says at one point: a row of an `Answer`, off the device.

    Args:
        upheld: the goal is reached, and that is final.
        look: the margin that the attack's own look showed there, over as many draws as any other look; what is final
            may be the largest of many more.
    """

    reached: bool
    margin: float
    prediction: int
    confidence: float
    finite: bool
    cosine: float | None
    upheld: bool = False
    look: float = float("nan")


@dataclass
class Best:
    """The point to record: a success that is final before any other, and of those alike the one of lowest margin.

    The first success is recorded where it ends the attack. Where it does not, further ones are not looked at again one
    by one, which would cost far more than the attack: `deeper` is the point that looked best after it, to be decided at
    the end.
    """

    fact: Fact | None = None
    x: Tensor | None = None
    run: int = 0
    deeper: Best | None = None

    @property
    def upheld(self) -> bool:
        """Whether it is a success that is final."""
        return self.fact is not None and self.fact.upheld

    @property
    def points(self) -> list[Best]:
        """Itself and the deeper point, as far as there are points."""
        return [best for best in (self, self.deeper) if best is not None and best.x is not None]

    def take(self, x: Tensor, fact: Fact, run: int, *, decisive: bool, met: bool | None = None) -> None:
        """Take in what the model says at a point [3, H, W] of a sub-run.

        Args:
            met: whether it is the recorded point once more, where that is known; else the two are compared.
        """
        if decisive or self._worse_than(x, fact, met):
            self.fact, self.x, self.run = fact, x.clone(), run
        elif self._looks_deeper(fact):
            self.deeper = Best(fact, x.clone(), run)

    def take_all(self, other: Best, *, decisive: bool) -> None:
        """Take in what a sub-run has met."""
        for best in other.points:
            assert best.fact is not None
            assert best.x is not None
            self.take(best.x, best.fact, best.run, decisive=decisive and best is other)

    def settle(self, fact: Fact) -> None:
        """Take in what is final at the deeper point, where there is one, or else at the point itself."""
        deeper, self.deeper = self.deeper, None
        if deeper is None:
            self.fact = fact
        elif fact.upheld and self.fact is not None and fact.margin < self.fact.margin:
            self.fact, self.x, self.run = fact, deeper.x, deeper.run

    def _looks_deeper(self, fact: Fact) -> bool:
        if self.fact is None or not self.fact.upheld or fact.upheld or not fact.finite:
            return False
        known = self.fact.look if self.deeper is None or self.deeper.fact is None else self.deeper.fact.margin
        return fact.margin < known

    def _worse_than(self, x: Tensor, fact: Fact, met: bool | None) -> bool:
        if self.fact is None or self.x is None:
            return True
        if fact.upheld != self.fact.upheld:
            return fact.upheld
        if not fact.margin < self.fact.margin:
            return False
        # The point met before is no better one: several sub-runs may start at the image, and rounding differs by batch.
        return not (torch.equal(x, self.x) if met is None else met)


@dataclass(eq=False)
class Lane:
    """A sub-run of an image in a row of the batch.

    With `leave`, it ends at its first success; otherwise it goes on and keeps its success of lowest margin. Outputs
    that are not finite end it, and say nothing of its image where that is fooled already.

    Args:
        points: how many points it may evaluate; target: the class it aims at; beyond: the radius within which a walk
            has shown that class to be out of reach, 0 where none has. walked: its walk is known to be over.
        cut: it came to outputs that are not finite after a success.
    """

    image: Image
    run: int
    points: int
    target: int
    leave: bool = True
    beyond: float = 0.0
    walked: bool = False
    step: int = 0
    passes: int = 0
    told: int = 0
    seconds: float = 0.0
    best: Best = field(default_factory=Best)
    outcome: str | None = None
    cut: bool = False

    @property
    def needed(self) -> bool:
        """Whether it is the sub-run that its image has come to; the others run ahead of their turn."""
        return self.run == self.image.run and not self.image.early

    @property
    def goes_on(self) -> bool:
        """Whether it has points left to evaluate, and what it has met leaves its outcome open."""
        return self.outcome is None and not self.cut and self.step + 1 < self.points

    def observe(self, x: Tensor, fact: Fact, met: bool | None = None) -> None:
        """Take in what the model says at a point [3, H, W]; that may decide the outcome. `met`: see `Best.take`."""
        self.cut = self.cut or (self.best.upheld and not fact.finite)
        if self.cut:
            return
        success = fact.reached and self.leave
        self.outcome = FAILED if not fact.finite else FOOLED if success else None
        self.best.take(x, fact, self.run, decisive=self.outcome is not None, met=met)

    def untold(self) -> int:
        """Return the passes that count for its image and have not been told yet."""
        told, self.told = self.told, self.passes
        return self.passes - told


@dataclass(eq=False)
class Image:
    """The progress of one image through the sub-runs of an attack, which count in their order.

    A sub-run may be made before its turn, in a row that would be paid for and not used. What it finds waits until those
    before it have ended without deciding the outcome, so that the answer is that of one sub-run after the other. The
    same holds for the sub-runs of the attack that comes next: they belong to its `follower`.

    Args:
        place: number of the attack among those that share the batches.
        early: the image is still with an attack before; nothing counts yet.
        dropped: it never comes to this attack.
    """

    job: Job
    runs: int
    run: int = 0
    steps: int = 0
    passes: int = 0
    seconds: float = 0.0
    best: Best = field(default_factory=Best)
    running: set[int] = field(default_factory=set)
    waiting: dict[int, Lane] = field(default_factory=dict)
    beyond: dict[int, float] = field(default_factory=dict)
    outcome: str | None = None
    place: int = 0
    early: bool = False
    dropped: bool = False
    follower: Image | None = None

    @property
    def open_runs(self) -> list[int]:
        """The sub-runs that may count and are neither made nor being made, in their order."""
        return [run for run in range(self.run, self.last) if run not in self.running and run not in self.waiting]

    @property
    def last(self) -> int:
        """Sub-runs from this one on cannot count any more."""
        return min((run for run, lane in self.waiting.items() if lane.outcome is not None), default=self.runs)

    @property
    def shown(self) -> list[Mapping[int, float]]:
        """What is known of classes out of reach: before its attack, by it, and by sub-runs ahead of their turn."""
        return [self.job.beyond, self.beyond, *({lane.target: lane.beyond} for lane in self.waiting.values())]

    def end(self, lane: Lane) -> list[Lane]:
        """Note the end of a sub-run; return those that count now, in their order."""
        self.running.discard(lane.run)
        self.waiting[lane.run] = lane
        return self._settled()

    def begin(self) -> list[Lane]:
        """Note that its attack's turn has come; return the sub-runs that count now, in their order."""
        self.early = False
        return self._settled()

    def drop_followers(self) -> None:
        """Note that the image does not go on to further attacks."""
        follower = self.follower
        while follower is not None:
            follower.dropped, follower = True, follower.follower

    def _settled(self) -> list[Lane]:
        counted: list[Lane] = []
        while self.outcome is None and not self.early and self.run in self.waiting:
            counted.append(self.waiting.pop(self.run))
            self._count(counted[-1])
        return counted

    def _count(self, lane: Lane) -> None:
        self.steps, self.passes = self.steps + lane.step, self.passes + lane.passes
        self.seconds += lane.seconds
        if lane.beyond:
            self.beyond[lane.target] = max(lane.beyond, self.beyond.get(lane.target, 0.0))
        assert lane.best.fact is not None, "the first point of a sub-run lies inside the ball"
        # A success stands, whatever a later sub-run breaks off at.
        self.outcome = None if lane.outcome == FAILED and self.best.upheld else lane.outcome
        self.best.take_all(lane.best, decisive=self.outcome is not None)
        if self.outcome is None:
            self.run += 1
            if self.run == self.runs:
                self.outcome = FOOLED if self.best.fact is not None and self.best.fact.reached else ROBUST

    def result(self, attack: str) -> Result:
        """Return the answer of the attack of that name, measured at the recorded point."""
        assert self.best.fact is not None
        assert self.best.x is not None
        assert self.outcome is not None
        fact, adversarial = self.best.fact, self.best.x.cpu()
        linf, l2 = perturbation_norms(adversarial, self.job.pixels)
        return Result(
            job=self.job,
            outcome=self.outcome,
            prediction=fact.prediction if self.outcome != FAILED else -1,
            confidence=fact.confidence,
            margin=fact.margin,
            cosine=fact.cosine,
            steps=self.steps,
            passes=self.passes,
            run=self.best.run,
            linf=linf,
            l2=l2,
            seconds=self.seconds,
            adversarial=adversarial,
            beyond=self.beyond,
            attack=attack,
        )


def bring_home(lanes: Sequence[Lane]) -> None:
    """Move the recorded points of sub-runs that have ended off a GPU, all in one wait."""
    known = [best for lane in lanes for best in lane.best.points]
    found = [best for best in known if best.x is not None and best.x.device.type == "cuda"]
    if found:
        points = torch.stack([best.x for best in found if best.x is not None]).cpu()
        for best, point in zip(found, points, strict=True):
            best.x = point
