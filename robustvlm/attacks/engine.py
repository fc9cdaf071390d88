"""Lanes: full, fixed-shape batches in which every image advances on its own and leaves once its answer is known.

A batched pass costs the same whether its rows matter or not, so the engine keeps the rows busy: a lane whose image is
fooled, or has used up its budget, is refilled from the queue before the next pass. Every random draw comes from
(seed, image, attack, sub-run), so an image's answer does not depend on its neighbours, its lane or the order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.attacks import catalog
from robustvlm.attacks.base import DONE, FAILED, FOOLED, ROBUST, Job, LaneAttack, Result, State
from robustvlm.attacks.goals import Case, Goal, Misclassify
from robustvlm.attacks.oracle import Answer, Oracle
from robustvlm.attacks.threat import ThreatModel, lengths, perturbation_norms
from robustvlm.core.batches import batch_sizes, narrower_after, smallest
from robustvlm.core.seeds import generator
from robustvlm.errors import UserError

# One occupied row of the batch: its job, its counters and the best point met so far

# The step number of a lane whose sub-run is over and whose next one has not begun.
RESTART = -1


@dataclass(frozen=True)
class Fact:
    """What the model says at one point: a row of an `Answer`, off the device."""

    reached: bool
    margin: float
    prediction: int
    confidence: float
    finite: bool
    cosine: float | None


@dataclass
class Lane:
    """The progress of one image through the sub-runs of an attack.

    With `leave`, the image is finished at its first success; otherwise it goes on and keeps its point of lowest margin.
    """

    job: Job
    leave: bool = True
    run: int = 0
    step: int = 0
    steps: int = 0
    passes: int = 0
    seconds: float = 0.0
    best_run: int = 0
    best: Fact | None = None
    best_x: Tensor | None = None

    def target(self, attack: LaneAttack) -> int:
        """Return the class that the current sub-run aims at; the label where the objective has no target."""
        if not attack.objective.targeted:
            return self.job.label
        # A lane that has closed its last sub-run may still be asked, for the second look at its recorded point.
        return self.job.targets[min(attack.target_rank(self.run), len(self.job.targets) - 1)]

    def observe(self, x: Tensor, fact: Fact) -> str | None:
        """Take in what the model says at a point [3, H, W]; return the outcome if that decides it."""
        success = fact.reached and self.leave
        if not fact.finite or success or self._improves(x, fact):
            self.best, self.best_run, self.best_x = fact, self.run, x.clone()
        if not fact.finite:
            return FAILED
        return FOOLED if success else None

    def _improves(self, x: Tensor, fact: Fact) -> bool:
        if self.best is None or self.best_x is None:
            return True
        # The point met before is no better one: several sub-runs may start at the image, and rounding differs by batch.
        return fact.margin < self.best.margin and not torch.equal(x, self.best_x)

    def reconsider(self, fact: Fact) -> str | None:
        """Replace what is known of the recorded point by a better look at it; return the outcome if that decides it."""
        self.best = fact
        return FAILED if not fact.finite else FOOLED if fact.reached else None

    def move_on(self, attack: LaneAttack, *, ended: bool) -> str | None:
        """Count a step, or close the sub-run; return the outcome when there is none left."""
        if self.step + 1 < attack.n_points() and not ended:
            self.step += 1
            self.steps += 1
            return None
        self.run += 1
        self.step = RESTART
        if self.run < attack.n_runs(len(self.job.targets) + 1):
            return None
        return FOOLED if self.best is not None and self.best.reached else ROBUST

    def result(self, outcome: str) -> Result:
        """Return the answer, measured at the recorded point."""
        assert self.best is not None, "the first point of a job lies inside the ball"
        assert self.best_x is not None
        adversarial = self.best_x.cpu()
        linf, l2 = perturbation_norms(adversarial, self.job.pixels)
        return Result(
            job=self.job,
            outcome=outcome,
            prediction=self.best.prediction if outcome != FAILED else -1,
            confidence=self.best.confidence,
            margin=self.best.margin,
            cosine=self.best.cosine,
            steps=self.steps,
            passes=self.passes,
            run=self.best_run,
            linf=linf,
            l2=l2,
            seconds=self.seconds,
            adversarial=adversarial,
        )


# Lanes: full, fixed-shape batches in which every image advances on its own and leaves as soon as its answer is known


class LaneEngine:
    """Runs one attack over a stream of jobs and yields their results as they finish.

    Args:
        oracle: the model, with its device, precision and pass counter.
        attack: the attack.
        threat: the ball.
        lanes: rows of a full batch.
        seed: run seed.
        rungs: batch sizes, descending and starting with `lanes`, on which the model gives bit-identical rows; the
            smaller ones are used when the queue runs dry. Default: full batches only.
        goal: what the attacker wants; any wrong class by default.
        leave: let an image leave at its first success; otherwise it goes on to the end of its budget, and the recorded
            point is that of lowest margin.
        on_pass: called after every batched pass with the number of occupied lanes and the passes spent on them.

    Attributes:
        claimed: successes seen in passes that are not final, and looked at again.
        upheld: those of them that stood up to it.

    Example:
        >>> from robustvlm.attacks.pgd import PGD
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> engine = LaneEngine(Oracle(model), PGD(n_iter=5), ThreatModel("Linf", 0.5), lanes=4, seed=0)
        >>> jobs = [Job(str(i), i, torch.rand(3, 2, 2), label=0) for i in range(6)]
        >>> sorted(result.job.index for result in engine.run(jobs))
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        oracle: Oracle,
        attack: LaneAttack,
        threat: ThreatModel,
        *,
        lanes: int,
        seed: int,
        goal: Goal | None = None,
        leave: bool = True,
        rungs: Sequence[int] = (),
        on_pass: Callable[[int, int], None] | None = None,
    ) -> None:
        self.oracle, self.threat, self.seed = oracle, threat, seed
        self.goal, self.leave = goal or Misclassify(), leave
        attack = attack if leave else attack.exhaustive()
        self.attack = attack.away_from_image() if self.goal.still_at_image else attack
        self.rungs = tuple(rungs) or (lanes,)
        self.claimed = self.upheld = 0
        self._on_pass = on_pass
        self._lanes: list[Lane] = []
        self._state: State = {}

    def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Attack every job; results come in order of completion."""
        source, waiting = iter(jobs), deque[Job]()
        self._lanes, self._state = [], {}
        while True:
            self._fill(waiting, source)
            if not self._lanes:
                return
            try:
                finished = self._advance()
            except (RuntimeError, MemoryError) as error:
                self._start_over(waiting)
                self.rungs = narrower_after(error, self.rungs, self.oracle.device)
                continue
            yield from finished

    def _fill(self, waiting: deque[Job], source: Iterator[Job]) -> None:
        """Give every free lane the next job."""
        started: list[Lane] = []
        while len(self._lanes) + len(started) < self.rungs[0]:
            job = waiting.popleft() if waiting else next(source, None)
            if job is None:
                break
            if self.attack.objective.targeted and not job.targets:
                raise UserError(
                    f"image '{job.image_id}' names no class to aim at, which attack '{self.attack.name}' needs: pass "
                    "Job(..., targets=(...)), the likeliest wrong classes first, or take an attack without targets"
                )
            started.append(Lane(job, leave=self.leave))
        if started:
            states = [self._begin(lane) for lane in started]
            self._state = _concatenate([self._state, *states] if self._lanes else states)
            self._lanes += started

    def _begin(self, lane: Lane) -> State:
        """Return the state of a lane at the start of its current sub-run."""
        x0 = lane.job.pixels[None].to(self.oracle.dtype)
        draws = generator(self.seed, lane.job.image_id, self.attack.name, lane.run)
        state = catalog.begin(self.attack, x0, self.threat, draws, lane.run)
        return {name: value.to(self.oracle.device) for name, value in state.items()}

    def _advance(self) -> list[Result]:
        """Make one batched pass, take in what it shows, and move every lane on; return the finished jobs."""
        began, used = time.perf_counter(), len(self._lanes)
        rows = self._rows(used)
        case = self._case().rows(rows)
        step = self._spread([lane.step for lane in self._lanes])[rows]
        state = self._state if len(rows) == used else {name: value[rows] for name, value in self._state.items()}
        gradient = self.attack.uses_gradient
        answer, loss, grad = self._look(state["x"], case, batch_sizes(self.rungs, used), gradient=gradient)
        outcomes = self._observe(state, answer, used, passes=self.oracle.look_passes * (2 if gradient else 1))
        state = catalog.advance(self.attack, state, loss, grad, step, self.threat)
        self._state = {name: value[:used] for name, value in state.items()}
        self._move_on(outcomes)
        share = (time.perf_counter() - began) / used
        for lane in self._lanes:
            lane.seconds += share
        if self._on_pass is not None:
            self._on_pass(used, used * self.oracle.look_passes * (2 if gradient else 1))
        return self._retire(outcomes)

    def _rows(self, used: int) -> Tensor:
        """Return row numbers that fill allowed batches, the spare rows repeating occupied lanes."""
        return torch.arange(sum(batch_sizes(self.rungs, used)), device=self.oracle.device) % used

    def _look(self, x: Tensor, case: Case, sizes: tuple[int, ...], *, gradient: bool) -> tuple[Answer, Tensor, Tensor]:
        """Look at points in batches of these sizes; rows do not depend on the batch that they are in."""
        rows = torch.arange(len(x), device=x.device).split(list(sizes))
        parts = [
            self.oracle.look(x[part], self.goal, self.attack.objective, case.rows(part), gradient=gradient)
            for part in rows
        ]
        if len(parts) == 1:
            return parts[0]
        answers, losses, grads = zip(*parts, strict=True)
        return Answer.join(answers), torch.cat(losses), torch.cat(grads)

    def _spread(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.oracle.device)

    def _case(self) -> Case:
        """Return what the goal has to know of the occupied lanes."""
        references = [lane.job.reference for lane in self._lanes if lane.job.reference is not None]
        return Case(
            label=self._spread([lane.job.label for lane in self._lanes]),
            target=self._spread([lane.target(self.attack) for lane in self._lanes]),
            reference=torch.stack(references).to(self.oracle.device, self.oracle.dtype) if references else None,
        )

    def _observe(self, state: State, answer: Answer, used: int, *, passes: int) -> list[str | None]:
        """Show every lane its answer; an apparent success that is not final gets a second look first."""
        for lane in self._lanes:
            lane.passes += passes
        x = state["x"]
        # A user's attack may say that it stays in the ball; only what lies there counts all the same.
        measured = self.attack.leaves_ball or catalog.is_foreign(self.attack)
        counts = _inside(x, state["x0"], self.threat) if measured else torch.ones_like(answer.reached)
        counts |= ~answer.finite
        if not self.oracle.confirmed:
            doubtful = torch.nonzero(((answer.reached & counts) | ~answer.finite)[:used]).flatten()
            if len(doubtful):
                claimed = answer.reached[doubtful]
                answer = answer.replaced(doubtful, self._confirm(x[doubtful], doubtful.tolist()))
                self.claimed += int(claimed.sum())
                self.upheld += int((claimed & answer.reached[doubtful]).sum())
        facts = zip(self._lanes, x[:used], _facts(answer)[:used], counts[:used].tolist(), strict=True)
        return [lane.observe(point, fact) if inside else None for lane, point, fact, inside in facts]

    def _confirm(self, x: Tensor, rows: list[int]) -> Answer:
        """Return final answers at some lanes' points, from a batch of an allowed shape."""
        for row in rows:
            self._lanes[row].passes += self.oracle.draws
        spare = torch.arange(smallest(self.rungs, len(x)), device=x.device) % len(x)
        case = self._case().rows(self._spread(rows)[spare])
        return self.oracle.judge(x[spare], self.goal, case).head(len(x))

    def _move_on(self, outcomes: list[str | None]) -> None:
        """Advance the counters of undecided lanes; a lane whose budget is spent gets its outcome, in place."""
        ended = self._state[DONE].tolist() if DONE in self._state else [False] * len(self._lanes)
        closed = []
        for row, (lane, end) in enumerate(zip(self._lanes, ended, strict=True)):
            if outcomes[row] is None:
                outcomes[row] = lane.move_on(self.attack, ended=end)
                if outcomes[row] is not None:
                    closed.append(row)
        if closed and not self.oracle.confirmed:
            self._reconsider(closed, outcomes)

    def _reconsider(self, rows: list[int], outcomes: list[str | None]) -> None:
        """Take a final look at the recorded points of images that came to their end without a confirmed success."""
        points = [self._lanes[row].best_x for row in rows]
        x = torch.stack([point for point in points if point is not None])
        for row, fact in zip(rows, _facts(self._confirm(x, rows)), strict=True):
            outcomes[row] = self._lanes[row].reconsider(fact) or ROBUST

    def _retire(self, outcomes: list[str | None]) -> list[Result]:
        """Turn decided lanes into results, start the next sub-run of others, and keep the rest."""
        results, kept = [], []
        for row, (lane, outcome) in enumerate(zip(self._lanes, outcomes, strict=True)):
            if outcome is not None:
                results.append(lane.result(outcome))
                continue
            kept.append(row)
            if lane.step == RESTART:
                lane.step = 0
                for name, value in self._begin(lane).items():
                    self._state[name][row] = value[0]
        if results:
            chosen = torch.tensor(kept, dtype=torch.int64, device=self.oracle.device)
            self._state = {name: value[chosen] for name, value in self._state.items()}
            self._lanes = [self._lanes[row] for row in kept]
        return results

    def _start_over(self, waiting: deque[Job]) -> None:
        """Put the jobs in flight back to the waiting ones; they will have the same draws."""
        waiting.extendleft(lane.job for lane in reversed(self._lanes))
        self._lanes, self._state = [], {}


def _facts(answer: Answer) -> list[Fact]:
    """Return the rows of an answer, moved off the device at once."""
    columns = [getattr(answer, name).tolist() for name in answer.__dataclass_fields__]
    columns[-1] = [None if value != value else value for value in columns[-1]]  # no cosine: equal facts stay equal
    return [Fact(*row) for row in zip(*columns, strict=True)]


def _inside(x: Tensor, x0: Tensor, threat: ThreatModel) -> Tensor:
    """Return which images lie in the ball around their clean image, measured in float64, and in [0, 1]."""
    norm = lengths(x.double() - x0.double(), threat.norm)
    flat = x.flatten(1)
    return (norm <= threat.eps) & (flat.amin(1) >= 0) & (flat.amax(1) <= 1)


def _concatenate(states: Sequence[State]) -> State:
    """Join lane states along the lane dimension."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}
