"""White-box feature attacks on a plain, a smoothed and a smoothed and purified encoder: success rate and cosine.

    python -m benchmarks.purify.attacks plain=tiny smoothed=tiny+smooth:0.25:8 purified=runs/RUN+smooth:0.25:8

PGD on the cosine to the model's own clean feature, in l-inf and l2, 100 steps with restarts, through all of the model:
every gradient is a mean over `--eot` calls of N0 fresh draws each (EOT), every success is judged on fresh draws. An
attack succeeds where the cosine falls below `--min-cos`. Runs go on where they were stopped.
`right, attacked` is accuracy where the feature attack ended; an attack on the class itself may lower it further.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.common import exit_code_of, markdown
from robustvlm.commands.attack import attack
from robustvlm.data import open_data
from robustvlm.defenses import SmoothedVLM, load_classifier
from robustvlm.stats import mean, rate

_GUESSES = ("clean_prediction", "adversarial_prediction")


def main() -> None:
    """Attack every model in both norms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="LABEL=SPEC")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--eps", default="Linf:4/255,Linf:8/255,L2:0.5,L2:1")
    parser.add_argument("--min-cos", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--eot", type=int, default=2)
    parser.add_argument("--draws", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    rows = []
    for item in options.models:
        label, _, spec = item.partition("=")
        for threat in options.eps.split(","):
            norm, _, eps = threat.partition(":")
            rows.append([label, norm, eps, *_attacked(options, spec, norm, eps)])
            print(f"{label} {norm} {eps}: {', '.join(rows[-1][3:])}", flush=True)
    header = [
        "model",
        "norm",
        "radius",
        f"success, cos < {options.min_cos:g}",
        "mean cosine",
        "right, clean",
        "right, attacked",
        "images",
        "seconds an image",
    ]
    print("\n" + markdown(header, rows))


def _attacked(options: argparse.Namespace, spec: str, norm: str, eps: str) -> list[str]:
    """Run one attack, or find it again, and return its cells."""
    source = open_data(options.data)
    random = isinstance(load_classifier(spec, source.class_names, source.templates).vlm, SmoothedVLM)
    run = attack(
        model=spec,
        data=options.data,
        goal="feature",
        min_cos=options.min_cos,
        attack=f"pgd:steps={options.steps}",
        restarts=options.restarts,
        norm=norm,
        eps=eps,
        limit=options.limit,
        eot=options.eot if random else 1,
        draws=options.draws if random else 1,
        lanes=options.limit,
        checks="none",
        out=options.out,
    )
    summary = run.summary
    table = pq.read_table(run.folder / "results.parquet").to_pylist()
    broken = rate(sum(row["cosine"] < options.min_cos for row in table), len(table))
    cosine = mean([row["cosine"] for row in table], within=(-1.0, 1.0))
    right = (rate(sum(row[guess] == row["label"] for row in table), len(table)) for guess in _GUESSES)
    seconds = summary.cost.seconds / max(1, len(table)) if summary.cost is not None else 0.0
    return [
        f"{broken.value:.2f} ({broken.low:.2f} to {broken.high:.2f})",
        f"{cosine.value:.3f} ({cosine.low:.3f} to {cosine.high:.3f})",
        *(f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})" for found in right),
        str(len(table)),
        f"{seconds:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
