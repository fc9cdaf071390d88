"""Two programs on the same images: what each attack of either fooled and cost, kept in a file as it becomes known."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import Clock, Counted, clock
from robustvlm.attacks import ROBUST, Job, LaneAttack, LaneEngine, Oracle, Probe, ThreatModel
from robustvlm.attacks.catalog import by_gradients
from robustvlm.errors import UserError
from robustvlm.stats import mcnemar_exact, rate

OURS = "robustvlm"


@dataclass(frozen=True)
class Part:
    """One attack of one program: ids of the images it fooled among those it got, and its cost.

    `forward` and `backward` count images through the model, `model_seconds` is the time in there and `step_seconds`
    that in the attack's own arithmetic; both 0 where not measured. `beyond` is what it showed, by image, of classes
    that are out of reach, each with the radius within which it is, `reached` the lowest margins that gradients led to.
    """

    name: str
    attacked: int
    fooled: list[str]
    forward: int
    backward: int
    seconds: float
    model_seconds: float = 0.0
    step_seconds: float = 0.0
    beyond: dict[str, dict[str, float]] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        return self.forward + self.backward


class Record:
    """The parts of a comparison by program and attack, in a JSON file that a later call of the same settings continues.

    Raises UserError when the file holds a comparison of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.parts: dict[str, dict[str, Part]] = {}
        if path.exists():
            known = json.loads(path.read_text())
            if known["settings"] != self.settings:
                raise UserError(f"'{path}' holds a comparison of other settings: pass another --out, or delete it")
            self.parts = {side: {p["name"]: Part(**p) for p in parts} for side, parts in known["parts"].items()}

    def add(self, side: str, part: Part) -> None:
        """Keep a part, on the disk before this returns."""
        self.parts.setdefault(side, {})[part.name] = part
        parts = {name: [asdict(p) for p in parts.values()] for name, parts in self.parts.items()}
        partial = self.path.with_suffix(".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"settings": self.settings, "parts": parts}, indent=1))
        partial.replace(self.path)

    def has(self, side: str, name: str) -> bool:
        """Whether a part is known."""
        return name in self.parts.get(side, {})

    def fooled(self, side: str, names: Iterable[str] | None = None) -> set[str]:
        """Return the images that a program fooled by the named attacks, or by all."""
        parts = self.parts.get(side, {})
        return {image for name in (parts if names is None else names) for image in parts[name].fooled}

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
    """Attack the jobs in lanes and return what came of it, under the attack's plain name."""
    name = attack.name.split(":")[0]
    if not jobs:
        return Part(name, 0, [], 0, 0, 0.0)
    oracle = Oracle(model, device=next(model.parameters()).device)
    before = model.forward_rows, model.backward_rows
    engine = LaneEngine(oracle, attack, threat, lanes=found.rungs[0], seed=seed, rungs=found.rungs)
    with clock() as measured, timed(type(attack), "advance") as steps:
        results = list(engine.run(jobs))
    return Part(
        name,
        len(jobs),
        sorted(result.job.image_id for result in results if result.outcome == "fooled"),
        model.forward_rows - before[0],
        model.backward_rows - before[1],
        measured.seconds,
        oracle.passes.seconds,
        steps.seconds,
        {result.job.image_id: {str(k): v for k, v in result.beyond.items()} for result in results if result.beyond},
        {
            result.job.image_id: result.margin
            for result in results
            if by_gradients(attack, engine.goal) and result.outcome == ROBUST
        },
    )


@contextmanager
def timed(owner: type, method: str) -> Iterator[Clock]:
    """Sum up the seconds spent in a method while the block runs."""
    total, original = Clock(), getattr(owner, method)

    def measured(*args: Any, **kwargs: Any) -> Any:
        with clock() as one:
            result = original(*args, **kwargs)
        total.seconds += one.seconds
        return result

    with patch.object(owner, method, measured):
        yield total


def versus(record: Record, theirs: str, names: Sequence[str], *, ids: Sequence[str], seen: int) -> list[list[object]]:
    """Return two table rows: robust accuracy, what only one program fools, the paired test, passes and seconds."""
    pairs = {side: record.fooled(side, names) for side in (OURS, theirs)}
    test = mcnemar_exact([i in pairs[OURS] for i in ids], [i in pairs[theirs] for i in ids])
    cost = {
        side: [sum(getattr(record.parts[side][name], what) for name in names) for what in ("passes", "seconds")]
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


def where_time_goes(part: Part) -> list[object]:
    """Return a table row: seconds of an attack of ours, and the shares in the model, in its arithmetic, elsewhere."""
    shares = [value / part.seconds if part.seconds else 0.0 for value in (part.model_seconds, part.step_seconds)]
    return [part.name, f"{part.seconds:.1f}", *(f"{share:.1%}" for share in (*shares, 1 - sum(shares)))]


TIME_HEADER = ("attack", "seconds", "inside the model", "the attack's arithmetic", "lanes, judging, queue")
