"""An attack run from images to a finished folder: clean pass, attacks by stage, checks; resumable throughout.

A stage is one attack at one eps for one goal; stages go by rising eps, then by goal, then in the order the attacks were
named. An image leaves at its first success: it is not attacked again at this or a larger eps, since a perturbation
inside a small ball lies inside every larger one. Goals whose figure of merit is how far an attack gets (features, the
level matrix) let no image leave. Every finished image is a line in the run's journal before its lane is used again.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from robustvlm import attacks
from robustvlm.attacks.catalog import Attack
from robustvlm.attacks.oracle import settle_draws
from robustvlm.attacks.tensors import brief, needs_briefing
from robustvlm.attacks.threat import ThreatModel
from robustvlm.commands.attack import AttackPlan
from robustvlm.commands.attack.checks import Checks
from robustvlm.commands.attack.cost import Budget, BudgetSpent, MeteredOracle, Speed, Work, estimate
from robustvlm.commands.attack.goal import Aim, CleanPass
from robustvlm.commands.attack.store import CLEAN_WRONG, CleanFact, Ledger, save_pair, save_to_gallery
from robustvlm.commands.common import questions
from robustvlm.commands.common.inputs import Images
from robustvlm.core.batches import SteadySizes
from robustvlm.core.framing import Framing
from robustvlm.core.ranks import Ranks
from robustvlm.data.source import DataSource, Unreadable
from robustvlm.report.words import forecast
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.records import Check, Estimate
from robustvlm.runs.settings import Observer

# The stages of an attack run, and what they leave in pictures


@dataclass(frozen=True)
class Stage:
    """One attack at one eps for one goal."""

    attack: Attack
    threat: attacks.ThreatModel
    eps_text: str
    goal: attacks.Goal

    @property
    def title(self) -> str:
        about = "" if self.goal.spec == "misclassify" else f" {self.goal.spec}"
        return f"{self.attack.name} {self.threat.norm} {self.eps_text}{about}"


def save_pictures(folder: RunFolder, result: attacks.Result, fact: CleanFact, stage: Stage, *, every: bool) -> None:
    """Keep a success for the gallery, and among all adversarial images if `every` one is wanted."""
    about = picture_facts(result, fact, stage)
    pictures = (result.job.index, result.job.pixels, result.adversarial, about)
    save_to_gallery(folder.gallery_path, *pictures)
    if every:
        save_pair(folder.adversarial_path, *pictures)


def picture_facts(result: attacks.Result, fact: CleanFact, stage: Stage) -> dict[str, str]:
    """Return the metadata that goes with a saved pair of images."""
    shown = {
        "image_id": fact.image_id,
        "index": fact.index,
        "label": fact.label,
        "clean_prediction": fact.prediction,
        "prediction": result.prediction,
        "clean_confidence": fact.confidence,
        "confidence": result.confidence,
        "attack": stage.attack.name,
        "eps": stage.threat.eps,
    }
    return {key: str(value) for key, value in shown.items()}


# An attack run from images to a finished folder: clean pass, attacks by stage, summary, report; resumable throughout

# A killed session loses its count of passes since the last note of it.
_COST_SECONDS = 5.0


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
        self._told: Counter[str] = Counter()
        self._sizes: dict[bool, SteadySizes] = {}
        self._began = self._noted = time.monotonic()

    def run(self) -> None:
        """Do what is left to do, as far as the budget goes; every fact goes to the ledger as soon as it is known."""
        with self._session() as found:
            if found is None:
                return
            self.observer.say(forecast(self._forecast(found)))
            for stage in self.stages:
                if self.ledger.stopped:
                    return
                with self._within_budget(f"in {stage.title}"):
                    self._run_stage(stage, found)
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
            with self._within_budget("in the clean pass"):
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
    def _within_budget(self, where: str) -> Iterator[None]:
        try:
            yield
        except BudgetSpent:
            self.ledger.add_stop(f"the budget of {self.budget.text} was spent {where}")

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
            ranks=self.ranks.size,
        )
        expected = estimate([*work, *self.checks.extra_work(work)], speed)
        if self.ranks.leader:
            self.ledger.add_estimate(expected)
        return expected

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
        said = questions.of_probe(found, eot=self.oracle.eot, draws=self.oracle.draws)
        if self.ranks.leader:
            asked = self.checks.questions(images, label, found)
            self.ledger.add_checks([*said, *notes, *self.aim.notes, *asked])
        return found

    def _settle_draws(self, found: attacks.Probe) -> None:
        """Average over the draws of a random model, and judge it by fresh ones."""
        plan = self.plan
        settle_draws(self.oracle, found, eot=plan.eot, draws=plan.draws, eot_if_random=plan.eot_if_random)

    def _run_stage(self, stage: Stage, found: attacks.Probe) -> None:
        """Run one attack at one eps on every image that still withstands; every one of them gets a row."""
        wanted = self._share(stage)
        done = self.ledger.attacked(stage.threat.eps, stage.goal.spec, stage.attack.name)
        self._told = Counter()
        self.observer.begin(stage.title, len(wanted) + done, done)
        if not wanted:
            return
        engine = self._engine(stage, found)
        reached: set[int] = set()
        jobs = self._jobs(wanted, stage)
        if self.aim.everyone or needs_briefing(stage.goal):
            jobs = self._briefed(jobs, stage, found, reached)
        for result in engine.run(jobs):
            self._keep(replace(result, outcome=CLEAN_WRONG) if result.job.index in reached else result, stage)
        for fact in (fact for name, fact in self._remaining(stage).items() if name in wanted):
            self._lose(fact, stage, "it is no longer in the data")
        if isinstance(engine, attacks.ExternalEngine):
            self.ledger.add_checks([Check(**asdict(finding)) for finding in engine.findings])

    def _engine(self, stage: Stage, found: attacks.Probe) -> attacks.LaneEngine | attacks.ExternalEngine:
        common: dict[str, Any] = {
            "lanes": found.rungs[0],
            "rungs": found.rungs,
            "seed": self.plan.seed,
            "goal": stage.goal,
            "on_pass": self.observer.passed,
        }
        if isinstance(stage.attack, attacks.ExternalAttack):
            permit = self.oracle.meter.require
            return attacks.ExternalEngine(self.oracle, stage.attack, stage.threat, permit=permit, **common)
        attack = questions.fit_for(stage.attack, found)
        # What one attack finds out about batch sizes, the next of its kind need not ask again.
        common["rungs"] = self._sizes.setdefault(attack.uses_gradient, SteadySizes(found.rungs))
        return attacks.LaneEngine(self.oracle, attack, stage.threat, leave=self.aim.leave, **common)

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
            if already:
                reached.add(job.index)
            yield job

    def _jobs(self, wanted: dict[str, CleanFact], stage: Stage) -> Iterator[attacks.Job]:
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
                beyond = self.ledger.beyond(stage.threat.eps, stage.goal.spec, fact.index)
                yield attacks.Job(item.id, fact.index, item.pixels, fact.label, tuple(fact.targets), beyond=beyond)

    def _lose(self, fact: CleanFact, stage: Stage, reason: str) -> None:
        self.ledger.add_lost(fact, stage.attack.name, stage.threat.eps, stage.goal.spec, reason)
        self._tell(attacks.FAILED)

    def _keep(self, result: attacks.Result, stage: Stage) -> None:
        """Save the pictures first: a row in the journal means that they are there."""
        if result.outcome == attacks.FOOLED:
            fact = self.ledger.clean[result.job.index]
            save_pictures(self.ledger.folder, result, fact, stage, every=self.plan.save_adversarial)
        self.ledger.add_result(result, stage.attack.name, stage.threat.eps, stage.goal.spec)
        self._note_cost(every=_COST_SECONDS)
        self._tell(result.outcome)

    def _tell(self, outcome: str) -> None:
        """Tell the observer of a finished image, and how many of this session's fell in the stage."""
        self._told[outcome] += 1
        self.observer.advance(fooled=f"{self._told[attacks.FOOLED] / self._told.total():.0%}")
