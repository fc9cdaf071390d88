"""PGD-20 and APGD-CE against torchattacks and pyautoattack, and the engine against bare encoder passes.

    python -m benchmarks.attack_engine MODEL --data DATA --limit 500 --eps 2/255

All programs attack the same images (those the model gets right when clean) with the same budget, step size and batch
size, in one process. Passes count rows through the model, forward and backward as one each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.common import Counted, Subject, clock, exit_code_of, load_subject, markdown
from robustvlm.attacks import APGD, PGD, LaneAttack, LaneEngine, Oracle, ThreatModel, parse_eps
from robustvlm.attacks.probe import probe
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
    parser.add_argument("--seeds", default="0", help="seeds of the random starts, a comparison each")
    parser.add_argument("--only", default="", help="run only the comparisons whose title contains this")
    options = parser.parse_args()
    (_, eps), *_ = parse_eps(options.eps)
    subject = load_subject(options.model, options.data, options.limit)
    print(f"{options.model} on {options.data}: {len(subject.jobs)} of {subject.seen} images right when clean, ")
    print(f"Linf eps {options.eps}, batches of {options.lanes}, {torch.get_num_threads()} thread(s)\n")
    rows = []
    for title, program, ours, theirs in _pairs(eps, options):
        if options.only not in title:
            continue
        for seed in [0] if "no random start" in title else map(int, options.seeds.split(",")):
            maker = partial(theirs, seed=seed)
            rows += _compare(f"{title}, seed {seed}", program, ours, maker, seed, subject, eps, options)
    print(markdown(_HEADER, rows), "\n")
    if not options.only:
        print(markdown(_OVERHEAD_HEADER, [_overhead(subject, eps, options)]))


_HEADER = (
    "attack", "program", "robust", "only this one fools", "McNemar p", "passes", "ratio", "seconds", "ratio",
)  # fmt: skip
_OVERHEAD_HEADER = ("bare passes/s", "engine passes/s at full lanes", "ratio", "share of engine time inside the model")


class _Maker(Protocol):
    def __call__(self, model: Counted, *, seed: int) -> _Attack: ...


def _pairs(eps: float, options: argparse.Namespace) -> list[tuple[str, str, LaneAttack, _Maker]]:
    """Return title, their program, our attack and a maker of theirs, equal in budget and step size."""
    import torchattacks
    from pyautoattack.autopgd_base import APGDAttack

    step, steps = 2.5 * eps / 20, options.apgd_steps

    def pgd(model: Counted, *, seed: int, random_start: bool = True) -> _Attack:
        torch.manual_seed(seed)
        return torchattacks.PGD(model, eps=eps, alpha=step, steps=20, random_start=random_start)

    def apgd_torchattacks(model: Counted, *, seed: int) -> _Attack:
        return torchattacks.APGD(model, norm="Linf", eps=eps, steps=steps, seed=seed)

    def apgd(model: Counted, *, seed: int) -> _Attack:
        return APGDAttack(model, n_iter=steps, norm="Linf", eps=eps, loss="ce", device="cpu", seed=seed).perturb

    plain = PGD(n_iter=20, step_size=step)
    return [
        (
            "PGD-20, no random start",
            "torchattacks",
            replace(plain, random_start=False),
            partial(pgd, random_start=False),
        ),
        ("PGD-20", "torchattacks", plain, pgd),
        (f"APGD-CE {steps}", "pyautoattack", APGD(n_iter=steps), apgd),
        (f"APGD-CE {steps}", "torchattacks", APGD(n_iter=steps), apgd_torchattacks),
    ]


def _compare(
    title: str,
    program: str,
    ours: LaneAttack,
    theirs: Callable[[Counted], _Attack],
    seed: int,
    subject: Subject,
    eps: float,
    options: argparse.Namespace,
) -> list[list[object]]:
    """Run both programs and return a table row for each."""
    model, counted = Counted(subject.classifier), Counted(subject.classifier)
    with clock() as our_time:
        fooled = _run_ours(Oracle(model), ours, ThreatModel("Linf", eps), seed, subject, options.lanes)
    with clock() as their_time:
        broken = _run_theirs(counted, theirs(counted), subject, options.lanes)
    total = len(subject.jobs)
    test = mcnemar_exact([i in fooled for i in range(total)], [i in broken for i in range(total)])

    def row(who: str, found: set[int], other: set[int], passes: int, seconds: float) -> list[object]:
        ratios = (f"{passes / counted.passes:.2f}", f"{seconds / their_time.seconds:.2f}")
        robust = f"{total - len(found)}/{subject.seen} ({(total - len(found)) / subject.seen:.1%})"
        p = f"{test.p_value:.2g}"
        return [title, who, robust, len(found - other), p, f"{passes:,}", ratios[0], f"{seconds:.1f}", ratios[1]]

    return [
        row("robustvlm", fooled, broken, model.passes, our_time.seconds),
        row(program, broken, fooled, counted.passes, their_time.seconds),
    ]


def _run_ours(
    oracle: Oracle, attack: LaneAttack, threat: ThreatModel, seed: int, subject: Subject, lanes: int
) -> set[int]:
    """Attack with the engine, the probe of the model included; return the images that were fooled."""
    found = probe(oracle, subject.pixels[:lanes], subject.labels[:lanes])
    engine = LaneEngine(oracle, attack, threat, lanes=found.rungs[0], seed=seed, rungs=found.rungs)
    return {result.job.index for result in engine.run(subject.jobs) if result.outcome == "fooled"}


def _run_theirs(model: Counted, attack: _Attack, subject: Subject, batch: int) -> set[int]:
    """Attack batch by batch and classify what comes back; return the images that were fooled."""
    broken: set[int] = set()
    for start in range(0, len(subject.jobs), batch):
        x, y = subject.pixels[start : start + batch], subject.labels[start : start + batch]
        wrong = model(attack(x, y)).argmax(1) != y
        broken |= {start + i for i in range(len(y)) if wrong[i]}
    return broken


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
    sys.exit(exit_code_of(main))
