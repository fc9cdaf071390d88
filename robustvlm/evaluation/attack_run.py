"""An attack run from images to a finished folder: clean pass, attacks by stage, summary, report; resumable throughout.

A stage is one attack at one eps for one goal; stages go by rising eps, then by goal, then in the order the attacks were
named. An image leaves at its first success: it is not attacked again at this or a larger eps, since a perturbation
inside a small ball lies inside every larger one. Goals whose figure of merit is how far an attack gets (features, the
level matrix) let no image leave. Every finished image is a line in the run's journal before its lane is used again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from robustvlm.attacks import (
    FAILED,
    FOOLED,
    ExternalAttack,
    ExternalEngine,
    Job,
    LaneAttack,
    LaneEngine,
    Probe,
    Result,
    ThreatModel,
)
from robustvlm.attacks.plan import Attack
from robustvlm.attacks.probe import settle_draws
from robustvlm.attacks.unperturbed import brief, needs_briefing
from robustvlm.core.framing import Framing
from robustvlm.core.ranks import Ranks
from robustvlm.data.source import DataSource, Unreadable
from robustvlm.evaluation import checks, scrutiny
from robustvlm.evaluation.aims import Aim
from robustvlm.evaluation.budget import Budget, BudgetSpent, MeteredOracle
from robustvlm.evaluation.clean_pass import CleanPass
from robustvlm.evaluation.estimate import Speed, Work, estimate
from robustvlm.evaluation.images import Images
from robustvlm.evaluation.ledger import Ledger
from robustvlm.evaluation.observer import Observer
from robustvlm.evaluation.questions import ask
from robustvlm.evaluation.stages import Stage, save_pictures
from robustvlm.runs.config import AttackConfig
from robustvlm.runs.results import CLEAN_WRONG, CleanFact
from robustvlm.runs.summary import Check, Estimate

# A killed session loses its count of passes since the last note of it.
_COST_SECONDS = 5.0


class AttackRun:
    """Attacks the images of a source under a config and keeps all facts in a ledger.

    Args:
        config: the settings; source: the images; aim: the model and what is wanted of it.
        attacks: the attacks of `config.attack`, in order.
        ledger: the run's record; facts already in it are not found again.
        observer: told about progress.
        framing: how images are brought to the attack's resolution.
        ranks: this process among those that share the work; budget: what the run may cost.
    """

    def __init__(
        self,
        *,
        config: AttackConfig,
        source: DataSource,
        aim: Aim,
        attacks: Sequence[Attack],
        ledger: Ledger,
        observer: Observer,
        framing: Framing | None = None,
        ranks: Ranks | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.config, self.source, self.ledger, self.observer = config, source, ledger, observer
        self.aim, self.ranks, self.budget = aim, ranks or Ranks(), budget or Budget()
        self.oracle = MeteredOracle(
            aim.model,
            budget=self.budget,
            ranks=self.ranks,
            device=config.device,
            precision=config.precision,
            seed=config.seed,
            compiled=config.compiled,
        )
        self.images = Images(
            source,
            limit=config.limit,
            resolution=config.resolution if framing is None else framing.at(config.resolution),
            ahead=0 if self.oracle.device.type == "cpu" else config.lanes,
        )
        self.stages = [
            Stage(attack, ThreatModel(config.norm, eps), text, goal)
            for eps, text in zip(config.eps, config.eps_text, strict=True)
            for goal in aim.goals
            for attack in attacks
        ]
        self.n_targets = max(getattr(attack, "n_targets", None) or 1 for attack in attacks)
        self.clean = CleanPass(
            self.oracle, self.images, aim, ledger=ledger, observer=observer, ranks=self.ranks, n_targets=self.n_targets
        )
        self._began = self._noted = time.monotonic()

    def run(self) -> None:
        """Do what is left to do, as far as the budget goes; every fact goes to the ledger as soon as it is known."""
        with self._session() as found:
            if found is None:
                return
            self.observer.forecast(self._forecast(found))
            for stage in self.stages:
                if self.ledger.stopped:
                    return
                with self._within_budget(f"in {stage.title}"):
                    self._run_stage(stage, found)
                self._meet()
            if self.ranks.leader and not self.ledger.stopped:
                with self.oracle.made_for("checks"):
                    scrutiny.extra_attacks(self, found)

    def estimate(self) -> Estimate | None:
        """Make the clean pass and return what the attacks will cost; None when the budget is spent before."""
        with self._session() as found:
            return None if found is None else self._forecast(found)

    @contextlib.contextmanager
    def _session(self) -> Iterator[Probe | None]:
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
        self.ranks.barrier()
        self.ledger.sync()
        # Nobody goes on and writes before everybody has read, or they would know different things.
        self.ranks.barrier()
        cost = self.ledger.cost
        self.oracle.meter.deal_out(cost.forward_passes + cost.backward_passes)

    def _forecast(self, found: Probe) -> Estimate:
        """Return what is left to do, in passes and seconds."""
        work = []
        for stage in self.stages:
            wanted = self._remaining(stage)
            targets = max((len(fact.targets) for fact in wanted.values()), default=1)
            attack = stage.attack
            known = attack if isinstance(attack, LaneAttack) else attack.name
            work.append(Work(known, [(stage.goal.spec, name) for name in wanted], n_targets=targets))
        oracle = self.oracle
        speed = Speed(
            rungs=found.rungs,
            seconds_of=oracle.seconds,
            eot=oracle.eot,
            second_looks=0 if oracle.confirmed else oracle.draws,
            ranks=self.ranks.size,
        )
        forecast = estimate([*work, *scrutiny.extra_work(self, work)], speed)
        if self.ranks.leader:
            self.ledger.add_estimate(forecast)
        return forecast

    def _note_cost(self, *, every: float = 0.0) -> None:
        """Record the passes and time of this session so far, unless that was done in the last `every` seconds."""
        now = time.monotonic()
        if now - self._noted >= every:
            self.ledger.add_cost(self.oracle, now - self._began)
            self._noted = now

    def _probe(self) -> Probe:
        """Question the model on the first images; refuse one whose rows are not independent."""
        first = self.clean.first_images(self.config.lanes)
        images = torch.stack([picture.pixels for picture in first])
        # Images of unknown classes have no label; what the probe asks does not depend on it.
        label = torch.tensor([max(0, picture.label) for picture in first])
        found, notes = ask(self.oracle, images, label, model=self.config.model)
        checks.require_independent_rows(found, self.config.model)
        self._settle_draws(found)
        of_probe = checks.of_probe(found, eot=self.oracle.eot, draws=self.oracle.draws)
        if self.ranks.leader:
            asked = scrutiny.questions(self, images, label, found)
            self.ledger.add_checks([*of_probe, *notes, *self.aim.notes, *asked])
        return found

    def _settle_draws(self, found: Probe) -> None:
        """Average over the draws of a random model, and judge it by fresh ones."""
        config = self.config
        settle_draws(self.oracle, found, eot=config.eot, draws=config.draws, eot_if_random=config.eot_if_random)

    def _run_stage(self, stage: Stage, found: Probe) -> None:
        """Run one attack at one eps on every image that still withstands; every one of them gets a row."""
        wanted = self._share(stage)
        done = self.ledger.attacked(stage.threat.eps, stage.goal.spec, stage.attack.name)
        self.observer.begin_stage(stage.title, len(wanted) + done, done)
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
        if isinstance(engine, ExternalEngine):
            self.ledger.add_checks([Check(**asdict(finding)) for finding in engine.findings])

    def _engine(self, stage: Stage, found: Probe) -> LaneEngine | ExternalEngine:
        common: dict[str, Any] = {
            "lanes": found.rungs[0],
            "rungs": found.rungs,
            "seed": self.config.seed,
            "goal": stage.goal,
            "on_pass": self.observer.passed,
        }
        if isinstance(stage.attack, ExternalAttack):
            permit = self.oracle.meter.require
            return ExternalEngine(self.oracle, stage.attack, stage.threat, permit=permit, **common)
        attack = checks.fit_for(stage.attack, found)
        return LaneEngine(self.oracle, attack, stage.threat, leave=self.aim.leave, **common)

    def _remaining(self, stage: Stage) -> dict[str, CleanFact]:
        return self.ledger.remaining(
            stage.threat.eps, stage.goal.spec, stage.attack.name, leave=self.aim.leave, everyone=self.aim.everyone
        )

    def _share(self, stage: Stage) -> dict[str, CleanFact]:
        """Return the images of a stage that this process attacks, dealt out anew among all that are left."""
        left = self._remaining(stage).items()
        return {name: fact for place, (name, fact) in enumerate(left) if self.ranks.mine(place)}

    def _briefed(self, jobs: Iterator[Job], stage: Stage, found: Probe, reached: set[int]) -> Iterator[Job]:
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

    def _jobs(self, wanted: dict[str, CleanFact], stage: Stage) -> Iterator[Job]:
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
                yield Job(item.id, fact.index, item.pixels, fact.label, tuple(fact.targets))

    def _lose(self, fact: CleanFact, stage: Stage, reason: str) -> None:
        self.ledger.add_lost(fact, stage.attack.name, stage.threat.eps, stage.goal.spec, reason)
        self.observer.image_done(FAILED)

    def _keep(self, result: Result, stage: Stage) -> None:
        """Save the pictures first: a row in the journal means that they are there."""
        if result.outcome == FOOLED:
            fact = self.ledger.clean[result.job.index]
            save_pictures(self.ledger.folder, result, fact, stage, every=self.config.save_adversarial)
        self.ledger.add_result(result, stage.attack.name, stage.threat.eps, stage.goal.spec)
        self._note_cost(every=_COST_SECONDS)
        self.observer.image_done(result.outcome)
