"""Sub-runs made before their turn: what counts, and what it costs, is as with one after the other."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Curved, right_jobs

from robustvlm.attacks import LaneEngine, Oracle, Result, ThreatModel, parse_attacks
from robustvlm.attacks.base import FAILED, FOOLED, Job
from robustvlm.attacks.lanes import Fact, Image, Lane
from robustvlm.attacks.pool import Pool
from robustvlm.core.batches import SteadySizes

JOB = Job("a", 0, torch.zeros(3, 2, 2), 1)
THREAT = ThreatModel("Linf", 0.03)

# One point of a sub-run: its margin, whether the goal is reached, whether the output is finite.
points = st.tuples(st.integers(-3, 3), st.sampled_from([False] * 6 + [True]), st.sampled_from([True] * 9 + [False]))
scripts = st.lists(st.lists(points, min_size=1, max_size=4), min_size=1, max_size=5)


def made(image: Image, run: int, script: list[tuple[int, bool, bool]], leave: bool) -> Lane:
    """Return a sub-run that has gone to its end through these points."""
    lane = Lane(image, run, len(script), target=0, leave=leave)
    image.running.add(run)
    for place, (margin, reached, finite) in enumerate(script):
        lane.passes += 2
        fact = Fact(reached, float(margin), 0, 0.5, finite, None)
        lane.observe(torch.full((3, 2, 2), (10 * run + place) / 100), fact)
        if lane.outcome is not None:
            break
        lane.step = place
    return lane


def told(image: Image) -> tuple:
    assert image.best.x is not None
    return (image.outcome, image.run, image.steps, image.passes, image.best.run, image.best.fact, image.best.x[0, 0, 0])


@given(scripts, st.booleans(), st.integers(0, 99))
def test_the_answer_does_not_depend_on_which_sub_run_ends_first(script, leave, shuffle):
    straight, mixed = Image(JOB, len(script)), Image(JOB, len(script))
    for run, points in enumerate(script):
        if straight.outcome is None:
            straight.end(made(straight, run, points, leave))
    order = list(range(len(script)))
    random.Random(shuffle).shuffle(order)
    for run in order:
        if mixed.outcome is None:
            mixed.end(made(mixed, run, script[run], leave))
    assert told(mixed) == told(straight)


def test_a_sub_run_that_decides_makes_those_after_it_idle():
    image = Image(JOB, 5)
    image.running.add(0)
    fooled = made(image, 2, [(-1, True, True)], leave=True)
    assert fooled.outcome == FOOLED
    assert image.end(fooled) == []
    assert (image.open_runs, image.last) == ([1], 2)
    image.running.add(1)
    assert image.open_runs == []


def test_what_is_not_finite_waits_for_its_turn_too():
    image = Image(JOB, 3)
    image.end(made(image, 1, [(1, False, False)], leave=True))
    assert image.outcome is None
    image.end(made(image, 0, [(-2, True, True)], leave=True))
    assert (image.outcome, image.best.run) == (FOOLED, 0)
    other = Image(JOB, 3)
    other.end(made(other, 1, [(1, False, False)], leave=True))
    other.end(made(other, 0, [(2, False, True)], leave=True))
    assert (other.outcome, other.best.run) == (FAILED, 1)


def facts(result: Result) -> tuple:
    return (
        result.job.index, result.outcome, result.prediction, result.margin, result.steps, result.passes, result.run,
        result.adversarial.sum().item(),
    )  # fmt: skip


def attacked(text: str, count: int, *, rungs: tuple[int, ...], leave: bool = True) -> tuple[list[tuple], int]:
    engine = LaneEngine(
        Oracle(Curved(), precision="fp64"), parse_attacks(text)[0], THREAT, lanes=rungs[0], seed=0, rungs=rungs,
        leave=leave,
    )  # fmt: skip
    results = sorted(engine.run(right_jobs(Curved(), count)), key=lambda result: result.job.index)
    return [facts(result) for result in results], engine.oracle.passes.forward


@pytest.mark.parametrize(
    "text", ["apgd-t:steps=6", "pgd:steps=6:restarts=5", "fab-t:steps=5", "square:queries=20:restarts=3"]
)
@pytest.mark.parametrize("leave", [True, False])
def test_rows_that_run_ahead_change_no_answer_and_cost_nothing(text, leave):
    alone, rows = attacked(text, 3, rungs=(1,), leave=leave)
    ahead, paid = attacked(text, 3, rungs=(16,), leave=leave)
    assert [row[:3] + row[4:7] for row in ahead] == [row[:3] + row[4:7] for row in alone]
    assert [row[3] for row in ahead] == pytest.approx([row[3] for row in alone], abs=1e-9)
    assert paid < 6 * rows, "one after the other in batches of 16 rows would cost at least 16/3 times as much"


def test_the_passes_told_are_those_of_the_results():
    told = []
    engine = LaneEngine(
        Oracle(Curved()), parse_attacks("apgd-t:steps=6")[0], THREAT, lanes=8, seed=0,
        on_pass=lambda used, passes: told.append((used, passes)),
    )  # fmt: skip
    results = list(engine.run(right_jobs(Curved(), 5)))
    assert sum(passes for _, passes in told) == sum(result.passes for result in results)
    assert max(used for used, _ in told) <= 8


class Blocks(Curved):
    """Adds the numbers of batches below six rows in another order, as a kernel does with the rest of its blocks."""

    small = 6

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.add(len(x))
        logits = super().forward(x)
        return logits if len(x) >= self.small else logits * (1 + 1e-6)


def test_sizes_that_give_other_bits_are_tried_once_and_never_used():
    model, sizes = Blocks(), SteadySizes((12,))
    jobs = right_jobs(Curved(), 6)
    for seed in range(3):
        engine = LaneEngine(
            Oracle(model), parse_attacks("apgd-ce:steps=25")[0], THREAT, lanes=12, seed=seed, rungs=sizes
        )
        results = list(engine.run(jobs[:2]))
        assert len(results) == 2
    assert min(sizes.steady) == 6
    plain = LaneEngine(Oracle(Blocks()), parse_attacks("apgd-ce:steps=25")[0], THREAT, lanes=12, seed=2)
    plain.sizes.worth_trying = lambda *_, **__: None  # type: ignore[method-assign]
    assert sorted(map(facts, plain.run(jobs[:2]))) == sorted(map(facts, results))


def test_losses_that_agree_by_luck_do_not_make_a_size_steady():
    """Without gradients a pass shows one number a row, and other bits of the logits often round to the same loss."""

    class Rarely(Curved):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            # In small batches the bits differ at about every second point.
            other = (x.flatten(1).sum(1) * 12345.678).long() % 2 == 1
            return torch.where(other[:, None] & (len(x) < 6), logits * (1 + 1e-5), logits)

    sizes = SteadySizes((12,))
    square = parse_attacks("square:queries=400")[0]
    engine = LaneEngine(Oracle(Rarely()), square, ThreatModel("Linf", 1e-3), lanes=12, seed=0, rungs=sizes)
    list(engine.run(right_jobs(Curved(), 1)))
    assert min(sizes.steady) >= 6


@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 4), rungs=st.sampled_from([(8,), (8, 4), (8, 4, 2, 1), (16, 6)]))
def test_running_ahead_is_never_dearer(count, rungs):
    ahead, paid = attacked("apgd-t:steps=4", count, rungs=rungs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "_ahead", lambda *_: [])
        plain, before = attacked("apgd-t:steps=4", count, rungs=rungs)
    assert [row[:3] for row in ahead] == [row[:3] for row in plain]
    assert paid <= before + 24, "a few rows more may be spent on questions"
