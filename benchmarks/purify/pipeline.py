"""The whole pipeline against each of its parts alone, in one table.

    python -m benchmarks.purify.pipeline encoder=tiny purified=runs/P+smooth:0.25:16 immunised=runs/I whole=runs/WHOLE

Every column is measured on the same images for every model: accuracy without attack; success rate of an attack on the
answer; certified cosine to the smoothed feature (T4) for noise `--sigma`, and of it to the model's own clean feature,
without noise and with its adapter if it has one (T5 along that feature); AUROC of the model's own score against near
and far unknown images; time.
A model that may refuse is judged by its acceptance score, any other by its largest softmax probability.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import exit_code_of, markdown
from benchmarks.purify.columns import columns
from benchmarks.purify.scores import pictures
from robustvlm.certify.noise import noise_chunk, stream_seed
from robustvlm.commands.attack import attack
from robustvlm.data import open_data
from robustvlm.defenses import Classifier, SmoothedVLM, load_classifier
from robustvlm.detect.metrics import auroc
from robustvlm.models import VLM
from robustvlm.stats import Rate, rate

EPS_CERTIFIED = 0.25


def main() -> None:
    """Measure every model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="LABEL=SPEC")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--near", default="emoji?split=near&copies=1")
    parser.add_argument("--far", default="emoji?split=far&copies=1")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--certify-limit", type=int, default=40)
    parser.add_argument("--attack", default="apgd-ce:steps=25")
    parser.add_argument("--eps", default="2/255")
    parser.add_argument("--attack-limit", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    rows = []
    for item in options.models:
        label, _, spec = item.partition("=")
        rows.append([label, *_measured(options, spec)])
        print("  ".join(rows[-1]), flush=True)
    header = [
        "model",
        "right",
        f"attack, {options.eps}",
        "certified cos",
        "cos to f(x)",
        "AUROC near",
        "far",
        "ms an image",
    ]
    print("\n" + markdown(header, rows))


def _measured(options: argparse.Namespace, spec: str) -> list[str]:
    source = open_data(options.data)
    classifier = load_classifier(spec, source.class_names, source.templates)
    images = [(image, sample.label) for image, sample in pictures(source, classifier, options.limit)]
    torch.manual_seed(0)
    began = time.perf_counter()
    known, answers = _scores(classifier, torch.stack([image for image, _ in images]))
    spent = (time.perf_counter() - began) / len(images)
    right = rate(sum(int(a) == label for a, (_, label) in zip(answers, images, strict=True)), len(images))
    apart = []
    for unknown in (options.near, options.far):
        others = torch.stack([image for image, _ in pictures(open_data(unknown), classifier, options.limit)])
        apart.append(auroc(known, _scores(classifier, others)[0]))
    cosines = _certified(options, classifier)
    return [
        f"{right.value:.2f} ({right.low:.2f} to {right.high:.2f})",
        _attacked(options, spec),
        *(f"{value:.2f}" for value in cosines),
        *(f"{value:.3f}" for value in apart),
        f"{1000 * spent:.1f}",
    ]


def _scores(classifier: Classifier, pixels: torch.Tensor) -> tuple[np.ndarray, list[int]]:
    """Return how known each image looks, and the class it is given."""
    with torch.no_grad():
        output = torch.cat([classifier(part) for part in pixels.split(32)])
    logits = output[:, : len(classifier.class_names)]
    score = output[:, -1] if classifier.can_reject else logits.softmax(dim=1).amax(dim=1)
    return score.double().numpy(), logits.argmax(dim=1).tolist()


def _certified(options: argparse.Namespace, classifier: Classifier) -> tuple[float, float]:
    """Return mean certified cosines at EPS_CERTIFIED, of the model behind noise, whether it is deployed so or not."""
    vlm = classifier.vlm
    assert vlm is not None
    inner: VLM = vlm.base if isinstance(vlm, SmoothedVLM) else vlm
    told = inner.at_noise(options.sigma)
    text = np.eye(2, told.encode_text(["a"]).shape[1])
    found = []
    for image, sample in pictures(open_data(options.data), told, options.certify_limit):
        stream = stream_seed(0, sample.id, "estimation")
        noise = torch.cat([noise_chunk(stream, i, image.shape) for i in range(-(-options.samples // 32))])
        with torch.inference_mode():
            anchor = inner.at_noise(0.0).encode_image(image[None])[0].double().numpy()
            features = told.encode_image(image + options.sigma * noise[: options.samples]).double().numpy()
        found.append(columns(features, anchor, text, options.sigma))
    cos, anchored = (
        float(np.mean([line[f"{name}@{EPS_CERTIFIED}"] for line in found])) for name in ("cos", "anchored")
    )
    return cos, anchored


def _attacked(options: argparse.Namespace, spec: str) -> str:
    run = attack(
        model=spec,
        data=options.data,
        attack=options.attack,
        eps=options.eps,
        limit=options.attack_limit,
        eot=1,
        draws=5,
        lanes=options.attack_limit,
        checks="none",
        out=options.out,
    )
    return success(run.summary.per_eps[0].attack_success_rate)


def success(found: Rate) -> str:
    """Return a success rate with its interval; of a model that is right on no image there is none."""
    return "no images" if found.value is None else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
