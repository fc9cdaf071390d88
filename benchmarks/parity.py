"""Single attacks of both programs with equal budgets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.common import Counted, clock
from benchmarks.duel import OURS, Part, run_ours
from benchmarks.published import CHECKS, set_budget, watch_autoattack
from robustvlm.attacks import PGD, Job, LaneAttack, Probe, ThreatModel, parse_attacks

# Our attacks and the program that has the same; PGD begins at the image in both.
SINGLES = {
    "fgsm": "torchattacks",
    "pgd": "torchattacks",
    **dict.fromkeys(("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"), "pyautoattack"),
}
_PGD_STEPS = 20


def single(
    side: str,
    name: str,
    model: Counted,
    jobs: Sequence[Job],
    threat: ThreatModel,
    found: Probe,
    *,
    text: str,
    options: argparse.Namespace,
) -> Part:
    """Run one attack of one program on all jobs."""
    if side == OURS:
        return run_ours(model, _ours(text, threat), threat, jobs, found, seed=options.seed)
    if side == "torchattacks":
        return _torchattacks(name, model, jobs, threat, options)
    budget = set_budget(options.steps, options.queries)
    given = {"seed": options.seed, "batch_size": options.lanes, "attacks": [name], "adjust": budget}
    (part,) = [part for part in watch_autoattack(model, jobs, threat, **given) if part.name != CHECKS]
    return part


def _ours(text: str, threat: ThreatModel) -> LaneAttack:
    if text == "fgsm" or text.startswith("fgsm:"):
        text = "fgsm"
    (attack,) = parse_attacks(text)
    assert isinstance(attack, LaneAttack)
    if isinstance(attack, PGD) and attack.n_iter > 1:
        return replace(attack, step_size=_step(attack.n_iter, threat))
    return attack


def _step(steps: int, threat: ThreatModel) -> float:
    return 2.5 * threat.eps / steps


def _torchattacks(
    name: str, model: Counted, jobs: Sequence[Job], threat: ThreatModel, options: argparse.Namespace
) -> Part:
    import torchattacks

    steps = options.steps or _PGD_STEPS
    if name == "fgsm":
        attack = torchattacks.FGSM(model, eps=threat.eps)
    else:
        kind = torchattacks.PGD if threat.norm == "Linf" else torchattacks.PGDL2
        attack = kind(model, eps=threat.eps, alpha=_step(steps, threat), steps=steps, random_start=False)
    device = next(model.parameters()).device
    before, fooled = model.passes, []
    with clock() as measured:
        for start in range(0, len(jobs), options.lanes):
            batch = jobs[start : start + options.lanes]
            x = torch.stack([job.pixels for job in batch]).to(device)
            y = torch.tensor([job.label for job in batch], device=device)
            points = attack(x, y)
            with torch.no_grad():
                wrong = model(points).argmax(1) != y
            fooled += [job.image_id for job, lost in zip(batch, wrong.tolist(), strict=True) if lost]
    return Part(name, len(jobs), sorted(fooled), model.passes - before, measured.seconds)
