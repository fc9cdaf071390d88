"""Lanes: full, fixed-shape batches in which every image advances on its own and leaves once its answer is known.

A batched pass costs the same whether its rows matter or not, so the engine keeps the rows busy: a lane whose image is
fooled, or has used up its budget, is refilled from the queue before the next pass. Every random draw comes from
(seed, image, attack, sub-run), so an image's answer does not depend on its neighbours, its lane or the order.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from robustvlm.attacks import catalog
from robustvlm.attacks.base import BEYOND, DONE, FAILED, FOOLED, ROBUST, Job, LaneAttack, Result, State
from robustvlm.attacks.goals import Case, Goal, Misclassify
from robustvlm.attacks.lanes import Fact, Image, Lane
from robustvlm.attacks.objectives import Mixture
from robustvlm.attacks.oracle import Answer, Oracle
from robustvlm.attacks.pool import Course, Pool, Source, indices
from robustvlm.attacks.threat import ThreatModel, lengths
from robustvlm.core.batches import SteadySizes, batch_sizes, smallest
from robustvlm.core.device import fetched, sent
from robustvlm.errors import UserError

# Lanes: full, fixed-shape batches in which every image advances on its own and leaves as soon as its answer is known

# Answers at the points of a batch, losses, and gradients (empty where none were asked for).
Look = tuple[Answer, Tensor, Tensor]


class LaneEngine:
    """Runs one attack, or several one after the other, over a stream of jobs and yields their results as they finish.

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
        then: attacks that images go on to, one after the other, unless they have left; all share the batches, so all
            of them take gradients, or none does. Every result names its attack and is that of the attack run by itself.

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
        then: Sequence[LaneAttack] = (),
    ) -> None:
        self.oracle, self.threat = oracle, threat
        self.goal, self.leave = goal or Misclassify(), leave
        attacks = [self._fit(item) for item in (attack, *then)]
        self.attack = attacks[0]
        self._objectives = tuple(
            item.objective.at_boundary if item.walks_boundary else item.objective for item in attacks
        )
        if any(item.uses_gradient != self.attack.uses_gradient for item in attacks):
            raise UserError("attacks that share batches must all take gradients, or none of them: run the others apart")
        self.sizes = rungs if isinstance(rungs, SteadySizes) else SteadySizes(tuple(rungs) or (lanes,))
        self.claimed = self.upheld = 0
        self._on_pass = on_pass
        self._pool = Pool(attacks, threat, seed=seed, leave=leave, device=oracle.device, dtype=oracle.dtype)
        self._claims: list[int] = []  # rows whose success got a second look in this pass
        # Rows that got one, with the margin that the first look showed; None where every look is final.
        self._decided: dict[int, float] | None = None if oracle.confirmed else {}

    def _fit(self, attack: LaneAttack) -> LaneAttack:
        attack = attack if self.leave and self.goal.tells(attack.objective) else attack.exhaustive()
        return attack.away_from_image() if self.goal.still_at_image else attack

    def run(self, jobs: Iterable[Job], *more: Source) -> Iterator[Result]:
        """Attack every job; results come in order of completion.

        Args:
            more: for each attack of `then`, what gives its jobs; asked once the one before has no more of them, and
                then to leave out the images that are not through with it: they come by themselves. Without, all do,
                and the engine holds every image that waits.
        """
        pool = self._pool
        if more and len(more) != len(pool.courses) - 1:
            raise UserError(f"expected a source of jobs for each of {len(pool.courses) - 1} attacks, got {len(more)}")
        pool.open([lambda: jobs, *(more or [None] * (len(pool.courses) - 1))])
        while True:
            pool.fill(self.rungs)
            if not pool.active:
                return
            try:
                finished = self._advance()
            except (RuntimeError, MemoryError) as error:
                pool.start_over()
                self.sizes.narrow(error, self.oracle.device)
                continue
            yield from finished

    @property
    def rungs(self) -> tuple[int, ...]:
        """The batch sizes in use, descending."""
        return self.sizes.steady

    def _advance(self) -> list[Result]:
        """Make one batched pass, take in what it shows, and move every lane on; return the finished jobs.

        The host waits for a GPU once for what the pass shows, and once more for the points of sub-runs that end. A
        success that is not final asks for one more, before its second look; attacks may ask in their own `advance`, and
        where points were foreseen, it is asked twice for each turn of them that lanes have come to.
        """
        # Those of a pass that memory ran out in are of other rows.
        self._claims, self._decided = [], None if self.oracle.confirmed else {}
        began, lanes, device = time.perf_counter(), self._pool.lanes, self.oracle.device
        used = len(lanes)
        sizes = batch_sizes(self.rungs, used)
        places = torch.arange(sum(sizes), device=device)
        rows = places % used  # spare rows repeat occupied lanes, at the point that is foreseen for them or the same
        cases, steps = self._case(lanes, [lane.step for lane in lanes])
        case, step = cases.rows(rows), steps[rows]
        active = self._pool.active
        states = self._states(active, rows)
        points, ahead = self._points(active, states, rows, step + places // used - 1)
        aims = Mixture(
            self._objectives,
            [lanes[row % used].image.place for row in range(len(rows))],
            self._walking(active, states, rows),
        )
        alone = self._look_alone(points, case, aims, used)
        answer, loss, grad = look = self._look(points, case, aims, sizes)
        if alone is not None:
            self.sizes.note(len(alone[1]), agree=_alike(alone, look), numbers=_numbers(alone, used))
        for lane in lanes:
            lane.passes += self._passes_per_look
        # A user's attack may change its points in place.
        x = points[:used].clone() if any(catalog.is_foreign(course.attack) for course in active) else points[:used]
        final, inside = self._confirmed(states, answer.head(used), x)
        first = 0
        for course, state in zip(active, states, strict=True):
            here = slice(first, first + len(state["x"]))
            moved = catalog.advance(course.attack, state, loss[here], grad[here], step[here], self.threat)
            course.state = {name: value[: len(course.lanes)] for name, value in moved.items()}
            first += len(course.lanes)
        ended = self._observe(list(range(used)), x, final, inside)
        if ahead:
            self._look_back(points, answer, loss, steps, ended)
        share = (time.perf_counter() - began) / used
        for lane in lanes:
            lane.seconds += share
        told = sum(lane.untold() for lane in lanes if lane.needed)
        results, counted = self._pool.move_on(ended, self._reconsider)
        if self._on_pass is not None:
            self._on_pass(used, told + sum(lane.untold() for lane in counted))
        return results

    @property
    def _passes_per_look(self) -> int:
        return self.oracle.look_passes * (2 if self.attack.uses_gradient else 1)

    def _states(self, active: Sequence[Course], rows: Tensor) -> list[State]:
        """Return what each attack knows of its rows; an attack that has the batch to itself also has the spare rows."""
        if len(active) > 1 or len(rows) == len(active[0].lanes):
            return [course.state for course in active]
        return [{name: value[rows] for name, value in active[0].state.items()}]

    @staticmethod
    def _walking(active: Sequence[Course], states: Sequence[State], rows: Tensor) -> Tensor | None:
        """Return which rows walk along the boundary, bool [B], or None where no attack does."""
        known = [course.attack.rows_walking(state) for course, state in zip(active, states, strict=True)]
        if all(one is None for one in known):
            return None
        none = (torch.zeros(len(state["x"]), dtype=torch.bool, device=rows.device) for state in states)
        flags = torch.cat([one if one is not None else other for one, other in zip(known, none, strict=True)])
        return flags if len(flags) == len(rows) else flags[rows]

    def _points(
        self, active: Sequence[Course], states: Sequence[State], rows: Tensor, step: Tensor
    ) -> tuple[Tensor, bool]:
        """Return the points to look at, and whether spare rows hold those that lanes are likely to come to next.

        Args:
            step: after how many steps the point is foreseen that a spare row may hold.
        """
        if len(active) > 1:
            return torch.cat([state["x"] for state in states])[rows], False
        attack, state, used = active[0].attack, states[0], len(active[0].lanes)
        if len(rows) == used or not self.oracle.confirmed or catalog.is_foreign(attack):
            return state["x"], False
        ahead = attack.foresee({name: value[used:] for name, value in state.items()}, step[used:], self.threat)
        return (state["x"], False) if ahead is None else (torch.cat([state["x"][:used], ahead]), True)

    def _look_back(self, points: Tensor, answer: Answer, loss: Tensor, steps: Tensor, ended: list[bool]) -> None:
        """Take in the points of spare rows that lanes have come to, as if each had been looked at in its turn."""
        (course,) = self._pool.active
        going, used = list(range(len(course.lanes))), len(course.lanes)
        for turn, first in enumerate(range(used, len(points), used), start=1):
            going = [row for row in going if course.lanes[row].goes_on and not ended[row] and first + row < len(points)]
            if not going:
                return
            rows = indices(going, points.device)
            came = (course.state["x"][rows] == points[rows + first]).flatten(1).all(1)
            going = [row for row, met in zip(going, fetched([came])[0], strict=True) if met]
            if not going:
                return
            rows = indices(going, points.device)
            x, seen = points[rows + first], answer.rows(rows + first)
            for row in going:
                course.lanes[row].step += 1
                course.lanes[row].passes += self._passes_per_look
            state = {name: value[rows] for name, value in course.state.items()}
            step = steps[rows] + turn
            moved = catalog.advance(course.attack, state, loss[rows + first], loss.new_zeros(0), step, self.threat)
            for name, value in moved.items():
                course.state[name] = course.state[name].index_copy(0, rows, value)
            for row, end in zip(going, self._observe(going, x, seen, torch.ones_like(seen.reached)), strict=True):
                ended[row] = end

    def _look(self, x: Tensor, case: Case, aims: Mixture, sizes: Sequence[int]) -> Look:
        """Look at points in batches of these sizes; rows do not depend on the batch that they are in."""
        parts, first = list[Look](), 0
        for size in sizes:
            rows = torch.arange(first, first + size, device=x.device)
            aim = aims.rows(first, first + size)
            gradient = self.attack.uses_gradient
            parts.append(self.oracle.look(x[first : first + size], self.goal, aim, case.rows(rows), gradient=gradient))
            first += size
        if len(parts) == 1:
            return parts[0]
        answers, losses, grads = zip(*parts, strict=True)
        return Answer.join(answers), torch.cat(losses), torch.cat(grads)

    def _look_alone(self, x: Tensor, case: Case, aims: Mixture, used: int) -> Look | None:
        """Look at the first rows in a smaller batch, once spare rows have cost as much as this question."""
        size = self.sizes.worth_trying(used, len(x)) if self.oracle.confirmed else None
        if size is None:
            return None
        with self.oracle.made_for("questions"):
            return self._look(x[:size], case.rows(torch.arange(size, device=x.device)), aims, (size,))

    def _case(self, lanes: Sequence[Lane], steps: Sequence[int]) -> tuple[Case, Tensor]:
        """Return what the goal has to know of lanes, and their steps."""
        jobs = [lane.image.job for lane in lanes]
        references = [job.reference for job in jobs if job.reference is not None]
        numbers = [[job.label for job in jobs], [lane.target for lane in lanes], list(steps)]
        label, target, step = sent(torch.tensor(numbers, dtype=torch.int64), self.oracle.device)
        reference = sent(torch.stack(references), self.oracle.device, self.oracle.dtype) if references else None
        return Case(label=label, target=target, reference=reference), step

    def _confirmed(self, states: Sequence[State], answer: Answer, x: Tensor) -> tuple[Answer, Tensor]:
        """Return final answers at the points [L, ...] and which of them count; what is not final gets a second look.

        Outside the ball nothing counts: what the model says there, or fails to say, is no fact about the image.
        """
        counts, lanes = torch.ones_like(answer.reached), self._pool.lanes
        first = 0
        for course, state in zip(self._pool.active, states, strict=True):
            after = first + len(course.lanes)
            # A user's attack may say that it stays in the ball; only what lies there counts all the same.
            if course.attack.leaves_ball or catalog.is_foreign(course.attack):
                counts[first:after] = _inside(x[first:after], state["x0"][: after - first], self.threat)
            first = after
        if self.oracle.confirmed:
            return answer, counts
        reached, broken, looks = fetched([answer.reached & counts, ~answer.finite & counts, answer.margin])
        # Where an image has a success, further ones are decided at its end: the best of them alone.
        wanted = [bool(said) and not lane.best.upheld for said, lane in zip(reached, lanes, strict=True)]
        rows = [row for row, want in enumerate(wanted) if want or broken[row]]
        if not rows:
            return answer, counts
        chosen = indices(rows, self.oracle.device)
        final, spent = self._confirm(x[chosen], [lanes[row] for row in rows])
        for row, draws in zip(rows, spent, strict=True):
            lanes[row].passes += draws
        self._claims, self._decided = [row for row in rows if wanted[row]], {row: looks[row] for row in rows}
        return answer.replaced(chosen, final), counts

    def _confirm(self, x: Tensor, lanes: Sequence[Lane]) -> tuple[Answer, list[int]]:
        """Return final answers at points of these lanes, from a batch of an allowed shape, and the draws for each."""
        spare = torch.arange(smallest(self.rungs, len(x)), device=x.device) % len(x)
        case, _ = self._case(lanes, [0] * len(lanes))
        answer, spent = self.oracle.decide(x[spare], self.goal, case.rows(spare))
        draws = spent[: len(x)].tolist() if self.oracle.upholding else [self.oracle.draws] * len(x)
        return answer.head(len(x)), draws

    def _observe(self, rows: Sequence[int], x: Tensor, answer: Answer, inside: Tensor) -> list[bool]:
        """Show lanes their points and what was found there; return which lanes' attack has come to an end."""
        every = self._pool.lanes
        lanes = [every[row] for row in rows]
        more = [inside, *self._said(rows, torch.zeros_like(inside))]
        far = x.device.type == "cuda"
        if far:  # elsewhere points are compared one by one, and only where it matters
            pairs = zip(x, lanes, strict=True)
            best = torch.stack([point if lane.best.x is None else lane.best.x for point, lane in pairs])
            more.append((x == best).flatten(1).all(1))
        facts, (counts, ended, radii, walking, *met) = _facts(answer, more, decided=self._decided)
        self.claimed += len(self._claims)
        self.upheld += sum(facts[row].reached for row in self._claims)
        self._claims = []
        for row, lane in enumerate(lanes):
            if counts[row]:
                lane.observe(x[row], facts[row], bool(met[0][row]) if met else None)
            if ended[row] and radii[row] > self.threat.eps:
                lane.beyond = radii[row]
            lane.walked = not walking[row]
        return [bool(end) for end in ended]

    def _said(self, rows: Sequence[int], nothing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where attacks say that sub-runs are over, within which radius classes are out of reach, who walks."""
        ends, radii, walking = list[Tensor](), list[Tensor](), list[Tensor]()
        for course in self._pool.active:
            none = nothing.new_zeros(len(course.lanes))
            ends.append(course.state.get(DONE, none))
            # What a user's attack says of classes out of reach would spare other attacks their own look.
            radii.append(none if catalog.is_foreign(course.attack) else course.state.get(BEYOND, none))
            known = course.attack.rows_walking(course.state)
            walking.append(none | True if known is None else known)  # may walk, for all that is known
        chosen = indices(rows, nothing.device)
        return torch.cat(ends)[chosen], torch.cat(radii)[chosen], torch.cat(walking)[chosen]

    def _reconsider(self, images: Sequence[Image], last: Mapping[int, Lane]) -> None:
        """Take a final look at the points of images that came to their end with more than a confirmed success."""
        open_end = [image for image in images if last[id(image)].outcome is None or image.best.upheld]
        doubtful = [image for image in open_end if image.best.deeper is not None or not image.best.upheld]
        if self.oracle.confirmed or not doubtful:
            return
        lanes, points = [last[id(image)] for image in doubtful], [image.best.points[-1].x for image in doubtful]
        final, spent = self._confirm(sent(torch.stack([x for x in points if x is not None]), self.oracle.device), lanes)
        for image, lane, fact, draws in zip(doubtful, lanes, _facts(final)[0], spent, strict=True):
            lane.passes += draws
            image.passes += draws
            image.best.settle(fact)
            said = image.best.fact
            assert said is not None
            image.outcome = FAILED if not said.finite else FOOLED if said.reached else ROBUST


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


def _told(decided: Mapping[int, float] | None, row: int, margin: float) -> float:
    """Return the margin that a row's first look showed; the final one where that was none, or no number."""
    look = margin if decided is None else decided.get(row, margin)
    return look if look == look else margin


def _facts(
    answer: Answer, more: Sequence[Tensor] = (), *, decided: Mapping[int, float] | None = None
) -> tuple[list[Fact], list[list[float]]]:
    """Return the rows of an answer and further columns [B], all moved off the device at once.

    Args:
        decided: the rows that are final, with the margins of their first look; None where all are, by their only one.
    """
    names = list(Answer.__dataclass_fields__)
    columns = fetched([*(getattr(answer, name) for name in names), *more])
    facts = [
        # No cosine is None: equal facts stay equal.
        Fact(
            bool(reached),
            margin,
            int(prediction),
            confidence,
            bool(finite),
            None if cosine != cosine else cosine,
            upheld=bool(reached) and (decided is None or row in decided),
            look=_told(decided, row, margin),
        )
        for row, (reached, margin, prediction, confidence, finite, cosine) in enumerate(
            zip(*columns[: len(names)], strict=True)
        )
    ]
    return facts, columns[len(names) :]


def _inside(x: Tensor, x0: Tensor, threat: ThreatModel) -> Tensor:
    """Return which images lie in the ball around their clean image, measured in float64, and in [0, 1]."""
    norm = lengths(x.double() - x0.double(), threat.norm)
    flat = x.flatten(1)
    return (norm <= threat.eps) & (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
