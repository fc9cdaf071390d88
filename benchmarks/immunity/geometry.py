"""Does the spread of a class's features tell how well it is recognised, and told from unknown images? Class by class.

    python -m benchmarks.immunity.geometry

All 173 classes of the bundled data: the participation ratio of a class's training images (six styles), against what
happens on Twemoji, an unseen style: the share of its images that are right, and the AUROC of their largest cosine to a
class text against near and far unknown images. Spearman's correlation over classes, bootstrap intervals over classes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.common import markdown
from robustvlm.data import open_data
from robustvlm.defenses import load_pipeline
from robustvlm.detect import class_dimensions
from robustvlm.detect.metrics import auroc
from robustvlm.models.zero_shot import class_embeddings

from .sets import STYLE, encoded
from .variants import Array

DRAWS = 1000


def correlation(one: Array, other: Array) -> str:
    """Return Spearman's correlation over the classes where both are known, with a bootstrap interval over classes."""
    there = np.isfinite(one) & np.isfinite(other)
    x, y, draws = one[there], other[there], np.random.default_rng(0)
    picked = [draws.integers(0, len(x), len(x)) for _ in range(DRAWS)]
    low, high = np.quantile([spearmanr(x[rows], y[rows]).statistic for rows in picked], [0.025, 0.975])
    return f"{spearmanr(x, y).statistic:+.2f} ({low:+.2f} to {high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, default=Path("runs/benchmark-immunity"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    vlm = load_pipeline("tiny")
    source = open_data("emoji?split=train&copies=4&labels=all")
    fit = encoded(vlm, source, given.features, "emoji-train-all")
    judged = encoded(vlm, open_data("emoji?split=test&copies=4&labels=all"), given.features, "emoji-test-all")
    text = class_embeddings(vlm, source.class_names, source.templates).float().cpu()
    cosines, classes = judged.features @ text.T, len(text)
    said, leading = cosines.argmax(dim=1), cosines.amax(dim=1).double().numpy()
    labels = judged.labels.numpy()
    outcome = {"right": np.array([float((said == judged.labels)[labels == k].double().mean()) for k in range(classes)])}
    for split in ("near", "far"):
        other = open_data(f"emoji?split={split}&styles={STYLE['test']}&copies=4")
        strange = (encoded(vlm, other, given.features, f"emoji-{split}-test").features @ text.T).amax(dim=1)
        own = [leading[labels == k] for k in range(classes)]
        outcome[f"AUROC {split}"] = np.array(
            [auroc(values, strange.double().numpy()) if len(values) else np.nan for values in own]
        )
    spread = class_dimensions(fit.features, fit.labels, classes)
    within = np.array([float((fit.features[fit.labels == k] @ text[k]).mean()) for k in range(classes)])
    print(f"participation ratio: median {np.nanmedian(spread):.1f}, quartiles {np.nanquantile(spread, [0.25, 0.75])}")
    rows = [[name, *(correlation(values, found) for found in outcome.values())] for name, values in
            (("participation ratio", spread), ("mean cosine to its text", within))]  # fmt: skip
    print(markdown(["of the training images of a class", *outcome], rows))


if __name__ == "__main__":
    main()
