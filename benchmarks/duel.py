"""Two programs on the same images: what each attack of either fooled and cost, kept in a file as it becomes known."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import Clock, Counted, clock
from robustvlm.attacks import FOOLED, ROBUST, Job, LaneAttack, LaneEngine, Oracle, Probe, Result, ThreatModel
from robustvlm.attacks.catalog import by_gradients
from robustvlm.errors import UserError
from robustvlm.stats import mcnemar_exact, rate

OURS = "robustvlm"
# Of what a record's file holds; others are refused.
FORMAT = 2
# The part of what attacks pay that share the batches and no image uses.
SPARE = "spare rows"


@dataclass(frozen=True)
class Part:
    """One attack of one program: ids of the images it fooled among those it got, and its cost.

    `passes` counts images through the model, forward and backward as one each; `model_seconds` is the time in there and
    `step_seconds` that in the attack's own arithmetic, both 0 where not measured. `beyond` is what it showed, by image,
    of classes that are out of reach, each with the radius within which it is, `reached` the lowest margins that
    gradients led to.
    """

    name: str
    attacked: int
    fooled: list[str]
    passes: int
    seconds: float
    model_seconds: float = 0.0
    step_seconds: float = 0.0
    beyond: dict[str, dict[str, float]] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)


class Record:
    """The parts of a comparison by program and attack, in a JSON file that a later call of the same settings continues.

    Raises UserError when the file holds a comparison of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps({"format": FORMAT, **settings}))
        self.parts: dict[str, dict[str, Part]] = {}
        if path.exists():
            known = json.loads(path.read_text())
            if known["settings"] != self.settings:
                raise UserError(f"'{path}' holds a comparison of other settings: pass another --out, or delete it")
            self.parts = {side: {p["name"]: Part(**p) for p in parts} for side, parts in known["parts"].items()}

    def add(self, side: str, *new: Part) -> None:
        """Keep parts, all of them or none on the disk before this returns."""
        self.parts.setdefault(side, {}).update({part.name: part for part in new})
        parts = {name: [asdict(p) for p in parts.values()] for name, parts in self.parts.items()}
        partial = self.path.with_suffix(".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"settings": self.settings, "parts": parts}, indent=1))
        partial.replace(self.path)

    def has(self, side: str, name: str) -> bool:
        """Whether a part is known."""
        return name in self.parts.get(side, {})

    def part(self, side: str, name: str) -> Part:
        """Return a part; one of no images where a program has none of that name."""
        return self.parts.get(side, {}).get(name, Part(name, 0, [], 0, 0.0))

    def fooled(self, side: str, names: Iterable[str] | None = None) -> set[str]:
        """Return the images that a program fooled by the named attacks, or by all."""
        names = self.parts.get(side, {}) if names is None else names
        return {image for name in names for image in self.part(side, name).fooled}

    def told(self, job: Job) -> Job:
        """Return the job with what our attacks have shown so far, as a run passes it on from attack to attack."""
        known: dict[int, float] = {}
        parts = self.parts.get(OURS, {}).values()
        for part in parts:
            for target, radius in part.beyond.get(job.image_id, {}).items():
                known[int(target)] = max(radius, known.get(int(target), 0.0))
        reached = min((part.reached.get(job.image_id, job.reached) for part in parts), default=job.reached)
        return replace(job, beyond=known, reached=reached)


def run_ours(
    model: Counted, attack: LaneAttack, threat: ThreatModel, jobs: Sequence[Job], found: Probe, *, seed: int
) -> Part:
    """Attack the jobs in lanes and return what came of it, under the attack's plain name, spare rows included."""
    part, *rest = run_together(model, [attack], threat, jobs, found, seed=seed)
    for spare in rest:
        whole = part.passes + spare.passes, part.seconds + spare.seconds
        part = replace(
            spare,
            name=part.name,
            attacked=part.attacked,
            fooled=part.fooled,
            passes=whole[0],
            seconds=whole[1],
            beyond=part.beyond,
            reached=part.reached,
        )
    return part


def run_together(
    model: Counted, attacks: Sequence[LaneAttack], threat: ThreatModel, jobs: Sequence[Job], found: Probe, *, seed: int
) -> list[Part]:
    """Let attacks share the batches, as a run does; return a part for each, and one of what is paid beside them.

    An attack's part has the passes of its own images and their share of the seconds. The last one, `SPARE`, has the
    rest of both (rows that were paid for and not used), and the time in the model and in the arithmetic of all.
    """
    names = [attack.name.split(":")[0] for attack in attacks]
    if not jobs:
        return [Part(name, 0, [], 0, 0.0) for name in names]
    oracle = Oracle(model, device=next(model.parameters()).device)
    before, first = model.passes, attacks[0]
    engine = LaneEngine(
        oracle, first, threat, lanes=found.rungs[0], seed=seed, rungs=found.rungs, then=list(attacks[1:])
    )
    with clock() as measured, timed("advance", *map(type, attacks)) as steps:
        results = list(engine.run(jobs))
    parts = [
        _part(name, [result for result in results if result.attack == attack.name], by_gradients(attack, engine.goal))
        for name, attack in zip(names, attacks, strict=True)
    ]
    spare = model.passes - before - sum(part.passes for part in parts)
    rest = measured.seconds - sum(part.seconds for part in parts)
    return [*parts, Part(SPARE, 0, [], spare, rest, oracle.passes.seconds, steps.seconds)]


def _part(name: str, results: Sequence[Result], follows_gradients: bool) -> Part:
    shown = {result.job.image_id: {str(k): v for k, v in result.beyond.items()} for result in results if result.beyond}
    margins = {result.job.image_id: result.margin for result in results if result.outcome == ROBUST}
    return Part(
        name,
        len(results),
        sorted(result.job.image_id for result in results if result.outcome == FOOLED),
        sum(result.passes for result in results),
        sum(result.seconds for result in results),
        beyond=shown,
        reached=margins if follows_gradients else {},
    )


@contextmanager
def timed(method: str, *owners: type) -> Iterator[Clock]:
    """Sum up the seconds spent in a method of some classes while the block runs; calls within a call count once."""
    total, within = Clock(), [False]

    def measuring(original: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            if within[0]:
                return original(*args, **kwargs)
            within[0] = True
            try:
                with clock() as one:
                    return original(*args, **kwargs)
            finally:
                within[0] = False
                total.seconds += one.seconds

        return measured

    originals = {owner: getattr(owner, method) for owner in owners}
    with ExitStack() as stack:
        for owner, original in originals.items():
            stack.enter_context(patch.object(owner, method, measuring(original)))
        yield total


def versus(record: Record, theirs: str, names: Sequence[str], *, ids: Sequence[str], seen: int) -> list[list[object]]:
    """Return two table rows: robust accuracy, what only one program fools, the paired test, passes and seconds."""
    pairs = {side: record.fooled(side, names) for side in (OURS, theirs)}
    test = mcnemar_exact([i in pairs[OURS] for i in ids], [i in pairs[theirs] for i in ids])
    cost = {
        side: [sum(getattr(record.part(side, name), what) for name in names) for what in ("passes", "seconds")]
        for side in pairs
    }
    rows: list[list[object]] = []
    for side, other in ((OURS, theirs), (theirs, OURS)):
        left = len(ids) - len(pairs[side])
        held = rate(left, seen)
        ratios = [f"{mine / full:.2f}" if full else "-" for mine, full in zip(cost[side], cost[theirs], strict=True)]
        robust = f"{left}/{seen} ({held.value:.1%}, {held.low:.1%} to {held.high:.1%})"
        only = _shown(pairs[side] - pairs[other])
        passes, seconds = cost[side]
        rows.append([side, robust, only, f"{test.p_value:.2g}", f"{passes:,}", ratios[0], f"{seconds:.1f}", ratios[1]])
    return rows


HEADER = ("program", "robust", "only this one fools", "McNemar p", "passes", "ratio", "seconds", "ratio")


def _shown(images: Collection[str]) -> str:
    return f"{len(images)}: {', '.join(sorted(images))}" if images else "0"


def where_time_goes(record: Record, names: Sequence[str]) -> list[object]:
    """Return a table row: seconds of attacks of ours, and the shares in the model, in their arithmetic, elsewhere."""
    parts = [record.part(OURS, name) for name in names]
    seconds, *inside = (
        sum(getattr(part, what) for part in parts) for what in ("seconds", "model_seconds", "step_seconds")
    )
    shares = [value / seconds if seconds else 0.0 for value in inside]
    return [", ".join(names), f"{seconds:.1f}", *(f"{share:.1%}" for share in (*shares, 1 - sum(shares)))]


TIME_HEADER = ("attack", "seconds", "inside the model", "the attack's arithmetic", "lanes, judging, queue")
