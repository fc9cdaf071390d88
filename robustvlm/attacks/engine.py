"""Lanes: full, fixed-shape batches in which every image advances on its own and leaves once its answer is known.

A batched pass costs the same whether its rows matter or not, so the engine keeps the rows busy: a lane whose image is
fooled, or has used up its budget, is refilled from the queue before the next pass. Every random draw comes from
(seed, image, attack, sub-run), so an image's answer does not depend on its neighbours, its lane or the order.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from robustvlm.attacks import catalog
from robustvlm.attacks.base import BEYOND, DONE, FAILED, FOOLED, ROBUST, Job, LaneAttack, Result, State
from robustvlm.attacks.goals import Case, Goal, Misclassify
from robustvlm.attacks.lanes import Fact, Image, Lane
from robustvlm.attacks.oracle import Answer, Oracle
from robustvlm.attacks.threat import ThreatModel, lengths
from robustvlm.core.batches import SteadySizes, batch_sizes, smallest
from robustvlm.core.device import fetched, sent
from robustvlm.core.seeds import generator
from robustvlm.errors import UserError

# Lanes: full, fixed-shape batches in which every image advances on its own and leaves as soon as its answer is known

# Answers at the points of a batch, losses, and gradients (empty where none were asked for).
Look = tuple[Answer, Tensor, Tensor]


class LaneEngine:
    """Runs one attack over a stream of jobs and yields their results as they finish.

    Args:
        oracle: the model, with its device, precision and pass counter.
        attack: the attack.
        threat: the ball.
        lanes: rows of a full batch.
        seed: run seed.
        rungs: batch sizes, descending and starting with `lanes`, on which the model gives bit-identical rows; the
            smaller ones are used when the queue runs dry, and more of them are found where that pays. A `SteadySizes`
            is kept from attack to attack. Default: full batches only, to begin with.
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
        rungs: Sequence[int] | SteadySizes = (),
        on_pass: Callable[[int, int], None] | None = None,
    ) -> None:
        self.oracle, self.threat, self.seed = oracle, threat, seed
        self.goal, self.leave = goal or Misclassify(), leave
        attack = attack if leave else attack.exhaustive()
        self.attack = attack.away_from_image() if self.goal.still_at_image else attack
        self.sizes = rungs if isinstance(rungs, SteadySizes) else SteadySizes(tuple(rungs) or (lanes,))
        self.claimed = self.upheld = 0
        self._on_pass = on_pass
        self._lanes: list[Lane] = []
        self._state: State = {}
        self._claims: list[int] = []  # rows whose success got a second look in this pass

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
                self.sizes.narrow(error, self.oracle.device)
                continue
            yield from finished

    @property
    def rungs(self) -> tuple[int, ...]:
        """The batch sizes in use, descending."""
        return self.sizes.steady

    def _fill(self, waiting: deque[Job], source: Iterator[Job]) -> None:
        """Give every free lane the next job; when there is none left, rows that are paid for run ahead."""
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
            started.append(self._lane(Image(job, self.attack.n_runs(len(job.targets) + 1)), 0))
        self._keep(self._affordable(len(started)))
        started += self._ahead(started)
        if started:
            begun = self._begin(started)
            self._state = _concatenate([self._state, begun]) if self._lanes else begun
            self._lanes += started

    def _lane(self, image: Image, run: int) -> Lane:
        image.running.add(run)
        target = self._target(image.job, run)
        known = self.attack.walks_from_image(run) and image.job.beyond.get(target, 0.0) > self.threat.eps
        return Lane(image, run, 1 if known else self.attack.n_points(), target, leave=self.leave)

    def _affordable(self, started: int) -> list[int]:
        """Return the rows to keep: sub-runs ahead of their turn as long as they fit beside those that are needed."""
        room = self._spare(sum(lane.needed for lane in self._lanes) + started)
        kept = []
        for row, lane in enumerate(self._lanes):
            fits = lane.needed or (lane.run < lane.image.last and room > 0)
            room -= fits and not lane.needed
            if fits:
                kept.append(row)
            else:  # if it is needed after all, it is made again in its turn, from the same draws
                lane.image.running.discard(lane.run)
        return kept

    def _ahead(self, started: Sequence[Lane]) -> list[Lane]:
        """Return sub-runs that rows make before their turn that would be paid for and not used."""
        if catalog.is_foreign(self.attack):  # it may not keep its word that a sub-run depends on nothing before it
            return []
        lanes = [*self._lanes, *started]
        images, ahead = list(dict.fromkeys(lane.image for lane in lanes)), list[Lane]()
        for _ in range(self._spare(len(lanes))):
            able = [
                (run - image.run, place) for place, image in enumerate(images) if (run := image.next_run) is not None
            ]
            if not able:
                break
            image = images[min(able)[1]]  # the sub-run whose turn comes soonest
            ahead.append(self._lane(image, image.run + min(able)[0]))
        return ahead

    def _spare(self, rows: int) -> int:
        return sum(batch_sizes(self.rungs, rows)) - rows if rows else 0

    def _begin(self, lanes: Sequence[Lane]) -> State:
        """Return the state of lanes at the start of their sub-runs, drawn on the CPU and sent in one piece."""
        states = []
        for lane in lanes:
            job = lane.image.job
            draws = generator(self.seed, job.image_id, self.attack.name, lane.run)
            x0 = job.pixels[None].to("cpu", self.oracle.dtype)
            states.append(catalog.begin(self.attack, x0, self.threat, draws, lane.run))
        return {name: sent(value, self.oracle.device) for name, value in _concatenate(states).items()}

    def _advance(self) -> list[Result]:
        """Make one batched pass, take in what it shows, and move every lane on; return the finished jobs.

        The host waits for a GPU once for what the pass shows, and once more for the points of sub-runs that end. A
        success that is not final asks for one more, before its second look; attacks may ask in their own `advance`.
        """
        began, used = time.perf_counter(), len(self._lanes)
        sizes = batch_sizes(self.rungs, used)
        rows = torch.arange(sum(sizes), device=self.oracle.device) % used  # spare rows repeat occupied lanes
        lanes, steps = self._case(self._lanes, [lane.step for lane in self._lanes])
        case, step = lanes.rows(rows), steps[rows]
        state = self._state if len(rows) == used else {name: value[rows] for name, value in self._state.items()}
        gradient = self.attack.uses_gradient
        alone = self._look_alone(state["x"], case, gradient=gradient)
        answer, loss, grad = look = self._look(state["x"], case, sizes, gradient=gradient)
        if alone is not None:
            self.sizes.note(len(alone[1]), agree=_alike(alone, look), numbers=_numbers(alone, used))
        for lane in self._lanes:
            lane.passes += self.oracle.look_passes * (2 if gradient else 1)
        # A user's attack may change its points in place.
        x = state["x"][:used].clone() if catalog.is_foreign(self.attack) else state["x"][:used]
        answer, inside = self._confirmed(state, answer.head(used), x)
        state = catalog.advance(self.attack, state, loss, grad, step, self.threat)
        self._state = {name: value[:used] for name, value in state.items()}
        ended = self._observe(x, answer, inside)
        share = (time.perf_counter() - began) / used
        for lane in self._lanes:
            lane.seconds += share
        told = sum(lane.untold() for lane in self._lanes if lane.needed)
        results, counted = self._move_on(ended)
        if self._on_pass is not None:
            self._on_pass(used, told + sum(lane.untold() for lane in counted))
        return results

    def _look(self, x: Tensor, case: Case, sizes: Sequence[int], *, gradient: bool) -> Look:
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

    def _look_alone(self, x: Tensor, case: Case, *, gradient: bool) -> Look | None:
        """Look at the first rows in a smaller batch, once spare rows have cost as much as this question."""
        size = self.sizes.worth_trying(len(self._lanes), len(x)) if self.oracle.confirmed else None
        if size is None:
            return None
        with self.oracle.made_for("questions"):
            return self._look(x[:size], case.rows(torch.arange(size, device=x.device)), (size,), gradient=gradient)

    def _spread(self, *values: list[int]) -> Tensor:
        """Return rows of whole numbers on the device, sent at once."""
        return sent(torch.tensor(values, dtype=torch.int64), self.oracle.device)

    def _case(self, lanes: Sequence[Lane], steps: list[int]) -> tuple[Case, Tensor]:
        """Return what the goal has to know of lanes, and their steps."""
        jobs = [lane.image.job for lane in lanes]
        references = [job.reference for job in jobs if job.reference is not None]
        label, target, step = self._spread([job.label for job in jobs], [lane.target for lane in lanes], steps)
        reference = sent(torch.stack(references), self.oracle.device, self.oracle.dtype) if references else None
        return Case(label=label, target=target, reference=reference), step

    def _target(self, job: Job, run: int) -> int:
        """Return the class that a sub-run aims at; the label where the objective has no target."""
        if not self.attack.objective.targeted:
            return job.label
        return job.targets[min(self.attack.target_rank(run), len(job.targets) - 1)]

    def _confirmed(self, state: State, answer: Answer, x: Tensor) -> tuple[Answer, Tensor]:
        """Return final answers at the points [L, ...] and which of them count; what is not final gets a second look."""
        # A user's attack may say that it stays in the ball; only what lies there counts all the same.
        measured = self.attack.leaves_ball or catalog.is_foreign(self.attack)
        counts = _inside(x, state["x0"][: len(x)], self.threat) if measured else torch.ones_like(answer.reached)
        counts |= ~answer.finite
        if self.oracle.confirmed:
            return answer, counts
        doubtful, reached = fetched([(answer.reached & counts) | ~answer.finite, answer.reached])
        rows = [row for row, doubt in enumerate(doubtful) if doubt]
        if not rows:
            return answer, counts
        for row in rows:
            self._lanes[row].passes += self.oracle.draws
        chosen = self._spread(rows)[0]
        final = self._confirm(x[chosen], [self._lanes[row] for row in rows])
        self._claims = [row for row in rows if reached[row]]
        return answer.replaced(chosen, final), counts

    def _confirm(self, x: Tensor, lanes: Sequence[Lane]) -> Answer:
        """Return final answers at points of these lanes, from a batch of an allowed shape."""
        spare = torch.arange(smallest(self.rungs, len(x)), device=x.device) % len(x)
        case, _ = self._case(lanes, [0] * len(lanes))
        return self.oracle.judge(x[spare], self.goal, case.rows(spare)).head(len(x))

    def _observe(self, x: Tensor, answer: Answer, inside: Tensor) -> list[bool]:
        """Show every lane its point and its answer; return which lanes' attack has come to an end."""
        nothing = torch.zeros_like(inside)
        # What a user's attack says of classes out of reach would spare other attacks their own look.
        beyond = nothing if catalog.is_foreign(self.attack) else self._state.get(BEYOND, nothing)
        more = [inside, self._state.get(DONE, nothing), beyond]
        far = x.device.type == "cuda"
        if far:  # elsewhere points are compared one by one, and only where it matters
            best = torch.stack([x[row] if lane.best.x is None else lane.best.x for row, lane in enumerate(self._lanes)])
            more.append((x == best).flatten(1).all(1))
        facts, (counts, ended, radii, *met) = _facts(answer, more)
        self.claimed += len(self._claims)
        self.upheld += sum(facts[row].reached for row in self._claims)
        self._claims = []
        for row, lane in enumerate(self._lanes):
            if counts[row]:
                lane.observe(x[row], facts[row], bool(met[0][row]) if met else None)
            if ended[row] and radii[row] > self.threat.eps:
                lane.beyond = radii[row]
        return [bool(end) for end in ended]

    def _move_on(self, ended: Sequence[bool]) -> tuple[list[Result], list[Lane]]:
        """Step the sub-runs on, end those that are through, and begin the next; return results and what counts now."""
        counted: list[Lane] = []
        over: list[int] = []
        for row, (lane, end) in enumerate(zip(self._lanes, ended, strict=True)):
            if lane.outcome is None and lane.step + 1 < lane.points and not end:
                lane.step += 1
            else:
                over.append(row)
        _bring_home([self._lanes[row] for row in over])
        for row in over:
            counted += self._lanes[row].image.end(self._lanes[row])
        images, through = {id(lane.image): lane.image for lane in self._lanes}, set(over)
        done = [image for image in images.values() if image.outcome is not None]
        self._reconsider(done, {id(lane.image): lane for lane in counted})
        kept, begun = [], []
        for row, lane in enumerate(self._lanes):
            if lane.image.outcome is not None:
                continue
            if row in through:
                if lane.image.run in lane.image.running or lane.image.run in lane.image.waiting:
                    continue  # the sub-run that comes next is being made already
                self._lanes[row] = self._lane(lane.image, lane.image.run)
                begun.append(row)
            kept.append(row)
        if begun:
            places = self._spread(begun)[0]
            for name, value in self._begin([self._lanes[row] for row in begun]).items():
                self._state[name][places] = value
        self._keep(kept)
        return [image.result() for image in done], counted

    def _reconsider(self, images: Sequence[Image], last: dict[int, Lane]) -> None:
        """Take a final look at the recorded points of images that came to their end without a confirmed success."""
        doubtful = [image for image in images if last[id(image)].outcome is None]
        if self.oracle.confirmed or not doubtful:
            return
        lanes = [last[id(image)] for image in doubtful]
        for lane in lanes:
            lane.passes += self.oracle.draws
        x = sent(torch.stack([image.best.x for image in doubtful if image.best.x is not None]), self.oracle.device)
        for image, fact in zip(doubtful, _facts(self._confirm(x, lanes))[0], strict=True):
            image.passes += self.oracle.draws
            image.best.fact = fact
            image.outcome = FAILED if not fact.finite else FOOLED if fact.reached else ROBUST

    def _keep(self, rows: list[int]) -> None:
        """Free all other rows."""
        if len(rows) < len(self._lanes):
            chosen = self._spread(rows)[0]
            self._state = {name: value[chosen] for name, value in self._state.items()}
            self._lanes = [self._lanes[row] for row in rows]

    def _start_over(self, waiting: deque[Job]) -> None:
        """Put the jobs in flight back to the waiting ones; they will have the same draws."""
        jobs = {id(lane.image): lane.image.job for lane in self._lanes}
        waiting.extendleft(reversed(jobs.values()))
        self._lanes, self._state = [], {}


def _alike(alone: Look, look: Look) -> bool:
    """Whether the first rows of a look are the same to the bit as when looked at alone."""
    columns = [(getattr(alone[0], name), getattr(look[0], name)) for name in Answer.__dataclass_fields__]
    columns += zip(alone[1:], look[1:], strict=True)
    same = [(torch.nan_to_num(part) == torch.nan_to_num(whole[: len(part)])).all() for part, whole in columns]
    return bool(torch.stack(same).all())


def _numbers(alone: Look, used: int) -> int:
    """Return how many numbers of a look could have shown a difference: gradients, else losses; zeros show nothing.

    Rows beyond those in use repeat others.
    """
    signal = alone[2] if len(alone[2]) else alone[1]
    return int((signal[:used] != 0).sum())


def _facts(answer: Answer, more: Sequence[Tensor] = ()) -> tuple[list[Fact], list[list[float]]]:
    """Return the rows of an answer and further columns [B], all moved off the device at once."""
    names = list(Answer.__dataclass_fields__)
    columns = fetched([*(getattr(answer, name) for name in names), *more])
    facts = [
        # No cosine is None: equal facts stay equal.
        Fact(bool(reached), margin, int(prediction), confidence, bool(finite), None if cosine != cosine else cosine)
        for reached, margin, prediction, confidence, finite, cosine in zip(*columns[: len(names)], strict=True)
    ]
    return facts, columns[len(names) :]


def _bring_home(lanes: Sequence[Lane]) -> None:
    """Move the recorded points of sub-runs that have ended off a GPU, all in one wait."""
    found = [lane.best for lane in lanes if lane.best.x is not None and lane.best.x.device.type == "cuda"]
    if found:
        points = torch.stack([best.x for best in found if best.x is not None]).cpu()
        for best, point in zip(found, points, strict=True):
            best.x = point


def _inside(x: Tensor, x0: Tensor, threat: ThreatModel) -> Tensor:
    """Return which images lie in the ball around their clean image, measured in float64, and in [0, 1]."""
    norm = lengths(x.double() - x0.double(), threat.norm)
    flat = x.flatten(1)
    return (norm <= threat.eps) & (flat.amin(1) >= 0) & (flat.amax(1) <= 1)


def _concatenate(states: Sequence[State]) -> State:
    """Join lane states along the lane dimension."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}
