"""Where sub-runs begin: every restart and every image has draws of its own."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor
from toy import Curved, right_jobs

from robustvlm.attacks import LaneEngine, Oracle, ThreatModel, parse_attacks
from robustvlm.attacks.base import Job

THREAT = ThreatModel("Linf", 1e-3)


class Watched(Curved):
    """Keeps the points that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return super().forward(x)


def starts(text: str, job: Job, seed: int = 0) -> list[Tensor]:
    """Return the points at which the sub-runs of a job begin: one after the other, all with as many points."""
    (attack,) = parse_attacks(text)
    model = Watched()
    engine = LaneEngine(Oracle(model), attack, THREAT, lanes=1, seed=seed, rungs=(1,), leave=False)
    (result,) = engine.run([job])
    assert len(model.seen) == 3 * attack.n_points() == result.steps + 3  # no sub-run has ended early
    return model.seen[:: attack.n_points()]


TEXTS = [
    "pgd:steps=3:restarts=3",
    "apgd-ce:steps=3:restarts=3",
    "square:queries=4:restarts=3",
    "fab:steps=3:restarts=3",
    "fmn:steps=3:restarts=3",
]


@pytest.mark.parametrize("text", TEXTS)
def test_every_restart_begins_somewhere_else(text: str) -> None:
    found = starts(text, right_jobs(Curved(), 1)[0])
    assert len(found) == 3
    assert all(not torch.equal(one, other) for one, other in combinations(found, 2))


@pytest.mark.parametrize("text", TEXTS)
def test_images_of_the_same_pixels_and_runs_of_other_seeds_begin_somewhere_else(text: str) -> None:
    job = right_jobs(Curved(), 1)[0]
    found, twin, reseeded = starts(text, job), starts(text, replace(job, image_id="twin")), starts(text, job, seed=1)
    again = starts(text, replace(job, index=7))
    drawn = [i for i, x in enumerate(found) if not torch.equal(x[0], job.pixels)]
    assert len(drawn) >= 2  # the first sub-run of some attacks begins at the image itself
    assert all(torch.equal(found[i], again[i]) for i in drawn)
    assert not any(torch.equal(found[i], other[i]) for i in drawn for other in (twin, reseeded))
