"""Measure the bundled model on every style: python -m tools.evaluate_tiny (--help for the options)

The validation style chooses between runs; the test style (Twemoji) is for final figures only and is left out
unless --test is given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from robustvlm.data.emoji import TEST_STYLE, TRAIN_STYLES, VALIDATION_STYLE, EmojiSource
from tools.tiny import network
from tools.tiny.measures import Encoded, Heads, accuracies, encode, separation


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=network.FOLDER)
    parser.add_argument("--copies", type=int, default=4, help="backgrounds and placements per drawing")
    parser.add_argument("--test", action="store_true", help="also measure the test style: final figures only")
    parser.add_argument("--seen", action="store_true", help="also measure the six training styles (a measure of fit)")
    parser.add_argument("--record", action="store_true", help="write the figures into the folder's training.json")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def splits(options: argparse.Namespace) -> dict[str, str]:
    """Return the styles to measure and the split each belongs to."""
    chosen = {VALIDATION_STYLE: "val"}
    if options.seen:
        chosen |= dict.fromkeys(TRAIN_STYLES, "train")
    if options.test:
        chosen |= {TEST_STYLE: "test"}
    return chosen


def main() -> None:
    """Print a line per style and, on request, record everything."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    model = network.load(options.folder)
    heads = Heads.build(model)
    scale = model.logit_scale.exp().item()

    def read(split: str, style: str) -> Encoded:
        return encode(model, EmojiSource(split=split, labels="all", styles=[style], copies=options.copies))

    figures: dict[str, dict[str, float]] = {}
    for style, split in splits(options).items():
        known = read(split, style)
        figures[style] = accuracies(known, heads) | {"images": len(known.labels)}
        for name in ("near", "far"):
            figures[style][f"auroc_{name}"] = separation(known, read(name, style), heads, scale=scale)
        print(style, figures[style], flush=True)
    if options.record:
        path = options.folder / "training.json"
        content = json.loads(path.read_text(encoding="utf-8")) | {"measured": figures}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
