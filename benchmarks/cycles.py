"""What cycle detection saves in Linf PGD with a fixed step size: same answers, fewer passes.

python -m benchmarks.cycles MODEL --data DATA --limit 100 --eps 4/255
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.common import Subject, exit_code_of, load_subject, markdown
from robustvlm.attacks import PGD, LaneEngine, Oracle, Result, ThreatModel, parse_eps


def main() -> None:
    """Run PGD with and without cycle detection over step sizes and step counts; print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--eps", default="4/255")
    parser.add_argument("--steps", default="100,1000")
    parser.add_argument("--step-shares", default="0.25,1,2", help="step sizes as shares of eps")
    options = parser.parse_args()
    (_, eps), *_ = parse_eps(options.eps)
    subject = load_subject(options.model, options.data, options.limit)
    rows: list[list[object]] = []
    for steps in map(int, options.steps.split(",")):
        for share in map(float, options.step_shares.split(",")):
            with_cycles, without = (_run(subject, eps, steps, share * eps, detect) for detect in (True, False))
            same = [_facts(a) == _facts(b) for a, b in zip(with_cycles, without, strict=True)]
            robust = [i for i, result in enumerate(without) if result.outcome == "robust"]
            made = sum(with_cycles[i].steps for i in robust), sum(without[i].steps for i in robust)
            rows.append([steps, f"{share:g} eps", len(robust), f"{made[1]:,}", f"{made[0]:,}", _ratio(made), all(same)])
    print(f"{options.model} on {options.data}, Linf eps {options.eps}, {len(subject.jobs)} images right when clean\n")
    print(markdown(("steps", "step size", "robust images", "their steps", "with detection", "ratio", "same"), rows))


def _run(subject: Subject, eps: float, steps: int, step_size: float, detect: bool) -> list[Result]:
    attack = PGD(n_iter=steps, step_size=step_size, detect_cycles=detect)
    engine = LaneEngine(Oracle(subject.classifier), attack, ThreatModel("Linf", eps), lanes=64, seed=0)
    return sorted(engine.run(subject.jobs), key=lambda result: result.job.index)


def _facts(result: Result) -> tuple[object, ...]:
    return result.outcome, result.prediction, result.margin, result.linf


def _ratio(made: tuple[int, int]) -> str:
    return f"{made[0] / made[1]:.2f}" if made[1] else "-"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
