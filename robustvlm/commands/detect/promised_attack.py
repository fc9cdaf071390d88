"""Attacks on promised answers: a wrong class that is answered, by somebody who knows the score and its thresholds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm import attacks
from robustvlm.attacks.goals.base import REJECTED, Case
from robustvlm.attacks.goals.classes import AcceptedMistake
from robustvlm.attacks.objectives import Objective
from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.commands.detect.attack import AttackedFact, ScoreAttacks, ScoreGate
from robustvlm.commands.detect.measures import Scored, share
from robustvlm.commands.detect.promised import Rules
from robustvlm.commands.detect.summary import OWN, PROMISED, WrongAnswers
from robustvlm.data.source import DataSource, select
from robustvlm.defenses import Classifier
from robustvlm.detect import Promise
from robustvlm.report.words import count_of
from robustvlm.runs.records import Check

# How far past its threshold a condition is pushed when two must hold at once, in units of its clean distance.
_OVERSHOOT = 0.05


class WrongAnswer(AcceptedMistake):
    """A wrong class whose score passes the threshold that was promised for it.

    The model's output is logits [B, K] and the score as it is. Only classes with a threshold are aimed at: the leading
    wrong one of these has to come first, and the score above its threshold. The loss wants the class first and the
    score only once it leads: on the way from a right answer to a wrong one a score such as MSP falls and rises again:
    a sum of both distances keeps attacks at the clean image.

    Example:
        >>> goal = WrongAnswer(Promise(0.9, 0.95, (0.5, math.inf, 0.2)))
        >>> output = torch.tensor([[1.0, 3.0, 2.0, 0.9], [1.0, 2.0, 3.0, 0.3], [1.0, 2.0, 3.0, 0.1]])
        >>> goal.reached(output, Case(torch.tensor([0, 0, 0]))).tolist()
        [False, True, False]
    """

    def __init__(self, rule: Promise) -> None:
        self.thresholds = torch.tensor(rule.thresholds, dtype=torch.float64)

    def margin(self, output: Tensor, case: Case) -> Tensor:
        ahead, short, possible = self._distances(output, case.label)
        return torch.where(possible, torch.maximum(ahead, short), output.new_full((len(output),), math.inf))

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        del objective
        ahead, short, _ = self._distances(output, case.label)
        scale = output.new_ones(len(output), 2) if case.reference is None else case.reference.abs().clamp_min(1e-6)
        lead, score = (F.relu(part / scale[:, i] + _OVERSHOOT) for i, part in enumerate((ahead, short)))
        # Behind, whatever the score: worse than ahead with any score.
        return -lead - torch.where(ahead >= 0, torch.ones_like(score), score / (1 + score))

    def reached(self, output: Tensor, case: Case) -> Tensor:
        said = output[:, :-1].argmax(1)
        return (said != case.label) & (output[:, -1] > self._least(output)[said])

    def prediction(self, output: Tensor) -> Tensor:
        said = output[:, :-1].argmax(1)
        return torch.where(output[:, -1] > self._least(output)[said], said, REJECTED)

    def reference(self, output: Tensor, label: Tensor) -> Tensor:
        ahead, short, _ = self._distances(output, label)
        return torch.stack([ahead, short], dim=1)

    def _least(self, output: Tensor) -> Tensor:
        """Return the score [K] above which a class is answered.

        An answer may stand on its threshold, and a margin must pass it: the number below the threshold is passed by
        both.
        """
        exact = self.thresholds.to(output)
        below = torch.nextafter(exact, torch.full_like(exact, -math.inf))
        return torch.where(exact.isinf(), exact, below).expand(output.shape[1] - 1)

    def _distances(self, output: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how far the aim is from leading, the score from its threshold, and whether there is any aim, [B]."""
        logits, least = output[:, :-1], self._least(output)
        barred = least.isinf()[None] | F.one_hot(label, logits.shape[1]).bool()
        aim = logits.masked_fill(barred, -math.inf).argmax(1, keepdim=True)
        ahead = logits.scatter(1, aim, -math.inf).amax(1) - logits.gather(1, aim).squeeze(1)
        wanted = least[aim.squeeze(1)]
        short = wanted.masked_fill(wanted.isinf(), 0.0) - output[:, -1]
        return ahead, short, ~barred.all(1)


class AnswerGate(ScoreGate):
    """The logits of the model itself, and the score as it is: what answers are made of.

    A model of which prototypes decide has logits that are not those of the class texts, and is asked for them apart.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and score [B, K + 1]."""
        found, texts = super().forward(pixels), self.inner.class_embeddings
        if self.inner.vlm is None or (texts is not None and texts.ndim == 2 and not self.inner.can_reject):
            return found
        logits = self.inner(pixels)[:, : len(self.class_names)]
        return torch.cat([logits.to(found), found[:, -1:]], dim=1)


def attack_promises(
    work: ScoreAttacks, rules: Rules, names: Sequence[str], known: Scored, source: DataSource
) -> dict[str, WrongAnswers]:
    """Return the wrong answers of the named scores, clean and attacked, on some of the images that judge promises."""
    ids = select([known.ids[row] for row in rules.judged], work.config.limit)
    return {
        name: _attacked(work, name, rules.of[name], known, source, ids)
        for name in names
        if name in rules.of and any(map(math.isfinite, rules.of[name].thresholds))
    }


def _attacked(
    work: ScoreAttacks, name: str, rule: Promise, known: Scored, source: DataSource, ids: Sequence[str]
) -> WrongAnswers:
    """Attack one score's answers, as far as the ledger does not know the outcome yet."""
    goal = WrongAnswer(rule)
    oracle = attacks.Oracle(_gate(work, name), device=work.classifier.device, seed=work.seed)
    row_of = {image_id: row for row, image_id in enumerate(known.ids)}
    rows = [row_of[image_id] for image_id in ids]
    scores, said = known.scores[name][rows], [known.predictions[row] for row in rows]
    wrong = [
        answered and known.predictions[row] != known.labels[row]
        for answered, row in zip(rule.answered(scores, said).tolist(), rows, strict=True)
    ]
    # Of an image whose class is the only one with a threshold there is no wrong answer.
    classes = range(len(work.classifier.class_names))
    answerable = {k for k in classes if math.isfinite(rule.thresholds[k % len(rule.thresholds)])}
    left = {
        image_id
        for image_id, already, row in zip(ids, wrong, rows, strict=True)
        if not already and answerable - {known.labels[row]}
    }
    began, probed = time.monotonic(), None
    for attack in work.attacks:
        todo = left - work.ledger.done(name, PROMISED, attack.name)
        pictures = _pictures(work, source, todo)
        work.observer.begin(f"{attack.name}, {name}: a wrong answer", len(pictures) or None)
        if pictures:
            probed = probed or work.probe(oracle, pictures)
            engine = work.engine(oracle, attack, goal, probed, leave=True)
            for result in engine.run(_jobs(oracle, goal, pictures)):
                clean = float(known.scores[name][row_of[result.job.image_id]])
                work.ledger.add(_fact(result, name, attack, row_of[result.job.image_id], clean))
                work.observer.advance(1)
        left -= _with(work, name, attacks.FOOLED)
    work.ledger.add_cost(oracle, time.monotonic() - began)
    fooled, lost = _with(work, name, attacks.FOOLED), unsettled(work, name, left)
    if lost:
        work.ledger.add_checks([_left_out(name, len(lost))])
    judged = [(already, already or one in fooled) for already, one in zip(wrong, ids, strict=True) if one not in lost]
    clean, attacked = np.array(judged, dtype=bool).reshape(-1, 2).T
    return WrongAnswers(clean=share(clean), attacked=share(attacked))


def unsettled(work: ScoreAttacks, name: str, left: set[str]) -> set[str]:
    """Return those of the images `left`, which nothing fooled, that some attack did not end with a finite output."""
    ended = [work.ledger.done(name, PROMISED, attack.name) for attack in work.attacks]
    return {one for one in left if not all(one in done for done in ended)} | left & _with(work, name, attacks.FAILED)


def _left_out(name: str, count: int) -> Check:
    message = (
        f"{count_of(count, 'image')} could not be attacked to the end for a wrong answer by '{name}', as the output "
        "was not finite or the image could not be read again: the shares of wrong answers leave them out."
    )
    return Check(name=f"wrong answers, {name}", level="warning", message=message)


def _gate(work: ScoreAttacks, name: str) -> Classifier:
    if name == OWN:
        return work.classifier
    detector = work.panel.detectors[name].to(work.classifier.device)
    return AnswerGate(work.classifier, work.panel.head, detector, 0.0).eval()


def _pictures(work: ScoreAttacks, source: DataSource, wanted: set[str]) -> list[Picture]:
    images = Images(source, limit=None, resolution=work.classifier.framing)
    return [item for item in images.stream(wanted.__contains__) if isinstance(item, Picture) and item.id in wanted]


def _jobs(oracle: attacks.Oracle, goal: WrongAnswer, pictures: Sequence[Picture]) -> Iterator[attacks.Job]:
    for number, picture in enumerate(pictures):
        output, label = oracle.confirm(picture.pixels[None]), torch.tensor([picture.label])
        reference = goal.reference(output.cpu(), label)[0]
        yield attacks.Job(picture.id, number, picture.pixels, picture.label, (picture.label,), reference)


def _fact(result: attacks.Result, name: str, attack: attacks.LaneAttack, row: int, clean: float) -> AttackedFact:
    return AttackedFact(
        score=name,
        set=PROMISED,
        goal=WrongAnswer.spec,
        attack=attack.name,
        index=row,
        image_id=result.job.image_id,
        clean=clean,
        attacked=-result.margin,
        outcome=result.outcome,
        steps=result.steps,
        passes=result.passes,
        linf=result.linf,
        l2=result.l2,
        seconds=result.seconds,
    )


def _with(work: ScoreAttacks, name: str, outcome: str) -> set[str]:
    """Return the images of which some attack had that outcome."""
    return {
        fact.image_id
        for fact in work.ledger.found.values()
        if (fact.score, fact.set) == (name, PROMISED) and fact.outcome == outcome
    }
