"""Known images made adversarial without regard to any score: do scores notice them?"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from robustvlm import attacks
from robustvlm.attacks.probe import settle_draws
from robustvlm.attacks.threat import ThreatModel
from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.commands.common.questions import ask, fit_for, require_independent_rows
from robustvlm.commands.detect import measures
from robustvlm.commands.detect.encoding import Answers, Encoded, kept
from robustvlm.commands.detect.measures import Scored
from robustvlm.commands.detect.scoring import Panel
from robustvlm.commands.detect.summary import Adversarial, UnderAttack
from robustvlm.core.seeds import derive_seed
from robustvlm.data.source import DataSource, select
from robustvlm.defenses import Classifier
from robustvlm.runs.records import Check
from robustvlm.runs.run import Session


def noticed(
    config: UnderAttack,
    attack: attacks.LaneAttack,
    answers: Answers,
    panel: Panel,
    known: Scored,
    source: DataSource,
    session: Session,
    *,
    seed: int,
) -> tuple[Adversarial | None, list[Check]]:
    """Fool the classifier on half of the known images that it gets right; see which scores tell these from the rest.

    The other half stays as it is: only images that are classified right are attacked, and images that are classified
    wrong are no match for them. A score of confidence tells right from wrong without any attack.
    """
    right = {row for row, pair in enumerate(zip(known.labels, known.predictions, strict=True)) if pair[0] == pair[1]}
    half = half_of({known.groups[row] for row in right})
    if not half:
        return None, [_unasked("the model classifies too few known images right to attack some and leave others")]
    chosen = {known.ids[row] for row in right if known.groups[row] in half}
    images = Images(source, limit=config.limit, resolution=answers.classifier.framing)
    pictures = [p for p in images.stream(lambda name: name in chosen) if isinstance(p, Picture) and p.id in chosen]
    if not pictures:
        return None, [_unasked(f"none of the {config.limit} images that are attacked is among those")]
    fooled = _fooled(config, attack, answers, pictures, session, seed=seed)
    if not fooled.ids:
        return None, [_unasked(f"none of the {len(pictures)} known images that were attacked could be misclassified")]
    apart = {source.group(picture.id) for picture in pictures}
    clean = [row for row in sorted(right) if known.groups[row] not in apart]
    scores = measures.as_arrays(panel.scores(fooled))
    groups = [source.group(name) for name in fooled.ids]
    part = Scored("adversarial", fooled.ids, groups, fooled.labels.tolist(), [-1] * len(groups), scores)
    return measures.summarise_adversarial(known, clean, part, attacked=len(pictures)), []


def half_of(groups: set[str]) -> frozenset[str]:
    """Return half of the groups of images, rounded down, chosen by a hash.

    Example:
        >>> len(half_of({"a", "b", "c"})), half_of({"a"})
        (1, frozenset())
    """
    return frozenset(select(groups, len(groups) // 2) if len(groups) > 1 else ())


def _unasked(why: str) -> Check:
    message = f"Whether scores notice adversarial images was not measured: {why}."
    return Check(name="adversarial images", level="note", message=message)


def _fooled(
    config: UnderAttack,
    attack: attacks.LaneAttack,
    answers: Answers,
    pictures: list[Picture],
    session: Session,
    *,
    seed: int,
) -> Encoded:
    """Return what the model says of the images that are fooled; what a killed run had made of the same is kept."""
    session.observer.begin(f"{attack.name}, misclassify", len(pictures))
    path, threat = session.folder.features_path / "adversarial.safetensors", ThreatModel(config.norm, config.eps)
    make = partial(
        fool, answers, pictures, attack, threat, lanes=config.lanes, seed=seed, on_image=session.observer.advance
    )
    found = kept(path, make, owner=session.manifest)
    if not set(found.ids) <= {picture.id for picture in pictures}:  # an earlier version attacked others
        path.unlink()
        found = kept(path, make, owner=session.manifest)
    return found


class Logits(nn.Module):
    """The logits of a classifier alone, [B, K]: its acceptance score is left aside."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, K]."""
        return self.classifier(pixels)[:, : len(self.classifier.class_names)]


def fool(
    answers: Answers,
    pictures: list[Picture],
    attack: attacks.LaneAttack,
    threat: ThreatModel,
    *,
    lanes: int,
    seed: int,
    on_image: Callable[[], object] = lambda: None,
) -> Encoded:
    """Attack images that a model classifies right; return what it says of those that are wrong at the end.

    No image leaves at its first success: it would stand on the border of two classes, where any score of confidence
    finds it. The attack goes on to the most wrong image it can find.

    Args:
        pictures: images of known classes, each classified right. on_image: is called after each.
    """
    classifier = answers.classifier
    oracle = attacks.Oracle(Logits(classifier), device=classifier.device, seed=seed)
    rows = [pictures[i % len(pictures)] for i in range(lanes)]
    labels = torch.tensor([picture.label for picture in rows])
    found, _ = ask(oracle, torch.stack([picture.pixels for picture in rows]), labels, model=classifier.spec)
    require_independent_rows(found, classifier.spec)
    settle_draws(oracle, found)
    engine = attacks.LaneEngine(
        oracle,
        fit_for(attack, found),
        threat,
        lanes=found.rungs[0],
        rungs=found.rungs,
        seed=seed,
        goal=attacks.Misclassify(),
        leave=False,
    )
    jobs = (attacks.Job(picture.id, number, picture.pixels, picture.label) for number, picture in enumerate(pictures))
    fooled = []
    for result in engine.run(jobs):
        on_image()
        fooled += [result] if result.outcome == attacks.FOOLED else []
    fooled.sort(key=lambda result: result.job.index)
    if not fooled:
        return Encoded([], torch.zeros(0, dtype=torch.int64), None, None)
    ids, wanted = [r.job.image_id for r in fooled], torch.tensor([r.job.label for r in fooled])
    draws = [derive_seed(seed, "fooled", name) for name in ids]
    features, output = answers.drawn(torch.stack([result.adversarial for result in fooled]), draws)
    return Encoded(ids, wanted, features, output)
