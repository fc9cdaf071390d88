"""Operating points of the deployed rule: which score of known images' features lets the fewest unknown images in.

    python -m benchmarks.immunity.rules --out runs/immunity-rules.json

The default of `immunize` on the bundled data is the largest cosine to a prototype. Beside it stand cosines after an
affine map (whitening within classes, centring), the lead over the next classes, sums of standardised scores, and a
threshold by the class's name or its own level. `chosen` takes of all maps and leads the one that known classes left out
in turn ask for (gain of AUROC above its standard error, as for the weight of antibodies), nothing where none does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.defenses.immunity import fit_prototypes
from robustvlm.defenses.immunity.thresholds import fit_thresholds, name_density
from robustvlm.detect import GDA, Energy, Head
from robustvlm.detect.metrics import auroc, fpr_at_tpr

from .run import Row, paired, table
from .sets import Task, emoji_splits, texts_of
from .variants import MISS, Array

FOLDS = 5
SHRINKAGE = (0.5, 0.2, 0.1, 0.05)
LEADS = (0.1, 0.25, 0.5)
AHEAD_OF = 5
DEFAULT = "default: largest cosine"

# From unit features [N, D] and prototypes [K, D] to the score of each class, [N, K].
ByClass = Callable[[Tensor, Tensor], Tensor]


def plain(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return cosines."""
    return features @ prototypes.T


def affine(matrix: Tensor, centre: Tensor) -> ByClass:
    """Return cosines after z -> matrix (z - centre)."""

    def found(features: Tensor, prototypes: Tensor) -> Tensor:
        a, b = (F.normalize((part - centre) @ matrix.T, dim=1) for part in (features, prototypes))
        return a @ b.T

    return found


def lead(weight: float) -> ByClass:
    """Return cosines less a weighted mean of the five next ones, which the largest alone is read of."""

    def found(features: Tensor, prototypes: Tensor) -> Tensor:
        cosines = features @ prototypes.T
        following = cosines.topk(min(AHEAD_OF + 1, cosines.shape[1]), dim=1).values[:, 1:]
        return cosines - weight * following.mean(dim=1, keepdim=True)

    return found


def within(features: Tensor, labels: Tensor) -> Tensor:
    """Return the covariance [D, D] of features around the means of their classes, trace D."""
    centred = torch.cat([features[labels == k] - features[labels == k].mean(dim=0) for k in labels.unique()])
    found = centred.T @ centred / len(centred)
    return found * (len(found) / found.trace())


def whitener(covariance: Tensor, shrinkage: float) -> Tensor:
    """Return the inverse square root of a covariance drawn towards the identity."""
    values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * torch.eye(len(covariance)))
    return vectors @ torch.diag(values.clamp_min(1e-6).rsqrt()) @ vectors.T


def candidates(task: Task) -> dict[str, ByClass]:
    """Return the scores among which known classes choose."""
    dim, mean = task.fit.features.shape[1], task.fit.features.mean(dim=0)
    identity, nothing = torch.eye(dim), torch.zeros(dim)
    found: dict[str, ByClass] = {"centred": affine(identity, mean)}
    for name, part in (("learnt", task.fit), ("held-out", task.held_out)):
        covariance = within(part.features, part.labels)
        for share in SHRINKAGE:
            found[f"whitened by {name} images, {share:g}"] = affine(whitener(covariance, share), nothing)
            found[f"whitened by {name} images, {share:g}, centred"] = affine(whitener(covariance, share), mean)
    return found | {f"lead, weight {weight:g}": lead(weight) for weight in LEADS}


def chosen(task: Task, prototypes: Tensor, scores: Mapping[str, ByClass]) -> str:
    """Return the name that known classes left out in turn ask for; the default where none gains beyond noise."""
    held = task.held_out
    fold = torch.randperm(len(prototypes), generator=generator(0, "classes left out")) % FOLDS
    gains: dict[str, list[float]] = {name: [] for name in scores}
    for number in range(FOLDS):
        kept, unknown = prototypes[fold != number], (fold[held.labels] == number).numpy()

        def area(score: ByClass, kept: Tensor = kept, unknown: npt.NDArray[np.bool_] = unknown) -> float:
            values = score(held.features, kept).amax(dim=1).double().numpy()
            return auroc(values[~unknown], values[unknown])

        base = area(plain)
        for name, score in scores.items():
            gains[name].append(area(score) - base)
    best = max(gains, key=lambda name: float(np.mean(gains[name])))
    error = float(np.std(gains[best], ddof=1)) / FOLDS**0.5
    return best if np.mean(gains[best]) > error else DEFAULT


def rows_of(task: Task) -> list[Row]:
    """Return the row of every rule on one task."""
    text, fit, held = texts_of(task), task.fit, task.held_out
    prototypes = fit_prototypes(fit.features, fit.labels, text).vectors[:, 0]
    parts = {"": task.known, **task.unknown}
    scores = candidates(task)
    best = chosen(task, prototypes, scores)
    found = []

    def add(name: str, score: Callable[[Tensor], Tensor], per_class: str = "", note: str = "") -> None:
        values = {key: score(part.features).double().numpy() for key, part in parts.items()}
        said = {key: (part.features @ prototypes.T).argmax(1).numpy() for key, part in parts.items()}
        right = (held.features @ prototypes.T).argmax(1) == held.labels
        known, labels = score(held.features[right]).double().numpy(), held.labels[right].numpy()
        offset = offsets(per_class, known, labels, text)
        shifted = {key: values[key] - offset[said[key]] for key in values}
        threshold = fit_thresholds(known - offset[labels], labels, len(text), rule="pooled", miss=MISS, tail=0.5)
        found.append(_row(task, name, shifted, float(threshold.values[0]), note, said[""] == task.known.labels.numpy()))

    add(DEFAULT, lambda z: plain(z, prototypes).amax(1))
    for name, score in scores.items():
        add(name, lambda z, score=score: score(z, prototypes).amax(1))  # type: ignore[misc]
    pick = scores.get(best, plain)
    add("chosen by known classes", lambda z: pick(z, prototypes).amax(1), note=best)
    add("less the density of its name", lambda z: plain(z, prototypes).amax(1), "density")
    add("in units of its class", lambda z: plain(z, prototypes).amax(1), "class")
    head = Head(text, task.vlm.logit_scale)
    gda, energy = GDA(head).fit_features(fit.features, fit.labels), Energy(head)
    standard = {"cosine": lambda z: plain(z, prototypes).amax(1), "GDA": gda.score, "energy": energy.score}
    for names in (("GDA",), ("cosine", "GDA"), ("cosine", "energy"), ("cosine", "GDA", "energy")):
        add(" + ".join(names), together([standard[name] for name in names], held.features))
    return found


def together(scores: list[Callable[[Tensor], Tensor]], held: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the sum of scores, each in units of its spread over held-out known images."""
    units = [(float(score(held).mean()), float(score(held).std())) for score in scores]
    return lambda z: sum(((score(z) - m) / s for score, (m, s) in zip(scores, units, strict=True)), torch.zeros(len(z)))


def offsets(kind: str, scores: Array, labels: npt.NDArray[np.int64], text: Tensor) -> Array:
    """Return what comes off the score of each class [K]: nothing, a line in name density, or its mean, shrunk."""
    count = len(text)
    if kind == "density":
        density = name_density(text)
        slope, start = np.polyfit(density[labels], scores, 1)
        return np.asarray(start + slope * density)
    if kind == "class":
        images = np.bincount(labels, minlength=count)
        total = np.bincount(labels, weights=scores, minlength=count)
        return np.asarray((total + 8 * scores.mean()) / (images + 8))
    return np.zeros(count)


def _row(task: Task, name: str, values: Mapping[str, Array], threshold: float, note: str, right: Array) -> Row:
    known = values[""]
    sets = {
        key: {
            "auroc": auroc(known, other),
            "low": 0.0,
            "high": 1.0,
            "fpr95": fpr_at_tpr(known, other),
            "accepted": float((other > threshold).mean()),
        }
        for key, other in values.items()
        if key
    }
    accepted = float((known > threshold).mean())
    return {
        "task": task.name,
        "score": name,
        "seed": 0,
        "accuracy": float(np.mean(right)),
        "accepted_known": accepted,
        "sets": sets,
        "note": note,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, default=Path("runs/benchmark-immunity"))
    parser.add_argument("--out", type=Path, default=Path("runs/immunity-rules.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Row] = [row for task in emoji_splits(given.features) for row in rows_of(task)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    names = list(dict.fromkeys(row["score"] for row in found))
    print(table(found))
    print("\nchosen:", ", ".join(row["note"] for row in found if row["note"]))
    for name in names[1:]:
        print("\n" + paired(found, name, [DEFAULT]))


if __name__ == "__main__":
    main()
