"""Recorded walks and searches: they are those that the engine makes, and the replay counts what it would have done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package
sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))

from toy import Curved, attack_all, right_jobs

from benchmarks import futility as bench
from benchmarks.common import Subject
from robustvlm.attacks import FAB, Square, ThreatModel, objective


def subject(count: int = 10) -> Subject:
    model = Curved(seed=4)
    jobs = right_jobs(model, count, seed=4)
    return Subject(model, jobs, len(jobs))


def test_recorded_searches_are_those_of_the_engine(tmp_path: Path) -> None:
    given, threat = subject(), ThreatModel("Linf", 0.02)
    bench.save(bench.record_searches(given, "toy", threat, 300, 4), tmp_path / "s.safetensors")
    found = bench.read(tmp_path / "s.safetensors")
    assert isinstance(found, bench.Searches)
    results = attack_all(given.classifier, Square(n_iter=300, futility=False), threat, given.jobs)
    outcomes = {result.job.image_id: result for result in results}
    won = found.best.nan_to_num(torch.inf).amax(1) >= 0
    assert 0 < int(won.sum()) < len(won)
    for job, best, reached in zip(given.jobs, found.best, won.tolist(), strict=True):
        result = outcomes[job.image_id]
        assert reached == (result.outcome == "fooled")
        if not reached:
            assert -float(best[-1]) == pytest.approx(result.margin, rel=1e-5)
    assert "| toy | Linf 5.1/255 |" in bench.table_of_searches([found])


def test_a_walk_replayed_ends_where_the_engines_ends(tmp_path: Path) -> None:
    given, eps = subject(6), 0.01
    bench.save(bench.record_walks(given, "toy", "Linf", (eps,), objective("margin-t")), tmp_path / "w.safetensors")
    walks = bench.read(tmp_path / "w.safetensors")
    assert isinstance(walks, bench.Walks)
    counted = bench.replay(walks, eps)
    results = attack_all(given.classifier, FAB(), ThreatModel("Linf", eps), given.jobs)
    near = {result.job.image_id for result in results if result.outcome == "fooled"}
    assert (counted.near > 0) == bool(near)
    assert counted.lost == 0
    left = [result for result in results if result.outcome == "robust"]
    assert left
    of_left = [row for row, (job, _) in enumerate(pairs(given)) if job.image_id not in near]
    rows = bench.Walks(
        walks.name, "Linf", (eps,), *(part[of_left] for part in (walks.distances, walks.lengths, walks.success))
    )
    passes = sum(result.passes for result in left) / 2
    assert bench.replay(rows, eps).walked * len(of_left) == pytest.approx(passes)


def pairs(given: Subject) -> list[tuple]:
    return [(job, target) for job in given.jobs for target in job.targets]


def test_a_class_given_up_before_its_perturbation_is_found_counts_as_lost() -> None:
    steps = 20
    lengths, distances = torch.full((2, steps), 0.5), torch.full((2, steps), 0.5)
    success = torch.ones(2, steps, dtype=torch.bool)
    lengths[1, 15] = 0.05  # the boundary was near after all
    one = bench.replay(bench.Walks("made up", "Linf", (0.1,), distances, lengths, success), 0.1)
    assert (one.classes, one.near, one.lost) == (2, 1, 1)
    assert one.walked == bench.futility.FIRST_STEP + 1
    assert float(bench.excess([bench.Walks("", "Linf", (0.1,), distances, lengths, success)])[1][1]) == 10
