"""Ideal and deployed rule side by side, and the published program of Cohen et al. on the same model and images.

    python -m benchmarks.rules tiny --data emoji --name bundled --limit 20 --peer ../smoothing --out rules.jsonl

For every image and noise level the class is certified by the mean and by the vote of the same `--samples` copies, and
the deployed rules answer `--answers` times from `--n0` fresh copies, as `MODEL+smooth:SIGMA:N0:ALPHA[:vote]` does. The
published program certifies from as many copies and answers from as many. A line of JSON per model, image and sigma is
appended to `--out`; the same command goes on where it was stopped, other models are added by other commands, and
`--tables` only prints what is there: one row per model, sigma and rule.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cohen import Published, load_published
from benchmarks.common import MADE_WITH, certifying, exit_code_of, markdown, require_made_with
from benchmarks.deployed_rule import RULES, answers, fed
from robustvlm.certify import vote_predict
from robustvlm.certify.claims.base import pilot_size
from robustvlm.certify.classes import vote_radius
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import SmoothedVLM, load_pipeline, smooth
from robustvlm.models import zero_shot

NAMES = {"mean": "mean", "vote": "vote", "cohen": "vote, published program"}
_SETTINGS = ("name", "sigma", "samples", "n0", "alpha")
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, then print the tables; user errors end in one line and exit code 2."""
    parser = certifying(__doc__, limit=5, samples=400, sigma="0.12,0.25,0.5")
    parser.add_argument("--name", help="of the model in the table (default: its spec)")
    parser.add_argument("--n0", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--answers", type=int, default=4, help="deployments that answer at each image")
    parser.add_argument("--at", default="0.1,0.25", help="radii of the certified accuracies")
    parser.add_argument("--peer", type=Path, help="a copy of github.com/locuslab/smoothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("rules.jsonl"))
    parser.add_argument("--tables", action="store_true", help="print the tables of --out and measure nothing")
    options = parser.parse_args(argv)
    return exit_code_of(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Append a line for every image and noise level that is not there, and print the tables."""
    if not options.tables:
        published = None if options.peer is None else load_published(options.peer)
        rows = lines(options.out)
        with options.out.open("a", encoding="utf-8") as out:
            if out.tell():
                out.write("\n")  # a line torn by a kill must not be continued
            for row in measure(options, published, rows):
                out.write(json.dumps(row) + "\n")
                out.flush()
    print_tables(lines(options.out), [float(radius) for radius in options.at.split(",")])


def lines(path: Path) -> list[Row]:
    """Return the whole lines of a file of rows."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def key(row: Row) -> tuple[Any, ...]:
    """Return what a row is known by: a measurement with the published program is another one than without."""
    return (*(row[name] for name in _SETTINGS), row["image"], "cohen" in row)


@dataclass
class Copies:
    """The smoothed model, with the noisy copies counted that pass through its encoder."""

    model: SmoothedVLM
    rows: int = 0

    def __post_init__(self) -> None:
        encode = self.model.encode_noisy

        def counted(noisy: Tensor) -> Tensor:
            self.rows += len(noisy)
            return encode(noisy)

        self.model.encode_noisy = counted  # type: ignore[method-assign]


def measure(options: argparse.Namespace, published: ModuleType | None, known: Sequence[Row]) -> Iterator[Row]:
    """Yield a row per image and sigma that is not among the known ones.

    Raises:
        UserError: a known row of that name was made with another model or other data, or of other deployments.
    """
    source = open_data(options.data)
    vlm = load_pipeline(options.model, device=options.device).to(memory_format=torch.channels_last)
    of = {"model": vlm.fingerprint, "data": source.fingerprint(), "answers": options.answers}
    for row in known:
        if row["name"] == (options.name or options.model):
            require_made_with(options.out, row.get(MADE_WITH), of)
    done = {key(row) for row in known}
    text = zero_shot(vlm, source.class_names, source.templates).class_embeddings
    samples = [item for item in source.samples(limit=options.limit) if isinstance(item, Sample)]
    for sigma in map(float, options.sigma.split(",")):
        for sample in samples:
            row = {
                "name": options.name or options.model, "sigma": sigma, "samples": options.samples, "n0": options.n0,
                "alpha": options.alpha, "image": sample.id, "label": sample.label, MADE_WITH: of,
            }  # fmt: skip
            if key(row | ({} if published is None else {"cohen": None})) in done:
                continue
            pixels = to_pixels(sample.image, vlm.framing).to(vlm.device)
            # Each program has noise of its own, and the same whatever runs beside it.
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(0, sample.id, repr(sigma), "rules"))
                row |= ours(smooth(vlm, sigma, options.n0), pixels, text, options)
            if published is not None:
                with torch.random.fork_rng():
                    torch.manual_seed(derive_seed(0, sample.id, repr(sigma), "published"))
                    peer = Published(
                        published, lambda noisy: vlm.logit_scale * vlm.encode_image(noisy) @ text.T, len(text), sigma
                    )
                    row["cohen"] = theirs(peer, pixels, options)
            yield row


def ours(model: SmoothedVLM, pixels: Tensor, text: Tensor, options: argparse.Namespace) -> Row:
    """Return what an image is certified for by either rule, and what deployments answer."""
    table, copies, began = text.double().cpu().numpy(), Copies(model), time.process_time()
    rows = model.noisy_features(pixels[None], options.samples)[0].double().cpu().numpy()
    passes = copies.rows
    found: Row = {}
    for name, (kind, _) in RULES.items():
        certifier = kind(
            text=table, sigma=model.sigma, alpha=options.alpha, n=options.samples,
            n_pilot=pilot_size(options.samples, early=False), deployed=options.n0, abstains_at=options.alpha,
            **({"baselines": False} if name == "mean" else {}),
        )  # fmt: skip
        finding = fed(certifier, rows)
        found[name] = {
            "label": finding.prediction,
            "radius": finding.radius,
            "answered": finding.columns["deployed_radius"],
            "passes": passes,
        }
    said = answers(model, pixels[None], text, options)
    for name in RULES:
        found[name] |= {"said": said[name][0], "passes_answer": (copies.rows - passes) / options.answers}
    return found | {"seconds": time.process_time() - began}


def theirs(peer: Published, pixels: Tensor, options: argparse.Namespace) -> Row:
    """Return what the published program certifies and answers, and whether ours says the same of the same votes."""
    began, pilot = time.process_time(), pilot_size(options.samples, early=False)
    n = options.samples - pilot
    label, radius, votes = peer.certify(pixels, pilot, n, options.alpha)
    passes = peer.passes
    heard = [peer.predict(pixels, options.n0, options.alpha) for _ in range(options.answers)]
    spent = time.process_time() - began
    alike = [abs(vote_radius(votes, n, peer.sigma, options.alpha) - radius) <= 1e-6 * peer.sigma]
    # Where classes tie for the first place, both withhold the answer.
    alike += [(-1 if (own := vote_predict(counts, options.alpha)) is None else own) == said for said, counts in heard]
    return {
        "label": label, "radius": radius, "passes": passes, "passes_answer": (peer.passes - passes) / options.answers,
        "said": [said for said, _ in heard], "alike": sum(alike), "judged": len(alike), "seconds": spent,
    }  # fmt: skip


def print_tables(rows: Sequence[Row], at: Sequence[float]) -> None:
    """Print the rows of all models, and how often both programs judged the same votes alike."""
    header = [
        "model", "sigma", "rule", "images", "right and certified, ideal (radius > 0)",
        *(f"at {radius:g}" for radius in at), "not certified", "mean radius, ideal",
        "right and certified to be answered", "mean radius, to be answered", "right, deployed", "no answer, deployed",
        "wrong, deployed", "copies to certify + to answer", "passes to certify + to answer",
        "processor seconds an image",
    ]  # fmt: skip
    print(markdown(header, list(_cells(rows, at))))
    peers = [row["cohen"] for row in rows if "cohen" in row]
    if peers:
        alike, judged = (sum(peer[name] for peer in peers) for name in ("alike", "judged"))
        print(
            f"\nOf the published program's own votes, our radius and answer are the same {alike:,} of {judged:,} times"
        )


def _cells(rows: Sequence[Row], at: Sequence[float]) -> Iterator[list[str]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _SETTINGS), []).append(row)
    for (name, sigma, samples, n0, _), some in groups.items():
        for rule, shown in NAMES.items():
            facts = [row[rule] | {"truth": row["label"]} for row in some if rule in row]
            if not facts:
                continue
            seconds = [row["cohen"]["seconds"] if rule == "cohen" else row["seconds"] for row in some if rule in row]
            passes = (float(np.mean([fact[kind] for fact in facts])) for kind in ("passes", "passes_answer"))
            yield [
                name, f"{sigma:g}", shown, str(len(facts)), *_certified(facts, at), *_deployed(facts),
                f"{samples:,} + {n0:,}", " + ".join(f"{count:,.0f}" for count in passes), f"{np.mean(seconds):.2f}",
            ]  # fmt: skip


def _certified(facts: Sequence[Row], at: Sequence[float]) -> list[str]:
    right = np.array([fact["label"] == fact["truth"] for fact in facts])
    radius = np.array([fact["radius"] for fact in facts])
    shares = [np.mean(right & (radius > 0.0)), *(np.mean(right & (radius >= r)) for r in at), np.mean(radius == 0.0)]
    return [*(f"{share:.1%}" for share in shares), f"{radius.mean():.4f}"]


def _deployed(facts: Sequence[Row]) -> list[str]:
    """Return the cells of the deployed rule; the published program states no radius of it."""
    sure = ["", ""]
    if "answered" in facts[0]:
        good = [fact["answered"] > 0.0 and fact["label"] == fact["truth"] for fact in facts]
        sure = [f"{np.mean(good):.1%}", f"{np.mean([fact['answered'] for fact in facts]):.4f}"]
    clean = [(said, fact["truth"]) for fact in facts for said in fact["said"]]
    shares = (
        np.mean([said == truth for said, truth in clean]),
        np.mean([said < 0 for said, _ in clean]),
        np.mean([said not in (-1, truth) for said, truth in clean]),
    )
    return [*sure, *(f"{share:.1%}" for share in shares)]


if __name__ == "__main__":
    sys.exit(main())
