"""How often the engines make the host wait for a simulated GPU, pass by pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import simulated
import torch

from robustvlm.attacks import Job, LaneEngine, Oracle, ThreatModel, catalog
from robustvlm.attacks.base import LaneAttack
from robustvlm.certify import SamplingEngine
from robustvlm.certify import engine as certify_engine
from robustvlm.certify.claims.feature import FeatureRadius

ATTACKS = (
    "pgd:steps=6",
    "pgd:steps=3:restarts=3",
    "apgd-ce:steps=8",
    "fmn:steps=6",
    "square:queries=8",
    "apgd-t:steps=4:targets=2",
    "fab-t:steps=4:targets=2",
)
RADII = (("Linf", 0.04), ("L2", 0.5))


def attack_waits(
    *, precision: str, attacks: tuple[str, ...] = ATTACKS, radii: tuple[tuple[str, float], ...] = RADII
) -> dict[str, list[dict[str, Any]]]:
    """Return by attack and norm what each pass of the engine waited for: itself, and the attack in its `advance`."""
    found = {}
    for text in attacks:
        for norm, eps in radii:
            (attack,) = catalog.parse_attacks(text)
            assert isinstance(attack, LaneAttack)
            found[f"{text} {norm}"] = _attacked(attack, ThreatModel(norm, eps), precision)
    return found


def _attacked(attack: LaneAttack, threat: ThreatModel, precision: str) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 6, 5)).to(simulated.GPU)
    images = torch.rand(7, 3, 6, 6)
    label = net(images.to(simulated.GPU)).argmax(1).tolist()
    jobs = [Job(str(i), i, images[i], label[i], tuple(k for k in range(5) if k != label[i])) for i in range(7)]
    engine = LaneEngine(
        Oracle(net, device=simulated.GPU, precision=precision), attack, threat, lanes=3, seed=0, rungs=(3, 1)
    )
    passes: list[dict[str, Any]] = []
    whole, step = engine._advance, catalog.advance
    own: list[Counter[str]] = []

    def advance(*arguments: Any) -> Any:
        with simulated.waits.inside() as waited:
            result = step(*arguments)
        own.append(waited)
        return result

    def watched() -> Any:
        own.clear()
        with simulated.waits.inside() as waited:
            result = whole()
        theirs = sum(own, Counter())
        passes.append({"engine": dict(waited - theirs), "attack": dict(theirs), "ended": len(result)})
        return result

    engine._advance, catalog.advance = watched, advance
    try:
        results = list(engine.run(jobs))
    finally:
        catalog.advance = step
    assert len(results) == len(jobs)
    return passes


def certify_waits() -> dict[str, Any]:
    """Return what the certification engine waited for over a run, and in how many passes."""
    torch.manual_seed(1)
    weights = torch.randn(12, 4).to(simulated.GPU)

    def encode(noisy: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(noisy.flatten(1) @ weights, dim=1)

    jobs = [certify_engine.Job(str(i), i, torch.rand(3, 2, 2)) for i in range(7)]
    passes: list[int] = []
    engine = SamplingEngine(encode, seed=0, lanes=64, device=simulated.GPU, on_pass=lambda size, _: passes.append(size))
    with simulated.waits.inside() as waited:
        found = list(engine.run(jobs, lambda _: FeatureRadius(cos0=0.5, sigma=0.1, alpha=0.01, n=400, n_pilot=100)))
    assert len(found) == len(jobs)
    return {"passes": len(passes), "waits": dict(waited)}
