"""What certificates for all wordings, and for changed words, leave of the usual ones, from the same copies.

    python -m benchmarks.wordings tiny --data emoji --sigma 0.02 --limit 30

Every image is certified by the mean feature and by vote: for the usual texts (all templates averaged), for every
template and their average at once (T23), and by the vote of copies that each read one template, with up to 0, 1 or 2
words of the prompts changed (T24).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.common import certifying, exit_code_of, markdown
from robustvlm.certify import Certifier, ClassRadius, Finding, VoteRadius
from robustvlm.certify.claims.changed_words import WordsRadius
from robustvlm.certify.claims.wordings import AnyWordingRadius, SureVoteRadius
from robustvlm.certify.normal import Array
from robustvlm.certify.wordings import Wordings
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_pipeline, smooth
from robustvlm.models.zero_shot import class_embeddings

WORDS = 2


def main() -> None:
    """Measure, then print the table."""
    parser = certifying(__doc__, limit=30, samples=600, sigma=0.02)
    parser.add_argument("--alpha", type=float, default=0.001)
    options = parser.parse_args()
    source, vlm = open_data(options.data), load_pipeline(options.model)
    model, names = smooth(vlm, options.sigma), list(source.class_names)
    usual = class_embeddings(vlm, names, source.templates).double().numpy()
    tables = [class_embeddings(vlm, names, [one]).double().numpy() for one in source.templates]
    each = Wordings(tuple(np.stack(rows) for rows in zip(*tables, strict=True)), aligned=True)
    all_of = Wordings(tuple(np.stack(rows) for rows in zip(usual, *tables, strict=True)), aligned=True)
    how = {
        "text": usual, "sigma": options.sigma, "alpha": options.alpha, "n": options.samples,
        "n_pilot": options.samples // 10,
    }  # fmt: skip
    kinds: dict[str, Callable[[], Certifier]] = {
        "mean, usual texts": lambda: ClassRadius(**how, baselines=False),
        f"mean, all {len(tables) + 1} wordings at once": lambda: AnyWordingRadius(wordings=all_of, **how),
        "vote, usual texts": lambda: VoteRadius(**how),
        f"vote, all {len(tables) + 1} wordings at once": lambda: SureVoteRadius(wordings=all_of, **how),
    }
    for words in range(WORDS + 1):
        name = f"vote, each copy by one of {len(tables)} templates, {words} words changed"
        kinds[name] = lambda words=words: WordsRadius(wordings=each, words=words, **how)  # type: ignore[misc]
    found: dict[str, list[tuple[Finding, int]]] = {name: [] for name in kinds}
    for sample in source.samples(limit=options.limit):
        if isinstance(sample, Sample):
            torch.manual_seed(derive_seed(0, "wordings", sample.id))
            pixels = to_pixels(sample.image, vlm.framing)[None]
            copies = model.noisy_features(pixels, options.samples)[0].double().numpy()
            for name, kind in kinds.items():
                found[name].append((_fed(kind(), copies), sample.label))
    print(table(found))


def _fed(certifier: Certifier, copies: Array) -> Finding:
    start = 0
    while (wanted := certifier.request()) is not None:
        certifier.take(copies[start : start + wanted.sure])
        start += wanted.sure
    return certifier.finding()


def table(found: dict[str, list[tuple[Finding, int]]]) -> str:
    """Return, by kind of certificate, how many images are right and certified, and the mean radius (0 where wrong)."""
    rows = []
    for name, pairs in found.items():
        worth = np.array([one.radius if one.prediction == label else 0.0 for one, label in pairs])
        right = np.mean([one.prediction == label for one, label in pairs])
        rows.append([name, f"{right:.1%}", f"{np.mean(worth > 0):.1%}", f"{worth.mean():.4f}"])
    return markdown(["certificate", "right", "right and certified", "mean radius"], rows)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
