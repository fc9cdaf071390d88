"""Attacks on scores: known images are to be refused, unknown ones to be accepted, by attacks that know the score.

Every score that is attacked gets attacks of its own, through the encoder, on its acceptance margin (score minus the
threshold that accepts 95% of the clean known images). No image leaves at its first success: attacks go on to the end
of their budget, and the worst score met counts, so that an AUROC under attack can be computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.attacks import Deny, Goal, Intrude, Job, LaneAttack, LaneEngine, Oracle, Probe, Result, ThreatModel
from robustvlm.attacks.probe import settle_draws
from robustvlm.data.source import DataSource
from robustvlm.defenses import Classifier
from robustvlm.evaluation import checks
from robustvlm.evaluation.detecting.encoding import Encoded
from robustvlm.evaluation.detecting.gate import ScoreGate
from robustvlm.evaluation.detecting.ledger import AttackedFact, AttackLedger
from robustvlm.evaluation.detecting.observer import DetectObserver
from robustvlm.evaluation.detecting.scoring import Panel
from robustvlm.evaluation.images import Images, Picture
from robustvlm.evaluation.questions import ask
from robustvlm.runs.detect_config import UnderAttack
from robustvlm.runs.detect_summary import OWN
from robustvlm.runs.summary import Check

KNOWN = "known"


@dataclass(frozen=True, eq=False)
class Target:
    """A set of images under attack: its source and name, and whether its images are known."""

    source: DataSource
    name: str
    known: bool


class ScoreAttacks:
    """Attacks the scores of a panel, as far as the ledger does not know the outcome yet.

    Args:
        config: which scores, how strong and on how many images; attacks: those of `config.attack`.
        thresholds: of each score; clean: scores of every image, by set and score, with `encoded` naming the images.
    """

    def __init__(
        self,
        *,
        config: UnderAttack,
        attacks: Sequence[LaneAttack],
        classifier: Classifier,
        panel: Panel,
        thresholds: Mapping[str, float],
        clean: Mapping[str, Mapping[str, Tensor]],
        encoded: Mapping[str, Encoded],
        ledger: AttackLedger,
        observer: DetectObserver,
        seed: int,
    ) -> None:
        self.config, self.attacks, self.classifier, self.panel = config, attacks, classifier, panel
        self.thresholds, self.clean, self.encoded = thresholds, clean, encoded
        self.ledger, self.observer, self.seed = ledger, observer, seed
        self.threat = ThreatModel(config.norm, config.eps)

    def run(self, targets: Sequence[Target]) -> None:
        """Attack every score on every set; a score that is not there is noted and left out."""
        for name in self.config.scores:
            model = self._model(name)
            if model is None:
                why = self.panel.skipped.get(name, "it is not among the scores of this run")
                message = f"The score '{name}' was not attacked: {why}."
                self.ledger.add_checks([Check(name=f"attack on {name}", level="note", message=message)])
                continue
            for target in targets:
                self._stage(name, model, target)

    def _model(self, name: str) -> Classifier | None:
        if name == OWN:
            return self.classifier if self.classifier.can_reject else None
        detector = self.panel.detectors.get(name)
        if detector is None:
            return None
        device = self.classifier.device
        return ScoreGate(self.classifier, self.panel.head, detector.to(device), self.thresholds[name]).eval()

    def _stage(self, name: str, model: Classifier, target: Target) -> None:
        """Run all attacks on one score and one set."""
        goal: Goal = Deny() if target.known else Intrude()
        oracle = Oracle(model, device=self.classifier.device, seed=self.seed)
        began, probed = time.monotonic(), None
        for attack in self.attacks:
            pictures = self._pictures(target, self.ledger.done(name, target.name, attack.name))
            title = f"{attack.name}, {name}, {target.name}: {goal.spec}"
            self.observer.begin(title, None if not pictures else len(pictures), 0)
            if not pictures:
                continue
            probed = probed or self._probe(oracle, pictures)
            engine = self._engine(oracle, attack, goal, probed)
            for result in engine.run(self._jobs(pictures)):
                self.ledger.add(self._fact(result, name, target, goal, attack))
                self.observer.advance(1)
        passes = oracle.passes
        self.ledger.add_cost(
            forward=passes.forward,
            backward=passes.backward,
            seconds=time.monotonic() - began,
            model_seconds=passes.seconds,
        )

    def _pictures(self, target: Target, done: set[str]) -> list[Picture]:
        """Return the images of a set that are attacked and not done; those that were scored clean."""
        scored = set(self.encoded[target.name].ids)
        images = Images(target.source, limit=self.config.limit, resolution=self.classifier.framing)
        found = (item for item in images.stream(lambda name: name in scored and name not in done))
        return [item for item in found if isinstance(item, Picture) and item.id in scored and item.id not in done]

    def _probe(self, oracle: Oracle, pictures: Sequence[Picture]) -> Probe:
        """Ask the model what batches it takes, whether it is random, and whether rows are independent."""
        rows = [pictures[i % len(pictures)] for i in range(self.config.lanes)]
        images = torch.stack([picture.pixels for picture in rows])
        found, notes = ask(oracle, images, torch.zeros(len(rows), dtype=torch.int64), model=self.classifier.spec)
        checks.require_independent_rows(found, self.classifier.spec)
        settle_draws(oracle, found)
        self.ledger.add_checks([*checks.of_probe(found, eot=oracle.eot, draws=oracle.draws), *notes])
        return found

    def _engine(self, oracle: Oracle, attack: LaneAttack, goal: Goal, found: Probe) -> LaneEngine:
        return LaneEngine(
            oracle,
            checks.fit_for(attack, found),
            self.threat,
            lanes=found.rungs[0],
            rungs=found.rungs,
            seed=self.seed,
            goal=goal,
            leave=False,
        )

    def _jobs(self, pictures: Sequence[Picture]) -> Iterator[Job]:
        for number, picture in enumerate(pictures):
            yield Job(picture.id, number, picture.pixels, 0, (0,))

    def _fact(self, result: Result, name: str, target: Target, goal: Goal, attack: LaneAttack) -> AttackedFact:
        threshold = self.thresholds[name]
        row = self.encoded[target.name].ids.index(result.job.image_id)
        clean = float(self.clean[target.name][name][row])
        reached = threshold + (result.margin if target.known else -result.margin)
        # What was met on the way from the clean image is no better than it, up to rounding.
        worst = min(clean, reached) if target.known else max(clean, reached)
        return AttackedFact(
            score=name,
            set=target.name,
            goal=goal.spec,
            attack=attack.name,
            index=row,
            image_id=result.job.image_id,
            clean=clean,
            attacked=worst,
            outcome=result.outcome,
            steps=result.steps,
            passes=result.passes,
            linf=result.linf,
            l2=result.l2,
            seconds=result.seconds,
        )


def worst_scores(ledger: AttackLedger, score: str, set_name: str) -> tuple[list[int], Tensor, Tensor]:
    """Return rows of the attacked images, their clean scores and the worst over all attacks.

    Images that failed are left out: the output was not finite at some point.
    """
    clean: dict[int, float] = {}
    worst: dict[int, float] = {}
    failed: set[int] = set()
    for fact in ledger.found.values():
        if (fact.score, fact.set) != (score, set_name):
            continue
        if fact.outcome == "failed":
            failed.add(fact.index)
            continue
        clean[fact.index] = fact.clean
        pick = min if fact.goal == "deny" else max
        worst[fact.index] = pick(worst.get(fact.index, fact.attacked), fact.attacked)
    rows = sorted(set(worst) - failed)
    values = [[table[row] for row in rows] for table in (clean, worst)]
    return rows, torch.tensor(values[0], dtype=torch.float64), torch.tensor(values[1], dtype=torch.float64)
