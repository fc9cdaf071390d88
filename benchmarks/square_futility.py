"""What Square's futility stop saves, and what it loses: the same images, draws and budget with and without it.

    python -m benchmarks.square_futility MODEL --data DATA --limit 100 --eps 4/255

Images are those that the model gets right when clean; with `--left-robust`, those that APGD-CE and APGD-T leave robust,
which is where Square's budget goes in AutoAttack.
"""

from __future__ import annotations

import argparse

from benchmarks.common import load_subject, markdown
from robustvlm.attacks import (
    Job,
    LaneAttack,
    LaneEngine,
    Oracle,
    Result,
    Square,
    ThreatModel,
    parse_attacks,
    parse_eps,
    parse_norm,
)

_HEADER = (
    "images", "fooled", "after query 500", "lost by the stop", "passes per robust image", "with the stop", "ratio",
)  # fmt: skip


def main() -> None:
    """Run Square twice and print what differs as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--norm", default="Linf")
    parser.add_argument("--eps", default="2/255")
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--left-robust", action="store_true")
    options = parser.parse_args()
    (_, eps), *_ = parse_eps(options.eps)
    threat = ThreatModel(parse_norm(options.norm), eps)
    subject = load_subject(options.model, options.data, options.limit)
    jobs, oracle = subject.jobs, Oracle(subject.classifier)
    if options.left_robust:
        for attack in parse_attacks("apgd-ce,apgd-t"):
            assert isinstance(attack, LaneAttack)
            engine = LaneEngine(oracle, attack, threat, lanes=options.lanes, seed=0)
            jobs = [result.job for result in engine.run(jobs) if result.outcome == "robust"]
    off, on = (_run(oracle, jobs, threat, options, futility) for futility in (False, True))
    print(f"{options.model} on {options.data}, {threat.norm} eps {options.eps}, {options.queries} queries\n")
    print(markdown(_HEADER, [compare(off, on)]))


def _run(
    oracle: Oracle, jobs: list[Job], threat: ThreatModel, options: argparse.Namespace, futility: bool
) -> dict[str, Result]:
    attack = Square(n_iter=options.queries, futility=futility)
    engine = LaneEngine(oracle, attack, threat, lanes=options.lanes, seed=0)
    return {result.job.image_id: result for result in engine.run(jobs)}


def compare(off: dict[str, Result], on: dict[str, Result]) -> tuple[str, ...]:
    """Return the row of the table from the results without and with the stop, by image."""
    fooled = [name for name, result in off.items() if result.outcome == "fooled"]
    late = [name for name in fooled if off[name].steps > 500]
    lost = [name for name in fooled if on[name].outcome != "fooled"]
    robust = [name for name in off if name not in fooled]
    before, after = (sum(run[name].passes for name in robust) / max(len(robust), 1) for run in (off, on))
    ratio = after / before if robust else float("nan")
    counts = (len(off), len(fooled), len(late), len(lost))
    return (*map(str, counts), f"{before:.0f}", f"{after:.0f}", f"{ratio:.2f}")


if __name__ == "__main__":
    main()
