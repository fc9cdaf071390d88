"""Attacks on scores by somebody who knows them: known images are to be refused, unknown ones accepted.

Every score that is attacked gets attacks of its own, through the encoder, on its acceptance margin (score minus the
threshold that accepts 95% of the clean known images). No image leaves at its first success: attacks go on to the end
of their budget, and the worst score met counts, so that an AUROC under attack can be computed.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from robustvlm import attacks
from robustvlm.attacks.probe import settle_draws
from robustvlm.attacks.threat import ThreatModel
from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.commands.common.questions import ask, fit_for, of_probe, require_independent_rows
from robustvlm.commands.common.store import JournalLedger, cost_of
from robustvlm.commands.detect.encoding import Encoded
from robustvlm.commands.detect.scoring import Panel
from robustvlm.commands.detect.summary import OWN, UnderAttack
from robustvlm.core.object_graph import fingerprint
from robustvlm.data.source import DataSource
from robustvlm.defenses import Classifier
from robustvlm.detect import Detector, Head
from robustvlm.models import VLM
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.records import Check
from robustvlm.runs.settings import Observer

# A classifier that accepts an image when a detection score is above a threshold: what attacks on scores attack


class ScoreGate(Classifier):
    """Logits of the zero-shot head, and score minus threshold as acceptance, differentiable down to the pixels.

    One encoder pass gives both.

    Args:
        inner: the model below; without an encoder its logits take the place of features.
        head, detector: of the score; threshold: accepted are images whose score is above it.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> from robustvlm.detect import MCM
        >>> inner = load_classifier("tiny", ["apple", "dog"], ["{}"], cache=False)
        >>> head = Head(inner.class_embeddings, inner.logit_scale)
        >>> ScoreGate(inner, head, MCM(head), threshold=0.1)(torch.rand(4, 3, 64, 64)).shape
        torch.Size([4, 3])
    """

    def __init__(self, inner: Classifier, head: Head, detector: Detector, threshold: float) -> None:
        super().__init__(
            spec=f"{inner.spec} gated by {type(detector).__name__}",
            class_names=inner.class_names,
            logit_scale=inner.logit_scale,
            can_reject=True,
            **inner.framing.options(),
        )
        self.inner, self.head, self.detector, self.threshold = inner, head, detector, threshold

    @property
    def vlm(self) -> VLM | None:
        return self.inner.vlm

    @property
    def class_embeddings(self) -> Tensor | None:
        return self.inner.class_embeddings

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.detector.state(), (self.inner.fingerprint, repr(self.threshold)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and acceptance [B, K + 1]."""
        vlm, n_classes = self.inner.vlm, len(self.class_names)
        features = self.inner(pixels)[:, :n_classes] if vlm is None else vlm.encode_image(pixels)
        # Under autocast the encoder may run in bfloat16; products in it would lose the margins attacks turn on.
        with torch.autocast(pixels.device.type, enabled=False):
            wide = features if features.dtype == torch.float64 else features.float()
            acceptance = self.detector.score(wide) - self.threshold
            return torch.cat([self.head.logits(wide), acceptance[:, None]], dim=1)


# The facts of attacks on scores: kept in memory, and appended to the run's journal as they come

ATTACKED_SCHEMA = pa.schema(
    [
        ("score", pa.string()),
        ("set", pa.string()),
        ("goal", pa.string()),
        ("attack", pa.string()),
        ("index", pa.int32()),
        ("image_id", pa.string()),
        ("clean", pa.float64()),
        ("attacked", pa.float64()),
        ("outcome", pa.string()),
        ("steps", pa.int32()),
        ("passes", pa.int32()),
        ("linf", pa.float64()),
        ("l2", pa.float64()),
        ("seconds", pa.float64()),
    ]
)


@dataclass(frozen=True)
class AttackedFact:
    """What one attack made of one image's score.

    Args:
        score: that was attacked; set: of the image, `promised` for attacks on promised answers; goal: deny, intrude, or
            of promised answers misclassify.
        clean, attacked: the score before, and the worst one met (lowest for deny, highest for intrude); of promised
            answers how far the point is beyond what makes a wrong answer (above 0: it is one).
        outcome: fooled when the threshold was passed or a wrong answer given, robust, or failed.
    """

    score: str
    set: str
    goal: str
    attack: str
    index: int
    image_id: str
    clean: float
    attacked: float
    outcome: str
    steps: int
    passes: int
    linf: float
    l2: float
    seconds: float


class AttackLedger(JournalLedger):
    """The facts of a detect run's attacks."""

    def __init__(self, folder: RunFolder) -> None:
        self.found: dict[tuple[str, str, str, str], AttackedFact] = {}
        super().__init__(folder)

    def add(self, fact: AttackedFact) -> None:
        """Record what an attack found for an image."""
        self._add({"kind": "attacked", **asdict(fact)})

    def done(self, score: str, set_name: str, attack: str) -> set[str]:
        """Return the ids of the images that a stage is done with."""
        return {key[3] for key in self.found if key[:3] == (score, set_name, attack)}

    def add_cost(self, oracle: attacks.Oracle, seconds: float) -> None:
        """Record what a stage of this session has cost; for those who read the journal."""
        spent = oracle.passes
        self._add_cost(
            cost_of(forward=spent.forward, backward=spent.backward, seconds=seconds, model_seconds=spent.seconds)
        )

    def table(self) -> pa.Table:
        """Return the facts as a table, in a fixed order."""
        order = sorted(self.found.values(), key=lambda f: (f.score, f.set, f.attack, f.index))
        return pa.Table.from_pylist([asdict(fact) for fact in order], schema=ATTACKED_SCHEMA)

    def _take_own(self, kind: str, fact: dict[str, Any]) -> None:
        if kind != "attacked":
            raise ValueError(f"unknown kind of fact '{kind}'")
        taken = AttackedFact(**fact)
        self.found[taken.score, taken.set, taken.attack, taken.image_id] = taken


# Attacks on scores: known images are to be refused, unknown ones to be accepted, by attacks that know the score


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
        attacks: Sequence[attacks.LaneAttack],
        classifier: Classifier,
        panel: Panel,
        thresholds: Mapping[str, float],
        clean: Mapping[str, Mapping[str, Tensor]],
        encoded: Mapping[str, Encoded],
        ledger: AttackLedger,
        observer: Observer,
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
                self.ledger.add_checks([Check(name=f"score not attacked, {name}", level="note", message=message)])
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
        goal: attacks.Goal = attacks.Deny() if target.known else attacks.Intrude()
        oracle = attacks.Oracle(model, device=self.classifier.device, seed=self.seed)
        began, probed = time.monotonic(), None
        for attack in self.attacks:
            pictures = self._pictures(target, self.ledger.done(name, target.name, attack.name))
            title = f"{attack.name}, {name}, {target.name}: {goal.spec}"
            self.observer.begin(title, len(pictures) or None)
            if not pictures:
                continue
            probed = probed or self.probe(oracle, pictures)
            engine = self.engine(oracle, attack, goal, probed)
            for result in engine.run(self._jobs(pictures)):
                self.ledger.add(self._fact(result, name, target, goal, attack))
                self.observer.advance(1)
        self.ledger.add_cost(oracle, time.monotonic() - began)

    def _pictures(self, target: Target, done: set[str]) -> list[Picture]:
        """Return the images of a set that are attacked and not done; those that were scored clean."""
        scored = set(self.encoded[target.name].ids)
        images = Images(target.source, limit=self.config.limit, resolution=self.classifier.framing)
        found = (item for item in images.stream(lambda name: name in scored and name not in done))
        return [item for item in found if isinstance(item, Picture) and item.id in scored and item.id not in done]

    def probe(self, oracle: attacks.Oracle, pictures: Sequence[Picture]) -> attacks.Probe:
        """Ask the model what batches it takes, whether it is random, and whether rows are independent."""
        rows = [pictures[i % len(pictures)] for i in range(self.config.lanes)]
        images = torch.stack([picture.pixels for picture in rows])
        found, notes = ask(oracle, images, torch.zeros(len(rows), dtype=torch.int64), model=self.classifier.spec)
        require_independent_rows(found, self.classifier.spec)
        settle_draws(oracle, found)
        self.ledger.add_checks([*of_probe(found, oracle), *notes])
        return found

    def engine(
        self,
        oracle: attacks.Oracle,
        attack: attacks.LaneAttack,
        goal: attacks.Goal,
        found: attacks.Probe,
        *,
        leave: bool = False,
    ) -> attacks.LaneEngine:
        """Return the engine of an attack on a goal; images `leave` at their first success or never."""
        return attacks.LaneEngine(
            oracle,
            fit_for(attack, found),
            self.threat,
            lanes=found.rungs[0],
            rungs=found.rungs,
            seed=self.seed,
            goal=goal,
            leave=leave,
        )

    def _jobs(self, pictures: Sequence[Picture]) -> Iterator[attacks.Job]:
        for number, picture in enumerate(pictures):
            yield attacks.Job(picture.id, number, picture.pixels, 0, (0,))

    def _fact(
        self, result: attacks.Result, name: str, target: Target, goal: attacks.Goal, attack: attacks.LaneAttack
    ) -> AttackedFact:
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
