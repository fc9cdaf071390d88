"""An attack run from images to a finished folder: clean pass, attacks by stage, checks; resumable throughout.

A stage is one attack at one eps for one goal; stages go by rising eps, then by goal, then in the order the attacks were
named. An image leaves at its first success: it is not attacked again at this or a larger eps, since a perturbation
inside a small ball lies inside every larger one. Attacks of one eps that follow each other share batches where they
can: an image may be in the next one while others are still in this. Goals whose figure of merit is how far an attack
gets (features, the level matrix) let no image leave. Every finished image is a line in the run's journal before its
lane is used again.
"""

import contextlib
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from robustvlm import attacks
from robustvlm.attacks.catalog import Attack, by_gradients, is_foreign
from robustvlm.attacks.probe import settle_draws
from robustvlm.attacks.tensors import brief, needs_briefing
from robustvlm.attacks.threat import ThreatModel
from robustvlm.commands.attack import AttackPlan
from robustvlm.commands.attack.checks import Checks
from robustvlm.commands.attack.cost import Budget, BudgetSpent, MeteredOracle, Speed, Work, estimate
from robustvlm.commands.attack.goal import Aim, CleanPass
from robustvlm.commands.attack.likely import LikelyCost
from robustvlm.commands.attack.store import CLEAN_WRONG, CleanFact, Ledger, Stage, save_pictures
from robustvlm.commands.common import questions
from robustvlm.commands.common.inputs import Images
from robustvlm.core.batches import SteadySizes
from robustvlm.core.framing import Framing
from robustvlm.core.ranks import Ranks
from robustvlm.core.seeds import derive_seed, full_precision_kernels, own_draws
from robustvlm.data.source import DataSource, Unreadable
from robustvlm.report.words import forecast, likely_passes
from robustvlm.runs.records import Check, Drawn, Estimate
from robustvlm.runs.settings import Observer

# An attack run from images to a finished folder: clean pass, attacks by stage, summary, report; resumable throughout

# A killed session loses its count of passes since the last note of it.
_COST_SECONDS = 5.0
# So many times as long as it took to find out what a run will likely cost, that is not asked again.
_PAUSE = 50


class AttackRun:
    """Attacks the images of a source under a plan and keeps all facts in a ledger.

    Args:
        plan: the settings; source: the images; aim: the model and what is wanted of it.
        attacks: the attacks of the plan, in order.
        ledger: the run's record; facts already in it are not found again.
        observer: told about progress.
        framing: how images are brought to the attack's resolution.
        ranks: this process among those that share the work; budget: what the run may cost.
    """

    def __init__(
        self,
        *,
        plan: AttackPlan,
        source: DataSource,
        aim: Aim,
        attacks: Sequence[Attack],
        ledger: Ledger,
        observer: Observer,
        framing: Framing | None = None,
        ranks: Ranks | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.plan, self.source, self.ledger, self.observer = plan, source, ledger, observer
        self.aim, self.ranks, self.budget = aim, ranks or Ranks(), budget or Budget()
        self.oracle = MeteredOracle(
            aim.model,
            budget=self.budget,
            ranks=self.ranks,
            device=plan.device,
            precision=plan.precision,
            seed=plan.seed,
            compiled=plan.compiled,
        )
        self.images = Images(
            source,
            limit=plan.limit,
            resolution=plan.resolution if framing is None else framing.at(plan.resolution),
            ahead=0 if self.oracle.device.type == "cpu" else plan.lanes,
        )
        self.stages = [
            Stage(attack, ThreatModel(plan.norm, eps), text, goal)
            for text, eps in plan.radii
            for goal in aim.goals
            for attack in attacks
        ]
        self.n_targets = max(getattr(attack, "n_targets", None) or 1 for attack in attacks)
        self.clean = CleanPass(
            self.oracle, self.images, aim, ledger=ledger, observer=observer, ranks=self.ranks, n_targets=self.n_targets
        )
        self.checks = Checks(
            plan, self.oracle, aim, self.images, ledger, observer, attacks=attacks, n_targets=self.n_targets
        )
        self._told: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._shown: Stage | None = None
        self._next: list[Stage] = []
        self._left = 0
        self._sizes: dict[bool, SteadySizes] = {}
        self._began = self._noted = self._said = time.monotonic()
        self.likely = LikelyCost(self.ledger, self.oracle, self.stages, leave=aim.leave, everyone=aim.everyone)

    def run(self) -> None:
        """Do what is left to do, as far as the budget goes; every fact goes to the ledger as soon as it is known."""
        with self._session() as found:
            if found is None:
                return
            self.observer.say(forecast(self._forecast(found)))
            for stages in self._sharing(found):
                if self.ledger.stopped:
                    return
                with self._within_budget():
                    self._run_stages(stages, found)
                self._meet()
            if self.ranks.leader and not self.ledger.stopped:
                with self.oracle.made_for("checks"):
                    self.checks.extra(found)

    def estimate(self) -> Estimate | None:
        """Make the clean pass and return what the attacks will cost; None when the budget is spent before."""
        with self._session() as found:
            return None if found is None else self._forecast(found)

    @contextlib.contextmanager
    def _session(self) -> Iterator[attacks.Probe | None]:
        """Question the model and make the clean pass; note at the end, however it comes, what it all has cost."""
        self._began = self._noted = time.monotonic()
        found = None
        try:
            self._meet()
            with self._within_budget():
                self.oracle.meter.require(1)
                with self.oracle.made_for("questions"):
                    found = self._probe()
                with self.oracle.made_for("clean"):
                    self.clean.run(found.rungs)
            self._meet()
            yield None if self.ledger.stopped else found
        finally:
            self._note_cost()

    @contextlib.contextmanager
    def _within_budget(self) -> Iterator[None]:
        """Note where the budget was spent, if it is."""
        try:
            yield
        except BudgetSpent:
            where = "the clean pass" if self._shown is None else self._shown.title
            self.ledger.add_stop(f"the budget of {self.budget.text} was spent in {where}")

    def _meet(self) -> None:
        """Wait for the other processes and learn what they have found; deal out what is left of the budget."""
        self._note_cost()
        self.ledger.meet(self.ranks)
        self.ledger.sync()
        # Nobody goes on and writes before everybody has read, or they would know different things.
        self.ranks.barrier()
        cost = self.ledger.cost
        self.oracle.meter.deal_out(cost.forward_passes + cost.backward_passes)

    def _forecast(self, found: attacks.Probe) -> Estimate:
        """Return what is left to do, in passes and seconds."""
        work = []
        for stage in self.stages:
            wanted = self._remaining(stage)
            targets = max((len(fact.targets) for fact in wanted.values()), default=1)
            attack = stage.attack
            known = attack if isinstance(attack, attacks.LaneAttack) else attack.name
            work.append(Work(known, [(stage.goal.spec, name) for name in wanted], n_targets=targets))
        oracle = self.oracle
        speed = Speed(
            rungs=found.rungs,
            seconds_of=oracle.seconds,
            eot=oracle.eot,
            second_looks=0 if oracle.confirmed else oracle.draws,
            upholding=oracle.upholding,
            ranks=self.ranks.size,
        )
        checks = self.checks.extra_work(work)
        expected = estimate([*work, *checks], speed)
        self.likely.checks = estimate(checks, speed).passes_most
        if self.ranks.leader:
            self.ledger.add_estimate(expected)
        return expected

    def _say_likely(self, *, every: float = 0.0) -> None:
        """Tell what the run will likely cost, unless that was done in the last `every` seconds."""
        now = time.monotonic()
        if self._shown is None or (every and now - self._said < every):
            return
        found = self.likely.now(self._shown)
        done = time.monotonic()
        self._said = done + _PAUSE * (done - now)  # of a large run's time no more than this share is spent on it
        if found is not None:
            self.ledger.add_likely(*found)
            self.observer.advance(0, likely=f"{likely_passes(*found)} passes in all")

    def _passed(self, used: int, passes: int) -> None:
        self.likely.counted += passes
        self.observer.passed(used, passes)

    def _note_cost(self, *, every: float = 0.0) -> None:
        """Record the passes and time of this session so far, unless that was done in the last `every` seconds."""
        now = time.monotonic()
        if now - self._noted >= every:
            self.ledger.add_cost(self.oracle, now - self._began)
            self._noted = now

    def _probe(self) -> attacks.Probe:
        """Question the model on the first images; refuse one whose rows are not independent."""
        first = self.clean.first_images(self.plan.lanes)
        images = torch.stack([picture.pixels for picture in first])
        # Images of unknown classes have no label; what the probe asks does not depend on it.
        label = torch.tensor([max(0, picture.label) for picture in first])
        found, notes = questions.ask(self.oracle, images, label, model=self.plan.model)
        questions.require_independent_rows(found, self.plan.model)
        self._settle_draws(found)
        said = questions.of_probe(found, self.oracle)
        if self.ranks.leader:
            asked = self.checks.questions(images, label, found)
            self.ledger.add_checks([*said, *notes, *self.aim.notes, *asked])
        return found

    def _settle_draws(self, found: attacks.Probe) -> None:
        """Average over the draws of a random model, and judge it by fresh ones."""
        plan = self.plan
        settle_draws(self.oracle, found, eot=plan.eot, draws=plan.draws, eot_if_random=plan.eot_if_random)
        if found.random and self.ranks.leader:
            oracle = self.oracle
            self.ledger.add_drawn(Drawn(eot=oracle.eot, draws=oracle.draws, upholding=oracle.upholding))

    def _sharing(self, found: attacks.Probe) -> list[list[Stage]]:
        """Return the stages in order, those together that share batches."""
        together: list[list[Stage]] = []
        for stage in self.stages:
            if together and self._share_batches(together[-1][-1], stage, found):
                together[-1].append(stage)
            else:
                together.append([stage])
        return together

    def _share_batches(self, a: Stage, b: Stage, found: attacks.Probe) -> bool:
        """Whether images may go on from one stage to the next while others are still in it.

        Several processes deal the images out anew between stages; the draws of a random model depend on the passes
        before; what goals have to know of the clean images is found stage by stage.
        """
        if (a.threat, a.goal) != (b.threat, b.goal) or self.aim.everyone or needs_briefing(a.goal):
            return False
        ours = [stage.attack for stage in (a, b) if isinstance(stage.attack, attacks.LaneAttack)]
        alike = len(ours) == 2 and ours[0].uses_gradient == ours[1].uses_gradient and not any(map(is_foreign, ours))
        return alike and not found.random and self.ranks.size == self.oracle.eot == self.oracle.draws == 1

    def _run_stages(self, stages: Sequence[Stage], found: attacks.Probe) -> None:
        """Run attacks that share batches on every image that still withstands; every one of them gets a row."""
        first, named = stages[0], {stage.attack.name: stage for stage in stages}
        wanted, self._next = self._share(first), list(stages[1:])
        self._show(first, len(wanted))
        if not (wanted or any(self._remaining(stage) for stage in stages[1:])):
            return
        engine = self._engine(stages, found)
        reached: set[int] = set()
        jobs = self._jobs(wanted, first)
        if self.aim.everyone or needs_briefing(first.goal):
            jobs = self._briefed(jobs, first, found, reached)
        later = [partial(self._jobs_after, stages[:place], stages[place]) for place in range(1, len(stages))]
        for result in engine.run(jobs, *later):
            kept = replace(result, outcome=CLEAN_WRONG) if result.job.index in reached else result
            self._keep(kept, named.get(result.attack, first))
        for stage in stages:
            for name, fact in self._remaining(stage).items():
                if stage is not first or name in wanted:
                    self._lose(fact, stage, "it is no longer in the data")
        if self.ranks.size == 1:
            self._say_likely()
        if isinstance(engine, attacks.ExternalEngine):
            self.ledger.add_checks([Check(**asdict(finding)) for finding in engine.findings])

    def _engine(self, stages: Sequence[Stage], found: attacks.Probe) -> attacks.LaneEngine | attacks.ExternalEngine:
        first = stages[0]
        common: dict[str, Any] = {
            "lanes": found.rungs[0],
            "rungs": found.rungs,
            "seed": self.plan.seed,
            "goal": first.goal,
            "on_pass": self._passed,
        }
        if isinstance(first.attack, attacks.ExternalAttack):
            permit = self.oracle.meter.require
            return attacks.ExternalEngine(self.oracle, first.attack, first.threat, permit=permit, **common)
        fit, *then = [
            questions.fit_for(stage.attack, found) for stage in stages if isinstance(stage.attack, attacks.LaneAttack)
        ]
        # What one attack finds out about batch sizes, the next of its kind need not ask again.
        common["rungs"] = self._sizes.setdefault(fit.uses_gradient, SteadySizes(found.rungs))
        return attacks.LaneEngine(self.oracle, fit, first.threat, leave=self.aim.leave, then=then, **common)

    def _remaining(self, stage: Stage) -> dict[str, CleanFact]:
        return self.ledger.remaining(
            stage.threat.eps, stage.goal.spec, stage.attack.name, leave=self.aim.leave, everyone=self.aim.everyone
        )

    def _share(self, stage: Stage) -> dict[str, CleanFact]:
        """Return the images of a stage that this process attacks, dealt out anew among all that are left."""
        left = self._remaining(stage).items()
        return {name: fact for place, (name, fact) in enumerate(left) if self.ranks.mine(place)}

    def _briefed(
        self, jobs: Iterator[attacks.Job], stage: Stage, found: attacks.Probe, reached: set[int]
    ) -> Iterator[attacks.Job]:
        """Tell the jobs what the goal has to know of the clean images; note where it is reached unperturbed."""
        briefs = brief(jobs, self.oracle, stage.goal, found.rungs, self.n_targets)
        while True:
            with self.oracle.made_for("clean"):
                item = next(briefs, None)
            if item is None:
                return
            job, already = item
            if self._known_reached(stage, job.index, already):
                reached.add(job.index)
            yield job

    def _known_reached(self, stage: Stage, index: int, now: bool) -> bool:
        """Return whether a goal is reached on an image as it is: what was said of it first, as a random model wavers.

        Of a run's goal, or the first of several, that is the clean pass; of another the first stage that asked.
        """
        if stage.goal is self.aim.goals[0]:
            return not self.ledger.clean[index].exposed
        known = self.ledger.reached_as_is(stage.goal.spec, index)
        return now if known is None else known

    def _jobs_after(self, before: Sequence[Stage], stage: Stage) -> Iterator[attacks.Job]:
        """Return the jobs of a stage whose images are through with those before; the others come by themselves."""
        busy = {name for earlier in before for name in self._remaining(earlier)}
        return self._jobs({name: fact for name, fact in self._remaining(stage).items() if name not in busy}, stage)

    def _jobs(self, wanted: dict[str, CleanFact], stage: Stage) -> Iterator[attacks.Job]:
        if not wanted:
            return
        handed_on: set[str] = set()
        for item in self.images.stream(lambda name: name in wanted):
            # Streams also name what no one asked for: damaged shards, and second images of the same name.
            if item.id not in wanted or item.id in handed_on:
                continue
            handed_on.add(item.id)
            fact = wanted[item.id]
            self.oracle.meter.require(1)
            if isinstance(item, Unreadable):
                self._lose(fact, stage, item.reason)
            else:
                known = stage.threat.eps, stage.goal.spec, fact.index
                yield attacks.Job(
                    item.id,
                    fact.index,
                    item.pixels,
                    fact.label,
                    tuple(fact.targets),
                    beyond=self.ledger.beyond(*known),
                    reached=self.ledger.reached(*known, self._with_gradients(stage)),
                )

    def _with_gradients(self, stage: Stage) -> list[str]:
        """Return the attacks before a stage whose margins say how far gradients come, where margins are compared."""
        if self.oracle.eot > 1 or self.oracle.draws > 1:
            return []
        before = itertools.takewhile(lambda one: one is not stage, self.stages)
        alike = (one.attack for one in before if one.threat == stage.threat and one.goal is stage.goal)
        return [attack.name for attack in alike if by_gradients(attack, stage.goal)]

    def _lose(self, fact: CleanFact, stage: Stage, reason: str) -> None:
        self.ledger.add_lost(fact, stage.attack.name, stage.threat.eps, stage.goal.spec, reason)
        self._tell(attacks.FAILED, stage)

    def _keep(self, result: attacks.Result, stage: Stage) -> None:
        """Save the pictures first: a row in the journal means that they are there."""
        if result.outcome == attacks.FOOLED:
            fact = self.ledger.clean[result.job.index]
            folder, every = self.ledger.folder, self.plan.save_adversarial
            say = None if self.aim.say is None else partial(self._in_words, fact.index)
            save_pictures(folder, result, fact, stage, every=every, say=say)
        self.ledger.add_result(result, stage.attack.name, stage.threat.eps, stage.goal.spec)
        self._note_cost(every=_COST_SECONDS)
        if self.ranks.size == 1:  # each process knows its own images only
            self._say_likely(every=_COST_SECONDS)
        self._tell(result.outcome, stage)

    def _in_words(self, index: int, images: torch.Tensor) -> list[str]:
        """Return what the model says of two images in words, under draws that follow from the image."""
        assert self.aim.say is not None
        with own_draws(self.oracle.device, derive_seed(self.plan.seed, "words", index)), full_precision_kernels():
            return self.aim.say(images.to(self.oracle.device, torch.float32))  # the model's own, whatever the oracle's

    def _show(self, stage: Stage, left: int) -> None:
        """Tell the observer that a stage begins, and those after it that share its batches once nothing is left in it.

        What an image has met in a stage before that is told of, as others are still in the one before it, counts then.
        """
        done = self.ledger.attacked(stage.threat.eps, stage.goal.spec, stage.attack.name)
        self._shown, self._left = stage, left
        told = self._told[stage.title].total()
        self.observer.begin(stage.title, left + done, done - told)
        if told:
            self.observer.advance(told, fooled=self._fooled(stage))
        if not left and self._next:
            following = self._next.pop(0)
            self._show(following, len(self._remaining(following)))

    def _tell(self, outcome: str, stage: Stage) -> None:
        """Tell the observer of a finished image, and how many of this session's fell in the stage."""
        self._told[stage.title][outcome] += 1
        if stage is not self._shown:
            return
        self._left -= 1
        self.observer.advance(fooled=self._fooled(stage))
        if not self._left and self._next:
            following = self._next.pop(0)
            self._show(following, len(self._remaining(following)))

    def _fooled(self, stage: Stage) -> str:
        return f"{self._told[stage.title][attacks.FOOLED] / self._told[stage.title].total():.0%}"
