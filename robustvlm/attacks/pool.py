"""What shares the batches: the lanes of one attack or of several, who is given a row next, and who leaves.

Attacks that an image goes through one after the other share the rows: those left at the end of one attack ride with the
first of the next. Rows that would be paid for and not used run ahead: they make sub-runs before their turn, which count
only where one after the other would have come to them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustvlm.attacks import catalog
from robustvlm.attacks.base import FAILED, FOOLED, Job, LaneAttack, Result, State
from robustvlm.attacks.lanes import Image, Lane, bring_home
from robustvlm.attacks.threat import ThreatModel
from robustvlm.core.batches import batch_sizes
from robustvlm.core.device import sent
from robustvlm.core.seeds import generator
from robustvlm.errors import UserError

# Gives the jobs of an attack when its turn to take some comes.
Source = Callable[[], Iterable[Job]]
# Takes a final look at images that have come to their end; the sub-run that ended each, by the image's identity.
Settle = Callable[[Sequence[Image], Mapping[int, Lane]], None]
# The rows by their image's identity and the number of their sub-run.
UnderWay = Mapping[tuple[int, int], Lane]


@dataclass(eq=False)
class Course:
    """One attack of those that share the batches, with its rows.

    Args:
        attack: the attack; place: its number among those that share.
        source: gives its jobs; None where all of them come from the attack before.
        dry: its source has no more of them.
        waiting: images that wait for a row. lanes: its rows. state: what the attack remembers of them.
    """

    attack: LaneAttack
    place: int
    source: Source | None = None
    dry: bool = False
    waiting: deque[Image] = field(default_factory=deque)
    lanes: list[Lane] = field(default_factory=list)
    state: State = field(default_factory=dict)
    _jobs: Iterator[Job] | None = None

    def image(self, job: Job) -> Image:
        """Return a job at its first sub-run."""
        if self.attack.objective.targeted and not job.targets:
            raise UserError(
                f"image '{job.image_id}' names no class to aim at, which attack '{self.attack.name}' needs: pass "
                "Job(..., targets=(...)), the likeliest wrong classes first, or take an attack without targets"
            )
        return Image(job, self.attack.n_runs(len(job.targets) + 1), place=self.place)

    def next_image(self) -> Image | None:
        """Return the next image that needs a row, None when there is none for now."""
        if self.waiting:
            return self.waiting.popleft()
        if self._jobs is None:
            self._jobs = iter(self.source() if self.source is not None else ())
        job = None if self.dry else next(self._jobs, None)
        self.dry = job is None
        return None if job is None else self.image(job)

    def join(self, lanes: Sequence[Lane], state: State) -> None:
        """Take up lanes with their state at the start."""
        self.state = concatenate([self.state, state]) if self.lanes else state
        self.lanes += lanes

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Free all other rows."""
        if len(rows) < len(self.lanes):
            chosen = indices(rows, device)
            self.state = {name: value[chosen] for name, value in self.state.items()}
            self.lanes = [self.lanes[row] for row in rows]


@dataclass(frozen=True, eq=False)
class _Ahead:
    """A sub-run that may run ahead of its turn.

    Args:
        image: or its follower in an attack to come; run: the number of the sub-run.
        earlier: the same image in the attacks that it is to go through before.
        long: it is known to be long. before: how many sub-runs come before it; place: breaks ties.
    """

    image: Image
    run: int
    earlier: tuple[Image, ...]
    long: bool
    before: int
    place: int

    @property
    def order(self) -> tuple[bool, int, int]:
        """What is to run ahead first is lowest."""
        return not self.long, self.before, self.place

    def told(self) -> tuple[Image, int]:
        """Return image and number, the image knowing what the attacks before have shown."""
        for one in self.earlier:
            self.image.job = _told(self.image.job, *one.shown)
        return self.image, self.run


class Pool:
    """The rows of the batches, shared by attacks that images go through in this order.

    Args:
        attacks: in their order; threat: the ball; seed: run seed; leave: see `LaneEngine`.
        device, dtype: of the states.
    """

    def __init__(
        self,
        attacks: Sequence[LaneAttack],
        threat: ThreatModel,
        *,
        seed: int,
        leave: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.threat, self.seed, self.leave, self.device, self.dtype = threat, seed, leave, device, dtype
        self.courses = [Course(attack, place) for place, attack in enumerate(attacks)]
        self._walk_again = sum(attack.walk_points(0) > 0 for attack in attacks) > 1

    @property
    def lanes(self) -> list[Lane]:
        """All rows, attack by attack."""
        return [lane for course in self.courses for lane in course.lanes]

    @property
    def active(self) -> list[Course]:
        """The attacks that have rows."""
        return [course for course in self.courses if course.lanes]

    def open(self, sources: Sequence[Source | None]) -> None:
        """Begin anew with these sources, one for each attack."""
        pairs = zip(self.courses, sources, strict=True)
        self.courses = [Course(course.attack, course.place, source) for course, source in pairs]

    def start_over(self) -> None:
        """Put the images in flight back to the waiting ones; they will have the same draws."""
        back: set[int] = set()
        for course in self.courses:
            flying = [lane.image for lane in course.lanes if not lane.image.early]
            # Where memory ran out as an image was handed on, it is still with the attack before.
            images = [one for one in dict.fromkeys([*flying, *course.waiting]) if one.job.index not in back]
            back.update(image.job.index for image in images)
            course.waiting = deque(course.image(image.job) for image in images)
            course.lanes, course.state = [], {}

    def fill(self, rungs: Sequence[int]) -> None:
        """Give every free row the next image, of the earliest attack that has one; what is paid for runs ahead."""
        started: list[Lane] = []
        needed = sum(lane.needed for lane in self.lanes)
        for course in self.courses:
            while needed + len(started) < rungs[0] and (image := course.next_image()) is not None:
                started.append(self._lane(image, image.run))
        self._keep(self._affordable(len(started), rungs))
        started += self._ahead(started, rungs)
        for course in self.courses:
            if mine := [lane for lane in started if lane.image.place == course.place]:
                course.join(mine, self._begin(course.attack, mine))

    def move_on(self, ended: Sequence[bool], settle: Settle) -> tuple[list[Result], list[Lane]]:
        """Step the sub-runs on, end those that are through, and begin the next; return results and what counts now."""
        lanes, over = self.lanes, list[int]()
        for row, (lane, end) in enumerate(zip(lanes, ended, strict=True)):
            if lane.goes_on and not end:
                lane.step += 1
            else:
                over.append(row)
        bring_home([lanes[row] for row in over])
        counted = [lane for row in over for lane in lanes[row].image.end(lanes[row])]
        ending = [image for image in dict.fromkeys(lane.image for lane in lanes) if image.outcome is not None]
        results, last = list[Result](), {id(lane.image): lane for lane in counted}
        came: list[Image] = []
        while ending:
            settle(ending, last)
            results += [image.result(self.courses[image.place].attack.name) for image in ending]
            followers = [follower for image in ending if (follower := self._hand_on(image)) is not None]
            begun = [lane for follower in followers for lane in follower.begin()]
            last, counted = {id(lane.image): lane for lane in begun}, counted + begun
            ending = [follower for follower in followers if follower.outcome is not None]
            came += followers
        self._renew(set(over))
        for image in came:
            if image.outcome is None and image.run not in image.running:
                self.courses[image.place].waiting.append(image)
        return results, counted

    def _renew(self, through: set[int]) -> None:
        """Free the rows of sub-runs that are through, or give them to their image's next one."""
        first = 0
        for course in self.courses:
            kept, begun = list[int](), list[int]()
            for row, lane in enumerate(course.lanes):
                image = lane.image
                if image.outcome is not None or image.dropped:
                    continue
                if first + row in through:
                    if image.early or image.run in image.running or image.run in image.waiting:
                        continue  # the sub-run that comes next is being made already, or is not needed by now
                    course.lanes[row] = self._lane(image, image.run)
                    begun.append(row)
                kept.append(row)
            first += len(course.lanes)
            if begun:
                places = indices(begun, self.device)
                for name, value in self._begin(course.attack, [course.lanes[row] for row in begun]).items():
                    course.state[name][places] = value
            course.keep(kept, self.device)

    def _hand_on(self, image: Image) -> Image | None:
        """Return a finished image as it goes on to the next attack; None where it does not, or comes from its source.

        As long as an attack has jobs to come, what is through with it is let go, so that no more images are held than
        there are rows; the source of the next attack gives them again.
        """
        course, follower = self.courses[image.place], image.follower
        following = self.courses[image.place + 1] if image.place + 1 < len(self.courses) else None
        stays = following is None or (self.leave and image.outcome == FOOLED)
        given_again = following is not None and following.source is not None and not course.dry
        # After outputs that are not finite, what sub-runs ahead took for shown does not count.
        if stays or given_again or image.outcome == FAILED:
            image.drop_followers()
            follower = None
        if following is None or stays or given_again:
            return None
        job = _told(image.job, image.beyond)
        if follower is None:
            return following.image(job)
        follower.job = job
        return follower

    def _lane(self, image: Image, run: int) -> Lane:
        attack = self.courses[image.place].attack
        image.running.add(run)
        target = _target(attack, image.job, run)
        known = attack.walk_points(run) > 0 and image.job.beyond.get(target, 0.0) > self.threat.eps
        return Lane(image, run, 1 if known else attack.n_points(), target, leave=self.leave)

    def _affordable(self, started: int, rungs: Sequence[int]) -> list[int]:
        """Return the rows to keep: sub-runs ahead of their turn as long as they fit beside those that are needed."""
        lanes = self.lanes
        room = _spare(rungs, sum(lane.needed for lane in lanes) + started)
        kept = []
        for row, lane in enumerate(lanes):
            fits = lane.needed or (lane.run < lane.image.last and room > 0)
            room -= fits and not lane.needed
            if fits:
                kept.append(row)
            else:  # if it is needed after all, it is made again in its turn, from the same draws
                lane.image.running.discard(lane.run)
        return kept

    def _ahead(self, started: Sequence[Lane], rungs: Sequence[int]) -> list[Lane]:
        """Return sub-runs that rows make before their turn that would be paid for and not used."""
        if any(catalog.is_foreign(course.attack) for course in self.courses):
            return []  # it may not keep its word that a sub-run depends on nothing before it
        lanes = [*self.lanes, *started]
        images, ahead = list(dict.fromkeys(lane.image for lane in lanes if not lane.image.early)), list[Lane]()
        under_way = {(id(lane.image), lane.run): lane for lane in lanes}
        best: dict[int, _Ahead | None] = {}
        for _ in range(_spare(rungs, len(lanes))):
            for place, image in enumerate(images):
                if place not in best:
                    best[place] = self._next_ahead(image, place, under_way)
            able = [one for one in best.values() if one is not None]
            if not able:
                break
            chosen = min(able, key=lambda one: one.order)
            ahead.append(self._lane(*chosen.told()))
            del best[chosen.place]  # what the others may begin does not depend on it
        return ahead

    def _next_ahead(self, image: Image, place: int, under_way: UnderWay) -> _Ahead | None:
        """Return the sub-run of an image that is to run ahead next; `place` of the image among those in flight.

        It is the one whose turn comes soonest. But before these come walks to classes that walks of an attack before
        have not shown to be out of reach: they are long, and begun last they would have the batches to themselves.
        """
        able = self._able(image, place, under_way)
        soonest = next(able, None)
        if soonest is None or soonest.long or not self._walk_again:
            return soonest
        return next((one for one in able if one.long), soonest)

    def _able(self, image: Image, place: int, under_way: UnderWay) -> Iterator[_Ahead]:
        """Yield the sub-runs of an image that nobody makes yet and that may begin, in their turn."""
        before, earlier = 0, list[Image]()
        shown: dict[int, float] = {}  # what attacks before have shown to be out of reach, each class with its radius
        doubtful: set[int] = set()  # classes that walks of attacks before may still show to be out of reach
        walked: set[int] = set()  # those that they go to
        while True:
            attack = self.courses[image.place].attack
            for run in image.open_runs:
                target = _target(attack, image.job, run)
                walks = attack.walk_points(run) > 0
                # A walk is left out where one before has shown its class to be out of reach, so that has to be known.
                if not (walks and target in doubtful):
                    long = walks and target in walked and shown.get(target, 0.0) <= self.threat.eps
                    yield _Ahead(image, run, tuple(earlier), long, before + run - image.run, place)
            if image.last < image.runs or image.place + 1 == len(self.courses):
                return
            if image.follower is None:
                following = self.courses[image.place + 1]
                if following.attack.objective.targeted and not image.job.targets:
                    return  # it is refused in its turn, if that comes
                image.follower = following.image(image.job)
                image.follower.early = True
            for radii in image.shown:
                shown |= {target: max(radius, shown.get(target, 0.0)) for target, radius in radii.items()}
            for target, settled in self._walks(image, under_way):
                walked.add(target)
                if not settled:
                    doubtful.add(target)
            before += image.runs - image.run
            earlier.append(image)
            image = image.follower

    def _walks(self, image: Image, under_way: UnderWay) -> Iterator[tuple[int, bool]]:
        """Yield the classes that an image's attack walks to, and whether all that the walk may show is known."""
        attack = self.courses[image.place].attack
        for run in range(image.runs):
            if walk := attack.walk_points(run):
                lane = under_way.get((id(image), run))
                over = lane is not None and (lane.walked or lane.step >= walk)
                yield _target(attack, image.job, run), run < image.run or run in image.waiting or over

    def _begin(self, attack: LaneAttack, lanes: Sequence[Lane]) -> State:
        """Return the state of lanes at the start of their sub-runs, drawn on the CPU and sent in one piece."""
        states = []
        for lane in lanes:
            job = lane.image.job
            draws = generator(self.seed, job.image_id, attack.name, lane.run)
            x0 = job.pixels[None].to("cpu", self.dtype)
            states.append(attack.told(catalog.begin(attack, x0, self.threat, draws, lane.run), job))
        return {name: sent(value, self.device) for name, value in concatenate(states).items()}

    def _keep(self, rows: Sequence[int]) -> None:
        first = 0
        for course in self.courses:
            after = first + len(course.lanes)
            course.keep([row - first for row in rows if first <= row < after], self.device)
            first = after


def _told(job: Job, *shown: Mapping[int, float]) -> Job:
    """Return a job with what attacks before have shown to be out of reach, each class with its radius."""
    beyond = dict(job.beyond)
    for radii in shown:
        beyond |= {target: max(radius, beyond.get(target, 0.0)) for target, radius in radii.items() if radius}
    return job if beyond == job.beyond else replace(job, beyond=beyond)


def _target(attack: LaneAttack, job: Job, run: int) -> int:
    """Return the class that a sub-run aims at; the label where the objective has no target."""
    if not attack.objective.targeted:
        return job.label
    return job.targets[min(attack.target_rank(run), len(job.targets) - 1)]


def _spare(rungs: Sequence[int], rows: int) -> int:
    return sum(batch_sizes(rungs, rows)) - rows if rows else 0


def indices(rows: Sequence[int], device: torch.device) -> Tensor:
    """Return row numbers on a device, sent at once."""
    return sent(torch.tensor(rows, dtype=torch.int64), device)


def concatenate(states: Sequence[State]) -> State:
    """Join lane states along the lane dimension."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}
