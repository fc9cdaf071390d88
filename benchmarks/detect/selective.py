"""Promised answers on CIFAR-10: how many are given at a promised share of right ones, and what attacks make of them.

    ROBUSTVLM_CIFAR10=runs/cifar10 python -m benchmarks.detect.selective --train TRAIN.parquet --test TEST.parquet

Half of the test images sets the thresholds of every score, one for all or one for each class said; the other half is
judged. Where a threshold may stand is told by the scores of the judged images, without their labels, so that all
calibration images test. SDM and nearest neighbours learn from training images. Attacked images: PGD on the
cross-entropy, and an attack that knows what SDM looks at, which draws the feature to known images of a wrong class; a
wrong answer of either counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import exit_code_of, markdown
from benchmarks.detect.sources import Kept
from benchmarks.finetune.measure import Images
from benchmarks.finetune.sets import read_images
from robustvlm.attacks import ThreatModel, parse_eps
from robustvlm.commands.detect.scoring import score_all
from robustvlm.data import open_data
from robustvlm.data.source import select
from robustvlm.defenses import load_classifier
from robustvlm.defenses.finetune import InnerAttack
from robustvlm.defenses.finetune.methods import frozen
from robustvlm.detect import KNN, MSP, SDM, Detector, Energy, Head, MaxLogit, Promise, promise
from robustvlm.models import VLM
from robustvlm.stats import rate
from robustvlm.training import Draws


@dataclass(frozen=True, eq=False)
class Seen:
    """Unit features [N, D] of images and their labels [N], -1 for images of no known class."""

    features: Tensor
    labels: Tensor


def run(options: argparse.Namespace) -> None:
    """Print the table of every score."""
    torch.set_num_threads(1)
    source = open_data(f"parquet:{options.test}")
    kept = Kept(options.cache, load_classifier(options.model, source.class_names, source.templates))
    vlm = kept.classifier.vlm
    assert vlm is not None
    assert kept.classifier.class_embeddings is not None
    head = Head(kept.classifier.class_embeddings, vlm.logit_scale)
    train, test = (
        _seen(kept, f"parquet:{options.train}", options.fit),
        _seen(kept, f"parquet:{options.test}", options.images),
    )
    far = _seen(kept, "emoji", None)
    calibration, judged = Seen(test.features[::2], test.labels[::2]), Seen(test.features[1::2], test.labels[1::2])
    scores: dict[str, Detector] = {
        "MSP": MSP(head),
        "MaxLogit": MaxLogit(head),
        "Energy": Energy(head),
        "kNN": KNN().fit_features(train.features, train.labels),
        "SDM": SDM(head).fit_features(train.features, train.labels),
        "SDM, strict": SDM(head, strict=True).fit_features(train.features, train.labels),
    }
    few = read_images(source, vlm.image_size, _attacked_ids(kept, options))  # type: ignore[arg-type]
    fooled = attacked(vlm, head, train, few, ThreatModel("Linf", parse_eps(options.eps)[0][1]))
    clean = Seen(_encoded(vlm, few.pixels), few.labels)
    print(counts(calibration, judged, far, clean))
    lines = []
    for name, score in scores.items():
        for what, classes in (("all", None), ("each class", len(source.class_names))):
            found = _promise(head, score, calibration, judged.features, options.level, classes)
            cells = _cells(head, score, found, judged, far)
            lines.append([name, what, *cells, *_under(head, score, found, clean, fooled)])
    columns = ["answered", "right of those", "lowest class", "emoji answered"]
    columns += ["clean: right / wrong", "attacked: right / wrong"]
    print(markdown([f"{options.level:g} promised", "of", *columns], lines))


def counts(calibration: Seen, judged: Seen, far: Seen, clean: Seen) -> str:
    """Return how many images the table is of: a file may hold fewer than --images asks for."""
    return (
        f"{len(calibration.labels):,} test images set the thresholds, {len(judged.labels):,} others are judged (their "
        f"scores, without labels, say where thresholds may stand), {len(clean.labels):,} of them attacked, and "
        f"{len(far.labels):,} emoji\n"
    )


def _seen(kept: Kept, spec: str, limit: int | None) -> Seen:
    found = kept.answers(spec, limit)
    assert found.features is not None
    return Seen(found.features, found.labels)


def _attacked_ids(kept: Kept, options: argparse.Namespace) -> list[str]:
    """Return ids of judged images: the odd ones, as all that is judged."""
    ids = kept.answers(f"parquet:{options.test}", options.images).ids
    return select(ids[1::2], options.attacked)


def _promise(
    head: Head, score: Detector, calibration: Seen, others: Tensor, level: float, classes: int | None
) -> Promise:
    """Return the promise of calibration images; the scores of other images, without labels, say where to look."""
    said = head.logits(calibration.features).argmax(1)
    values = score_all(score, calibration.features).numpy()
    right = (said == calibration.labels).numpy()
    looks = score_all(score, others).numpy(), head.logits(others).argmax(1).numpy()
    return promise(values, said.numpy(), right, level=level, classes=classes, looks=looks)


def _answers(head: Head, score: Detector, found: Promise, features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return which images are answered, and the classes said."""
    said = head.logits(features).argmax(1).numpy()
    return found.answered(score_all(score, features).numpy(), said), said


def _cells(head: Head, score: Detector, found: Promise, judged: Seen, far: Seen) -> list[str]:
    answered, said = _answers(head, score, found, judged.features)
    right = said == judged.labels.numpy()
    classes = [k for k in range(len(head.class_embeddings)) if (answered & (said == k)).any()]
    lowest = min((float(right[answered & (said == k)].mean()) for k in classes), default=0.0)
    share = rate(int(right[answered].sum()), int(answered.sum())) if answered.any() else None
    strange = _answers(head, score, found, far.features)[0]
    return [
        f"{answered.mean():.3f}, {len(classes)} classes",
        "" if share is None else f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})",
        f"{lowest:.3f}" if classes else "",
        f"{strange.mean():.3f}",
    ]


def _under(head: Head, score: Detector, found: Promise, clean: Seen, fooled: Mapping[str, Tensor]) -> list[str]:
    """Return right and wrong answers, clean and at the worst of the attacks for each image, as shares of the images.

    In brackets the share of the answers given that are wrong: what a promise is about.
    """
    cells = []
    for views in ((clean.features,), tuple(fooled.values())):
        right, wrong = np.ones(len(clean.labels), dtype=bool), np.zeros(len(clean.labels), dtype=bool)
        for features in views:
            answered, said = _answers(head, score, found, features)
            right &= answered & (said == clean.labels.numpy())
            wrong |= answered & (said != clean.labels.numpy())
        given = int(right.sum() + wrong.sum())
        share = f" ({wrong.sum() / given:.3f} of answers)" if given else ""
        cells.append(f"{right.mean():.3f} / {wrong.mean():.3f}{share}")
    return cells


def attacked(vlm: VLM, head: Head, train: Seen, images: Images, threat: ThreatModel) -> dict[str, Tensor]:
    """Return features of attacked images by attack: pushed from their class, and drawn to known images of another."""
    attack, labels = InnerAttack(threat=threat, steps=20, step_size=threat.eps / 4), images.labels
    draws = Draws(0, 0, list(images.ids))
    own = head.logits(train.features).argmax(1) == train.labels
    support, kept = train.features[own], train.labels[own]

    def misclassified(x: Tensor, _: Tensor | None) -> Tensor:
        return F.cross_entropy(head.logits(vlm.encode_image(x)), labels, reduction="sum")

    with torch.no_grad():
        near = head.logits(vlm.encode_image(images.pixels)).scatter(1, labels[:, None], float("-inf")).argmax(1)

    def drawn(x: Tensor, _: Tensor | None) -> Tensor:
        cosines = (vlm.encode_image(x) @ support.T).masked_fill(kept[None] != near[:, None], -1.0)
        return cosines.topk(10, dim=1).values.sum()

    found = {}
    with frozen(vlm):
        for name, objective in (("misclassified", misclassified), ("drawn", drawn)):
            found[name] = _encoded(vlm, attack(objective, images.pixels, draws, name=name)[0])
    return found


@torch.no_grad()
def _encoded(vlm: VLM, pixels: Tensor) -> Tensor:
    return torch.cat([vlm.encode_image(part).float() for part in pixels.split(100)])


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detect.selective")
    parser.add_argument("--train", type=Path, required=True, help="CIFAR-10 training Parquet file")
    parser.add_argument("--test", type=Path, required=True, help="CIFAR-10 test Parquet file")
    parser.add_argument("--model", default="benchmarks.cifar10.model:load")
    parser.add_argument("--fit", type=int, default=5000, help="training images to learn from")
    parser.add_argument("--images", type=int, default=8000, help="test images; half of them set the thresholds")
    parser.add_argument("--attacked", type=int, default=200)
    parser.add_argument("--eps", default="2/255", help="Linf")
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark-detect"), help="folder of kept features")
    options = parser.parse_args(argv)
    return exit_code_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
