"""Known images made adversarial without regard to any score: do scores notice them?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustvlm.attacks import FOOLED, Job, LaneAttack, LaneEngine, Misclassify, Oracle, ThreatModel
from robustvlm.defenses import Classifier
from robustvlm.evaluation import checks
from robustvlm.evaluation.detecting.encoding import Encoded, answers
from robustvlm.evaluation.images import Picture
from robustvlm.evaluation.questions import ask


class Logits(nn.Module):
    """The logits of a classifier alone, [B, K]: its acceptance score is left aside."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, K]."""
        return self.classifier(pixels)[:, : len(self.classifier.class_names)]


def fool(
    classifier: Classifier, pictures: list[Picture], attack: LaneAttack, threat: ThreatModel, *, lanes: int, seed: int
) -> Encoded:
    """Attack images that are classified right; return what the model says of those that are wrong at the end.

    No image leaves at its first success: it would stand on the border of two classes, where any score of confidence
    finds it. The attack goes on to the most wrong image it can find.

    Args:
        pictures: images of known classes, each classified right.
    """
    oracle = Oracle(Logits(classifier), device=classifier.device, seed=seed)
    rows = [pictures[i % len(pictures)] for i in range(lanes)]
    labels = torch.tensor([picture.label for picture in rows])
    found, _ = ask(oracle, torch.stack([picture.pixels for picture in rows]), labels, model=classifier.spec)
    checks.require_independent_rows(found, classifier.spec)
    engine = LaneEngine(
        oracle,
        checks.fit_for(attack, found),
        threat,
        lanes=found.rungs[0],
        rungs=found.rungs,
        seed=seed,
        goal=Misclassify(),
        leave=False,
    )
    jobs = (Job(picture.id, number, picture.pixels, picture.label) for number, picture in enumerate(pictures))
    fooled = sorted((r for r in engine.run(jobs) if r.outcome == FOOLED), key=lambda result: result.job.index)
    if not fooled:
        return Encoded([], torch.zeros(0, dtype=torch.int64), None, None)
    with torch.inference_mode():
        features, output = answers(classifier, torch.stack([result.adversarial for result in fooled]))
    ids, wanted = [r.job.image_id for r in fooled], torch.tensor([r.job.label for r in fooled])
    return Encoded(ids, wanted, features, output)
