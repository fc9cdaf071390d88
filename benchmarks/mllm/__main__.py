"""Attack the answers of a multimodal model: python -m benchmarks.mllm (--help for the options).

Two tasks, naming and captioning; attacks through the language model and on the tower's tokens, each judged by the
greedy answer; the model by itself, smoothed, and smoothed with a purifier before the tower and a mapper of its tokens.
Attacks look through all of it (fresh draws in every step). Runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import robustvlm
from benchmarks.common import exit_code_of

TASKS = {"naming": "", "captions": "#describe the picture."}
CLAIMS = ("vote", "feature", "tokens")
DEFENCES = ("plain", "smoothed", "purified")
GOALS = {"through the language model": "unsay", "on the tokens": "unsay:features"}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mllm:tiny")
    parser.add_argument("--smooth", default="0.06:4", help="noise level and draws of the smoothed model")
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES), help="rows to make")
    parser.add_argument("--purify-steps", type=int, default=400, help="of the purifier, and of the mapper")
    parser.add_argument("--eps", default="2/255")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--draws", type=int, default=3, help="fresh answers that judge the smoothed model")
    parser.add_argument("--votes", type=int, default=16, help="images whose answers are certified; 0: none")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/mllm"))
    return parser.parse_args()


def attacked(options: argparse.Namespace, task: str, defence: str, goal: str) -> dict[str, Any]:
    """Return the figures of one run."""
    smoothed = "" if defence == "plain" else f"+smooth:{options.smooth}"
    model = purified(options) if defence == "purified" else options.model
    # The question stands last in a spec, so that of a smoothed model the operator follows it.
    run = robustvlm.attack(
        f"{model}{TASKS[task]}{smoothed}",
        goal=GOALS[goal],
        attack=f"pgd:steps={options.steps}",
        eps=options.eps,
        limit=options.limit,
        lanes=32,
        checks="none",
        out=options.out,
        **({"eot": 1, "draws": options.draws} if smoothed else {}),
    )
    found = run.summary.at(options.eps)
    rate = found.attack_success_rate
    return {
        "task": task,
        "defence": defence,
        "attack": goal,
        "right": run.summary.images.exposed,
        "asr": rate.model_dump(),
        "images": run.summary.images.evaluated,
    }


def purified(options: argparse.Namespace) -> Path:
    """Return the model between a purifier and a mapper for the noise of the smoothing, trained where it is not yet."""
    sigma, steps = float(options.smooth.partition(":")[0]), options.purify_steps
    run = robustvlm.purify(
        options.model, sigma=[sigma], steps=steps, mapper_steps=steps, batch_size=32, out=options.out, name="purified"
    )
    return Path(run.folder)


def certified(options: argparse.Namespace, claim: str) -> dict[str, Any]:
    """Return what is certified of some images, by the vote of whole answers or of the mean of the tokens."""
    sigma = float(options.smooth.partition(":")[0])
    run = robustvlm.certify(
        options.model, claim=claim, sigma=sigma, samples=options.samples, limit=options.votes, out=options.out
    )
    return {"claim": claim, "summary": run.summary.model_dump(mode="json")}


def main() -> None:
    """Make every run and write the figures."""
    options = parse_arguments()
    rows: list[dict[str, Any]] = []
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(row: dict[str, Any], began: float) -> None:
        rows.append(row | {"seconds": round(time.monotonic() - began)})
        (options.out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(rows[-1])[:300], flush=True)

    for defence in options.defences:
        for goal in GOALS:
            for task in TASKS:
                began = time.monotonic()
                keep(attacked(options, task, defence, goal), began)
    for claim in CLAIMS if options.votes else ():
        began = time.monotonic()
        keep(certified(options, claim), began)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
