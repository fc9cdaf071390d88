"""PGD-20 and APGD-CE against torchattacks and pyautoattack, and the engine against bare encoder passes.

    python -m benchmarks.attack_engine MODEL --data DATA --limit 500 --eps 2/255

All programs attack the same images (those the model gets right when clean) with the same budget, step size and batch
size, in one process. Passes count rows through the model, forward and backward as one each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Counted, Subject, clock, load_subject, markdown
from robustvlm.attacks import APGD, PGD, LaneAttack, LaneEngine, Oracle, ThreatModel, parse_eps, probe
from robustvlm.stats import mcnemar_exact

_Attack = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Run the comparison and print its tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--eps", default="2/255")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--apgd-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    (_, eps), *_ = parse_eps(options.eps)
    subject = load_subject(options.model, options.data, options.limit)
    print(f"{options.model} on {options.data}: {len(subject.jobs)} of {subject.seen} images right when clean, ")
    print(f"Linf eps {options.eps}, batches of {options.lanes}, {torch.get_num_threads()} thread(s)\n")
    rows = []
    for name, ours, theirs in _pairs(eps, options):
        rows += _compare(name, ours, theirs, subject, eps, options)
    print(markdown(_HEADER, rows), "\n")
    print(markdown(_OVERHEAD_HEADER, [_overhead(subject, eps, options)]))


_HEADER = (
    "attack", "program", "robust", "only this one fools", "McNemar p", "passes", "ratio", "seconds", "ratio",
)  # fmt: skip
_OVERHEAD_HEADER = ("bare passes/s", "engine passes/s at full lanes", "ratio", "share of engine time inside the model")


def _pairs(
    eps: float, options: argparse.Namespace
) -> list[tuple[str, LaneAttack, tuple[str, Callable[[Counted], _Attack]]]]:
    """Return for each attack our version and a maker of theirs, equal in budget and step size."""
    import torchattacks
    from pyautoattack.autopgd_base import APGDAttack

    step = 2.5 * eps / 20

    def pgd(model: Counted) -> _Attack:
        torch.manual_seed(options.seed)
        return torchattacks.PGD(model, eps=eps, alpha=step, steps=20, random_start=True)

    def apgd_torchattacks(model: Counted) -> _Attack:
        return torchattacks.APGD(model, norm="Linf", eps=eps, steps=options.apgd_steps, seed=options.seed)

    def apgd(model: Counted) -> _Attack:
        attack = APGDAttack(
            model, n_iter=options.apgd_steps, norm="Linf", eps=eps, loss="ce", device="cpu", seed=options.seed
        )
        return attack.perturb

    ours_apgd = APGD(n_iter=options.apgd_steps)
    return [
        ("PGD-20", PGD(n_iter=20, step_size=step), ("torchattacks", pgd)),
        (f"APGD-CE {options.apgd_steps}", ours_apgd, ("pyautoattack", apgd)),
        (f"APGD-CE {options.apgd_steps}", ours_apgd, ("torchattacks", apgd_torchattacks)),
    ]


def _compare(
    name: str,
    ours: LaneAttack,
    theirs: tuple[str, Callable[[Counted], _Attack]],
    subject: Subject,
    eps: float,
    options: argparse.Namespace,
) -> list[list[object]]:
    """Run both programs and return a table row for each."""
    model = Counted(subject.classifier)
    oracle = Oracle(model)
    with clock() as our_time:
        first = subject.pixels[: options.lanes], subject.labels[: options.lanes]
        rungs = probe(oracle, *first).rungs
        engine = LaneEngine(oracle, ours, ThreatModel("Linf", eps), lanes=len(first[0]), seed=options.seed, rungs=rungs)
        fooled = {result.job.index for result in engine.run(subject.jobs) if result.outcome == "fooled"}
    our_passes = model.passes
    counted = Counted(subject.classifier)
    attack = theirs[1](counted)
    broken: set[int] = set()
    with clock() as their_time:
        for start in range(0, len(subject.jobs), options.lanes):
            x, y = subject.pixels[start : start + options.lanes], subject.labels[start : start + options.lanes]
            wrong = counted(attack(x, y)).argmax(1) != y
            broken |= {start + i for i in range(len(y)) if wrong[i]}
    total = len(subject.jobs)
    only_ours, only_theirs = len(fooled - broken), len(broken - fooled)
    test = mcnemar_exact([i in fooled for i in range(total)], [i in broken for i in range(total)])
    p = f"{test.p_value:.2g}"

    def row(program: str, found: set[int], only: int, passes: int, seconds: float) -> list[object]:
        ratios = (f"{passes / counted.passes:.2f}", f"{seconds / their_time.seconds:.2f}")
        robust = f"{total - len(found)}/{subject.seen} ({(total - len(found)) / subject.seen:.1%})"
        return [name, program, robust, only, p, f"{passes:,}", ratios[0], f"{seconds:.1f}", ratios[1]]

    return [
        row("robustvlm", fooled, only_ours, our_passes, our_time.seconds),
        row(theirs[0], broken, only_theirs, counted.passes, their_time.seconds),
    ]


def _overhead(subject: Subject, eps: float, options: argparse.Namespace) -> list[object]:
    """Time forward and backward passes on a full batch, bare and inside the engine, in turns."""
    lanes = min(options.lanes, len(subject.jobs))
    jobs = (subject.jobs * (lanes // len(subject.jobs) + 1))[:lanes]
    x, y = torch.stack([job.pixels for job in jobs]), torch.tensor([job.label for job in jobs])
    bare, engine_rate, share = [], [], []
    attack = APGD(n_iter=20)
    oracle = Oracle(subject.classifier)
    # A ball this small fools nobody, so every lane stays occupied to the end.
    threat = ThreatModel("Linf", eps / 1e4)
    for _ in range(5):
        with clock() as measured:
            for _ in range(attack.n_iter + 1):
                oracle.gradient(x, attack.objective, y, y)
        bare.append(2 * lanes * (attack.n_iter + 1) / measured.seconds)
        before = oracle.passes.seconds
        with clock() as measured:
            list(LaneEngine(oracle, attack, threat, lanes=lanes, seed=0).run(jobs))
        engine_rate.append(2 * lanes * (attack.n_iter + 1) / measured.seconds)
        share.append((oracle.passes.seconds - before) / measured.seconds)
    ratios = sorted(e / b for e, b in zip(engine_rate, bare, strict=True))
    median = sorted(bare)[2], sorted(engine_rate)[2], ratios[2], sorted(share)[2]
    return [f"{median[0]:.0f}", f"{median[1]:.0f}", f"{median[2]:.3f}", f"{median[3]:.3f}"]


if __name__ == "__main__":
    main()
