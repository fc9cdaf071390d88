"""Gaussian robustness, certificates and accuracy of a smoothed encoder: alone, with purifier, with mapper, with both.

    python -m benchmarks.purify.scores tiny --data emoji --train-data "emoji?split=train" --seeds 0,1 --out scores.jsonl

For every seed a purifier and a mapper behind it are trained, and a mapper for the encoder alone (`--runs` keeps them).
Every image gets one set of noise per level,
the same for all variants and seeds; all columns of a variant come from the same noisy features, each at its own alpha.
A line of JSON per image, level, variant and seed is appended to `--out`; the same command goes on where it was stopped,
lines of that label made with another model, other data or other settings are refused, and `--tables` only prints what
is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import MADE_WITH, exit_code_of, require_made_with
from benchmarks.purify.columns import columns
from benchmarks.purify.tables import print_tables
from benchmarks.purify.training import trained
from robustvlm import certify
from robustvlm.certify.noise import noise_chunk, stream_seed
from robustvlm.core.framing import to_pixels
from robustvlm.data import open_data
from robustvlm.data.source import DataSource, Sample
from robustvlm.defenses import Classifier, load_pipeline
from robustvlm.defenses.purify import PurifiedVLM
from robustvlm.models import VLM, zero_shot

VARIANTS = ("encoder", "mapper", "purifier", "both")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--label", help="how the tables name the model [default: the model]")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--train-data", default="emoji?split=train")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--sigma", default="0.12,0.25,0.5", help="levels to measure; all are trained for")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--mapper-steps", type=int, default=400)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("runs/purify-scores.jsonl"))
    parser.add_argument("--tables", action="store_true", help="print the tables of --out and measure nothing")
    return parser.parse_args()


def main() -> None:
    """Train and measure what is missing, then print the tables."""
    options = arguments()
    if not options.tables:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        known = lines(options.out)
        with options.out.open("a", encoding="utf-8") as out:
            if out.tell():
                out.write("\n")  # a line torn by a kill must not be continued
            for line in measure(options, known):
                out.write(json.dumps(line) + "\n")
                out.flush()
    print_tables(lines(options.out))


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file of results."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def measure(options: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a line per image, level, variant and seed that is not among the known ones.

    Raises:
        UserError: a known line of that label was made with another model, other data or other settings.
    """
    source, label = open_data(options.data), options.label or options.model
    encoder = load_pipeline(options.model).to(memory_format=torch.channels_last)
    of = {"model": encoder.fingerprint, "data": source.fingerprint()}
    of |= {"train_data": open_data(options.train_data).fingerprint()}
    of |= {name: getattr(options, name) for name in ("steps", "mapper_steps", "precision")}
    for line in known:
        if line["label"] == label:
            require_made_with(options.out, line.get(MADE_WITH), of)
    done = {tuple(line[name] for name in ("label", "n", "image", "sigma", "variant", "seed")) for line in known}
    text = zero_shot(encoder, source.class_names, source.templates).class_embeddings.double().numpy()
    shared = {"label": label, "steps": options.steps, "mapper_steps": options.mapper_steps, "out": options.runs}
    shared |= {"precision": options.precision}
    for seed in map(int, options.seeds.split(",")):
        both, alone = (
            load_pipeline(str(trained(options.model, options.train_data, seed=seed, only=only, **shared)))
            for only in (None, "mapper")
        )
        assert isinstance(both, PurifiedVLM)
        assert isinstance(alone, PurifiedVLM)
        both.to(memory_format=torch.channels_last)
        for image, sample in pictures(source, encoder, options.limit):
            for sigma in map(float, options.sigma.split(",")):
                key = {"label": label, "image": sample.id, "sigma": sigma, "seed": seed}
                # The encoder alone is the same for every seed.
                asked = (label, options.samples, sample.id, sigma)
                wanted = [name for name in VARIANTS if (*asked, name, seed) not in done]
                wanted = [name for name in wanted if name != "encoder" or seed == int(options.seeds.split(",")[0])]
                if not wanted:
                    continue
                anchor, found = features(both, alone, image, sample.id, sigma, wanted, options)
                for name in wanted:
                    values = columns(found[name], anchor, text, sigma)
                    right, pilot = (values.pop(which) == sample.label for which in ("class", "pilot_class"))
                    facts = {**key, "variant": name, "n": options.samples, MADE_WITH: of}
                    yield {**facts, "right": right, "pilot_right": pilot, **values}


def pictures(source: DataSource, vlm: VLM | Classifier, limit: int) -> Iterator[tuple[Tensor, Sample]]:
    """Yield images at the model's size."""
    for sample in source.samples(limit=limit):
        if isinstance(sample, Sample):
            yield to_pixels(sample.image, vlm.framing), sample


def features(
    both: PurifiedVLM,
    alone: PurifiedVLM,
    image: Tensor,
    image_id: str,
    sigma: float,
    wanted: list[str],
    options: argparse.Namespace,
) -> tuple[Any, dict[str, Any]]:
    """Return the encoder's clean feature, and features [n, D] of noisy copies for every wanted variant."""
    stream, n = stream_seed(0, image_id, "estimation"), options.samples
    noise = torch.cat([noise_chunk(stream, i, image.shape) for i in range(certify.noise.chunks_of(n))])[:n]
    noisy = (image + sigma * noise).contiguous(memory_format=torch.channels_last)
    half = torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16")
    found: dict[str, Tensor] = {}
    assert both.purifier is not None
    assert both.mapper is not None
    assert alone.mapper is not None
    with torch.inference_mode(), half:
        anchor = both.base.encode_image(image[None])
        if {"encoder", "mapper"} & set(wanted):
            found["encoder"] = both.base.encode_image(noisy)
            found["mapper"] = unit(alone.mapper(found["encoder"], sigma))
        if {"purifier", "both"} & set(wanted):
            found["purifier"] = both.base.encode_image(both.purifier(noisy, sigma))
            found["both"] = unit(both.mapper(found["purifier"], sigma))
    return rows(anchor)[0], {name: rows(value) for name, value in found.items()}


def unit(features: Tensor) -> Tensor:
    """Return rows at unit norm, in float32."""
    return torch.nn.functional.normalize(features.float(), dim=1)


def rows(features: Tensor) -> np.ndarray:
    """Return features as float64."""
    return features.double().numpy()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
