"""Attacks that share batches: every answer is that of the attack run by itself on the images that the others left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import PIXELS, images, right_jobs

from robustvlm.attacks import FOOLED, Case, Job, LaneEngine, Misclassify, Oracle, Result, ThreatModel, parse_attacks
from robustvlm.attacks.base import FAILED, LaneAttack
from robustvlm.attacks.objectives import OBJECTIVES, Mixture
from robustvlm.attacks.pool import Pool
from robustvlm.attacks.square import Square
from robustvlm.core.batches import SteadySizes
from robustvlm.core.seeds import row_sums
from robustvlm.errors import UserError

CHAIN = "apgd-ce:steps=6,apgd-t:steps=5,fab-t:steps=9"
# What one attack shows to be out of reach is to come to the last, past those between.
LONGER = (
    "apgd-t:steps=5,apgd-dlr:steps=3,fab-t:steps=9",
    "apgd-t:steps=5,pgd:steps=3:restarts=2,fab-t:steps=9,apgd-ce:steps=4",
    "apgd-t:steps=5,fab-t:steps=9,fab-t:steps=12:restarts=2",
    "fab-t:steps=9,apgd-ce:steps=4,apgd-t:steps=5",
)


class Exact(nn.Module):
    """A curved network of element-wise operations alone: rows have the same bits in batches of any size.

    Within `hole` of the last pixel's value its outputs are not finite.
    """

    hungry = False

    def __init__(self, seed: int = 0, hole: float = 0.0, classes: int = 4) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(7, PIXELS, generator=draws) / PIXELS**0.5 * 5)
        self.second = nn.Parameter(torch.randn(classes, 7, generator=draws) * 2)
        self.hole, self.rows = hole, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        hidden = _products(x.flatten(1) - 0.5, self.first)
        logits = _products(hidden / (1 + hidden.abs()), self.second)
        bad = (x[:, 0, 0, 0] * 1000).frac() < self.hole
        return torch.where(bad[:, None], torch.full_like(logits, float("nan")), logits)


def _products(rows: Tensor, weights: Tensor) -> Tensor:
    return row_sums((rows[:, None] * weights).flatten(0, 1)).view(len(rows), len(weights))


def facts(result: Result) -> tuple:
    """All that a result says, as texts: what is no number equals itself."""
    said = (
        result.outcome, result.prediction, result.confidence, result.margin, result.steps, result.passes, result.run,
        result.linf, result.l2, result.adversarial.double().sum().item(), sorted(result.beyond.items()),
    )  # fmt: skip
    return tuple(map(str, said))


def attacks_of(text: str) -> list[LaneAttack]:
    return [attack for attack in parse_attacks(text) if isinstance(attack, LaneAttack)]


def one_by_one(
    model: nn.Module, text: str, jobs: list[Job], threat: ThreatModel, *, seed: int, leave: bool
) -> dict[tuple[str, int], tuple]:
    """Each attack alone: no row is shared and none runs ahead."""
    found = {}
    for attack in attacks_of(text):
        engine = LaneEngine(Oracle(model), attack, threat, lanes=max(len(jobs), 1), seed=seed, leave=leave)
        with patch.object(Pool, "_ahead", lambda *_: []), patch.object(Square, "foresee", lambda *_: None):
            results = {result.job.index: result for result in engine.run(jobs)}
        found |= {(attack.name, index): facts(result) for index, result in results.items()}
        left = [job for job in jobs if not (leave and results[job.index].outcome == FOOLED)]
        jobs = [replace(job, beyond={**job.beyond, **results[job.index].beyond}) for job in left]
    return found


def together(
    model: Exact, text: str, jobs: list[Job], threat: ThreatModel, *, seed: int, leave: bool, sizes: tuple[int, ...]
) -> dict[tuple[str, int], tuple]:
    first, *then = attacks_of(text)
    rungs, told = SteadySizes(sizes), list[int]()
    engine = LaneEngine(
        Oracle(model), first, threat, lanes=sizes[0], seed=seed, leave=leave, rungs=rungs, then=then,
        on_pass=lambda _, passes: told.append(passes),
    )  # fmt: skip
    results = []
    for result in engine.run(jobs):
        results.append(result)
        rows = [(id(lane.image), lane.run) for lane in engine._pool.lanes]
        assert len(set(rows)) == len(rows), "two rows make the same sub-run"
    found = {(result.attack, result.job.index): facts(result) for result in results}
    assert len(found) == len(results), "an image was attacked twice"
    if not model.hungry:  # what was made before memory ran out is told too
        assert sum(told) == sum(result.passes for result in results)
    return found


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 4),
    sizes=st.sampled_from([(1,), (4,), (8, 4), (16,), (16, 8, 4, 2, 1)]),
    text=st.sampled_from(
        [CHAIN, "pgd:steps=3:restarts=2,apgd-t:steps=4:restarts=2:targets=2,fab-t:steps=8:restarts=2,apgd-dlr:steps=3",
         "square:queries=15,square:queries=9:p_init=0.3", *LONGER]
    ),
    ball=st.sampled_from([ThreatModel("Linf", 0.02), ThreatModel("Linf", 0.05), ThreatModel("L2", 0.3)]),
    leave=st.booleans(),
    hole=st.sampled_from([0.0, 0.0, 0.05]),
)  # fmt: skip
@example(seed=0, count=6, sizes=(16,), text=CHAIN, ball=ThreatModel("Linf", 0.03), leave=True, hole=0.0)
@example(seed=3, count=6, sizes=(16,), text=CHAIN, ball=ThreatModel("Linf", 0.03), leave=True, hole=0.1)
@example(seed=0, count=4, sizes=(16,), text=LONGER[0], ball=ThreatModel("Linf", 0.02), leave=True, hole=0.0)
@example(seed=1, count=4, sizes=(16,), text=LONGER[1], ball=ThreatModel("Linf", 0.02), leave=True, hole=0.0)
@example(seed=2, count=4, sizes=(16,), text=LONGER[2], ball=ThreatModel("Linf", 0.02), leave=False, hole=0.0)
@example(seed=3, count=4, sizes=(16,), text=LONGER[3], ball=ThreatModel("Linf", 0.02), leave=True, hole=0.0)
def test_answers_are_those_of_one_attack_after_the_other(seed, count, sizes, text, ball, leave, hole):
    jobs = right_jobs(Exact(seed), count, seed=seed)
    about = {"jobs": jobs, "threat": ball, "seed": seed, "leave": leave}
    shared = together(Exact(seed, hole), text, sizes=sizes, **about)
    alone = one_by_one(Exact(seed, hole), text, **about)
    assert shared == alone


def test_the_examples_hold_every_outcome_and_classes_that_are_shown_to_be_out_of_reach():
    """Or the test above would compare less than it says."""
    seen, skipped = set(), 0
    for seed, hole in ((0, 0.0), (3, 0.1)):
        jobs = right_jobs(Exact(seed), 6, seed=seed)
        found = one_by_one(Exact(seed, hole), CHAIN, jobs, ThreatModel("Linf", 0.03), seed=seed, leave=True)
        seen |= {(attack.split(":")[0], row[0]) for (attack, _), row in found.items()}
        skipped += sum(row[-1] != "[]" for (attack, _), row in found.items() if attack.startswith("apgd-t"))
    assert {("apgd-ce", FOOLED), ("apgd-ce", "robust"), ("fab-t", "robust")} <= seen
    assert FAILED in {outcome for _, outcome in seen}
    assert skipped


def test_sources_give_what_does_not_come_by_itself_and_no_more_images_are_held_than_rows():
    """As a run does: the next attack's images are asked for once the one before has none left to begin."""
    model, held = Exact(1), 0
    jobs = right_jobs(model, 12, seed=1)
    first, *then = attacks_of(CHAIN)
    names = [first.name, *(attack.name for attack in then)]
    found: dict[tuple[str, int], Result] = {}

    def remaining(place: int) -> list[Job]:
        gone = {index for (_, index), result in found.items() if result.outcome == FOOLED}
        return [job for job in jobs if job.index not in gone and (names[place], job.index) not in found]

    def source(place: int) -> Iterator[Job]:
        busy = {job.index for earlier in range(place) for job in remaining(earlier)}
        for job in [job for job in remaining(place) if job.index not in busy]:
            known: dict[int, float] = {}
            for name in names[:place]:
                known |= found[name, job.index].beyond
            yield replace(job, beyond=known)

    threat = ThreatModel("Linf", 0.03)
    engine = LaneEngine(Oracle(model), first, threat, lanes=4, seed=2, then=then)
    for result in engine.run(source(0), lambda: source(1), lambda: source(2)):
        assert (result.attack, result.job.index) not in found
        found[result.attack, result.job.index] = result
        pool = engine._pool
        waiting = {image.job.index for course in pool.courses for image in course.waiting}
        held = max(held, len(waiting | {lane.image.job.index for lane in pool.lanes}))
    alone = one_by_one(Exact(1), CHAIN, jobs, threat, seed=2, leave=True)
    assert {key: facts(result) for key, result in found.items()} == alone
    assert held <= 8


def test_after_memory_ran_out_nothing_is_lost_or_done_twice():
    class Hungry(Exact):
        hungry = True

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 4 and self.rows > 150:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    jobs, threat = right_jobs(Exact(5), 7, seed=5), ThreatModel("Linf", 0.03)
    about = {"jobs": jobs, "threat": threat, "seed": 0, "leave": True}
    shared = together(Hungry(5), CHAIN, sizes=(16, 4), **about)
    assert shared == one_by_one(Exact(5), CHAIN, **about)


def test_walks_to_classes_in_doubt_run_ahead_first_so_that_no_walk_is_left_over_at_the_end():
    text = "apgd-t:steps=40,fab-t:steps=40"
    jobs = right_jobs(Exact(11, classes=8), 4, seed=11)
    about = {"jobs": jobs, "threat": ThreatModel("Linf", 0.012), "seed": 11, "leave": True}

    def paid() -> tuple[int, dict[tuple[str, int], tuple]]:
        model = Exact(11, classes=8)
        with patch.object(SteadySizes, "worth_trying", lambda *_: None):
            found = together(model, text, sizes=(8,), **about)
        return model.rows, found

    rows, found = paid()
    in_turn = patch.object(Pool, "_next_ahead", lambda pool, *about: next(pool._able(*about), None))
    to_the_end = patch.object(LaneEngine, "_said", _walking_to_the_end)
    with in_turn, to_the_end:
        before, same = paid()
    assert found == same == one_by_one(Exact(11, classes=8), text, **about)
    assert any(name.startswith("fab-t") and row[4] == "40" for (name, _), row in found.items()), "no class is in doubt"
    assert rows < 0.7 * before


def _walking_to_the_end(engine: LaneEngine, rows: list[int], nothing: Tensor) -> tuple[Tensor, ...]:
    ends, radii, walking = _SAID(engine, rows, nothing)
    return ends, radii, torch.ones_like(walking)


_SAID = LaneEngine._said


def test_attacks_with_and_without_gradients_do_not_share():
    first, second = attacks_of("apgd-ce:steps=2,square:queries=3")
    with pytest.raises(UserError, match="take gradients"):
        LaneEngine(Oracle(Exact()), first, ThreatModel("Linf", 0.1), lanes=2, seed=0, then=[second])


def test_every_row_has_the_loss_and_gradient_of_its_own_objective():
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    logits[3, :3] = logits[3, 0]  # where DLR divides by nearly nothing, and its gradient is huge
    case = Case(torch.arange(9) % 5, (torch.arange(9) + 1) % 5)
    kinds = [OBJECTIVES[name] for name in ("ce", "dlr-t", "margin")]
    of = [0, 1, 2, 1, 0, 0, 2, 1, 0]
    x = logits.clone().requires_grad_()
    mixed = Mixture(tuple(kinds), of).loss(
        lambda objective, rows: Misclassify().loss(x[rows], objective, case.rows(rows))
    )
    (grad,) = torch.autograd.grad(mixed.sum(), x)
    for row, number in enumerate(of):
        z = logits.clone().requires_grad_()
        loss = Misclassify().loss(z, kinds[number], case)
        (expected,) = torch.autograd.grad(loss.sum(), z)
        assert torch.equal(mixed[row], loss[row])
        assert torch.equal(grad[row], expected[row])


# Rows that look ahead within a sub-run


def searched(sizes: tuple[int, ...]) -> tuple[list, int]:
    model, jobs = Exact(4), right_jobs(Exact(4), 3, seed=4)
    engine = LaneEngine(
        Oracle(model), *attacks_of("square:queries=60"), ThreatModel("Linf", 0.02), lanes=sizes[0], seed=0,
        rungs=SteadySizes(sizes),
    )  # fmt: skip
    engine.sizes.worth_trying = lambda *_, **__: None  # type: ignore[method-assign]
    results = sorted(engine.run(jobs), key=lambda result: result.job.index)
    return [facts(result) for result in results], model.rows


def test_points_foreseen_for_square_change_nothing_and_save_passes():
    alone, counted = searched((1,))
    ahead, paid = searched((16,))
    with patch.object(Square, "foresee", lambda _, state, *__: torch.rand_like(state["x"])):
        wrong, dear = searched((16,))
    assert ahead == alone
    assert wrong == alone, "a wrong guess must be forgotten"
    assert counted < paid < dear / 2


def test_a_foreseen_point_is_the_next_one_where_nothing_is_better():
    square, threat = Square(n_iter=20), ThreatModel("L2", 0.5)
    state = square.begin(images(1), threat, torch.Generator().manual_seed(0), 0)
    for step in range(5):
        seen = square.foresee(state, torch.tensor([step]), threat)
        state = square.advance(state, torch.tensor([-1.0]), torch.zeros(0), torch.tensor([step]), threat)
        assert torch.equal(state["x"], seen)
