"""Lanes: full, fixed-shape batches in which every image advances on its own and leaves as soon as its answer is known.

A batched pass costs the same whether its rows matter or not, so the engine keeps the rows busy: a lane whose image is
fooled, or has used up its budget, is refilled from the queue before the next pass. Every random draw comes from
(seed, image, attack, sub-run), so an image's answer does not depend on its neighbours, its lane or the order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from robustvlm.attacks.base import DONE, LaneAttack, State
from robustvlm.attacks.jobs import ROBUST, Job, Result
from robustvlm.attacks.lane import RESTART, Lane
from robustvlm.attacks.objectives import margin
from robustvlm.attacks.oracle import Oracle
from robustvlm.attacks.threat import ThreatModel
from robustvlm.core.memory import is_out_of_memory
from robustvlm.core.seeds import generator


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
        on_pass: called after every batched pass with the number of occupied lanes.

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
        rungs: Sequence[int] = (),
        on_pass: Callable[[int], None] | None = None,
    ) -> None:
        self.oracle, self.attack, self.threat, self.seed = oracle, attack, threat, seed
        self.rungs = tuple(rungs) or (lanes,)
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
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.rungs[0] == 1:
                    raise
                self._halve(waiting)
                continue
            yield from finished

    def _fill(self, waiting: deque[Job], source: Iterator[Job]) -> None:
        """Give every free lane the next job."""
        started: list[Lane] = []
        while len(self._lanes) + len(started) < self.rungs[0]:
            job = waiting.popleft() if waiting else next(source, None)
            if job is None:
                break
            started.append(Lane(job))
        if started:
            states = [self._begin(lane) for lane in started]
            self._state = _concatenate([self._state, *states] if self._lanes else states)
            self._lanes += started

    def _begin(self, lane: Lane) -> State:
        """Return the state of a lane at the start of its current sub-run."""
        x0 = lane.job.pixels[None].to(self.oracle.dtype)
        draws = generator(self.seed, lane.job.image_id, self.attack.name, lane.run)
        state = self.attack.begin(x0, self.threat, draws)
        return {name: value.to(self.oracle.device) for name, value in state.items()}

    def _advance(self) -> list[Result]:
        """Make one batched pass, take in what it shows, and move every lane on; return the finished jobs."""
        began, used = time.perf_counter(), len(self._lanes)
        rows = self._rows(used)
        label = self._spread([lane.job.label for lane in self._lanes], rows)
        target = self._spread([lane.target(self.attack) for lane in self._lanes], rows)
        step = self._spread([lane.step for lane in self._lanes], rows)
        state = self._state if len(rows) == used else {name: value[rows] for name, value in self._state.items()}
        logits, loss, grad = self.oracle.gradient(state["x"], self.attack.objective, label, target)
        outcomes = self._observe(state["x"][:used], logits[:used], label[:used])
        state = self.attack.advance(state, loss, grad, step, self.threat)
        self._state = {name: value[:used] for name, value in state.items()}
        self._move_on(outcomes, n_classes=logits.shape[1])
        share = (time.perf_counter() - began) / used
        for lane in self._lanes:
            lane.seconds += share
        if self._on_pass is not None:
            self._on_pass(used)
        return self._retire(outcomes)

    def _rows(self, used: int) -> Tensor:
        """Return row numbers that fill the smallest allowed batch, the spare rows repeating occupied lanes."""
        return torch.arange(self._rung(used), device=self.oracle.device) % used

    def _rung(self, used: int) -> int:
        return min(rung for rung in self.rungs if rung >= used)

    def _spread(self, values: list[int], rows: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.oracle.device)[rows]

    def _observe(self, x: Tensor, logits: Tensor, label: Tensor) -> list[str | None]:
        """Show every lane its logits; an apparent success in low precision gets a full-precision second look first."""
        for lane in self._lanes:
            lane.passes += 2
        if not self.oracle.confirmed:
            doubtful = torch.nonzero((logits.argmax(1) != label) | ~logits.isfinite().all(1)).flatten()
            if len(doubtful):
                logits = logits.index_copy(0, doubtful, self._confirm(x[doubtful], doubtful.tolist()))
        return [lane.observe(*seen) for lane, *seen in zip(self._lanes, x, logits, *_facts(logits, label), strict=True)]

    def _confirm(self, x: Tensor, rows: list[int]) -> Tensor:
        """Return full-precision logits of some lanes' points, from a batch of an allowed shape."""
        for row in rows:
            self._lanes[row].passes += 1
        spare = torch.arange(self._rung(len(x)), device=x.device) % len(x)
        return self.oracle.confirm(x[spare])[: len(x)]

    def _move_on(self, outcomes: list[str | None], *, n_classes: int) -> None:
        """Advance the counters of undecided lanes; a lane whose budget is spent becomes robust, in place."""
        cycles = self._state[DONE].tolist() if DONE in self._state else [False] * len(self._lanes)
        for row, (lane, cycle) in enumerate(zip(self._lanes, cycles, strict=True)):
            if outcomes[row] is None:
                outcomes[row] = lane.move_on(self.attack, n_classes, cycle=cycle)
        if not self.oracle.confirmed:
            self._confirm_robust([row for row, outcome in enumerate(outcomes) if outcome == ROBUST], outcomes)

    def _confirm_robust(self, rows: list[int], outcomes: list[str | None]) -> None:
        """State the lowest margin of robust images in full precision; some may turn out to be successes after all."""
        if not rows:
            return
        x = torch.stack([self._lanes[row].best() for row in rows])
        logits = self._confirm(x, rows)
        label = torch.tensor([self._lanes[row].job.label for row in rows], device=logits.device)
        for row, *seen in zip(rows, x, logits, *_facts(logits, label), strict=True):
            self._lanes[row].best_margin = float("inf")
            outcomes[row] = self._lanes[row].observe(*seen) or ROBUST

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

    def _halve(self, waiting: deque[Job]) -> None:
        """Go on with half the lanes after running out of memory; jobs in flight start over, with the same draws."""
        width = self.rungs[0] // 2
        self.rungs = (width, *(rung for rung in self.rungs if rung < width))
        waiting.extendleft(lane.job for lane in reversed(self._lanes))
        self._lanes, self._state = [], {}
        if self.oracle.device.type == "cuda":
            torch.cuda.empty_cache()


def _facts(logits: Tensor, label: Tensor) -> tuple[list[bool], list[int], list[float]]:
    """Return per row: are the logits finite, the predicted class, the margin; moved off the device once."""
    return logits.isfinite().all(1).tolist(), logits.argmax(1).tolist(), margin(logits, label).tolist()


def _concatenate(states: Sequence[State]) -> State:
    """Join lane states along the lane dimension."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}
