"""What the attacks of a run will cost, said before they begin: passes and seconds at least and at most."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

from robustvlm.attacks import LaneAttack
from robustvlm.attacks.rungs import batch_sizes
from robustvlm.runs.summary import Estimate


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
        ranks: processes that share the images.
    """

    rungs: Sequence[int]
    seconds_of: Mapping[tuple[int, bool], float]
    eot: int = 1
    second_looks: int = 0
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

    def cost(self, images: int, looks: int, *, gradient: bool) -> tuple[int, float]:
        """Return passes of all processes and seconds of the slowest, to look `looks` times at each image."""
        even, odd = divmod(images, self.ranks)
        shares = [self.batches(even + (rank < odd)) for rank in range(self.ranks)]
        rows = sum(map(sum, shares))
        passes = rows * (looks * self.eot * (2 if gradient else 1) + self.second_looks)
        per_look = self.eot * sum(self.seconds(batch, gradient) for batch in shares[0])
        confirming = self.second_looks * sum(self.seconds(batch, False) for batch in shares[0])
        return passes, looks * per_look + confirming


def looks_per_image(attack: LaneAttack, n_targets: int) -> int:
    """Return how many points an attack evaluates for an image that it never fools.

    Example:
        >>> from robustvlm.attacks import parse_attacks
        >>> [looks_per_image(attack, 9) for attack in parse_attacks("pgd:steps=20:restarts=2,apgd-t")]
        [42, 1143]
    """
    return attack.n_runs(n_targets + 1) * attack.n_points()


def estimate(work: Sequence[Work], speed: Speed) -> Estimate:
    """Return the least the work can cost (each image falls at the first look) and the most (none ever falls).

    Second looks at apparent successes that do not hold, in low precision or of random models, come on top.

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
        least = _plus(least, speed.cost(len(first), 1, gradient=gradient))
        most = _plus(most, speed.cost(len(stage.images), looks, gradient=gradient))
    unknown = dict.fromkeys(stage.attack for stage in work if isinstance(stage.attack, str) and stage.images)
    return Estimate(
        images=len({image for stage in work for image in stage.images}),
        passes_least=least[0],
        passes_most=most[0],
        seconds_least=least[1],
        seconds_most=most[1],
        unknown=list(unknown),
    )


def _plus(a: tuple[int, float], b: tuple[int, float]) -> tuple[int, float]:
    return a[0] + b[0], a[1] + b[1]
