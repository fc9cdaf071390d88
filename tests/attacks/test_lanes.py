"""The engine: answers belong to images, not to batches, lanes, orders or accidents."""

from __future__ import annotations

import dataclasses
import random
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Curved, attack_all, fooled, images, right_jobs

from robustvlm.attacks import PGD, Job, LaneEngine, Oracle, Result, ThreatModel, parse_attacks

THREAT = ThreatModel("Linf", 0.03)
ATTACKS = {text: parse_attacks(text)[0] for text in ("pgd:steps=8:restarts=2", "apgd-ce:steps=8", "apgd-t:steps=5")}


def facts(result: Result) -> tuple:
    """All of a result but its time."""
    plain = dataclasses.replace(result, seconds=0.0, adversarial=torch.zeros(0), job=None)  # type: ignore[arg-type]
    return (
        result.job.image_id,
        *(getattr(plain, f.name) for f in dataclasses.fields(plain) if f.name != "adversarial"),
    )


def key(result: Result) -> tuple:
    return (result.job.index, result.outcome, result.steps, result.passes, result.run, result.prediction)


@cache
def straight(name: str) -> list[Result]:
    """Results of a batch of five on the images in their order."""
    return attack_all(Curved(), ATTACKS[name], THREAT, right_jobs(Curved(), 20), lanes=5, precision="fp64")


@pytest.mark.parametrize("name", ATTACKS)
@settings(max_examples=8, deadline=None)
@given(lanes=st.sampled_from([1, 2, 3, 7, 16, 64]), shuffle=st.integers(0, 1000))
def test_answers_do_not_depend_on_lanes_or_order(name, lanes, shuffle):
    """In float64, so that the rounding of another batch shape cannot flip a sign that matters."""
    jobs = right_jobs(Curved(), 20)
    random.Random(shuffle).shuffle(jobs)
    other = attack_all(Curved(), ATTACKS[name], THREAT, jobs, lanes=lanes, precision="fp64")
    assert [key(result) for result in straight(name)] == [key(result) for result in other]
    assert [a.margin for a in straight(name)] == pytest.approx([b.margin for b in other], abs=1e-9)


@pytest.mark.equality
def test_the_same_run_twice_is_the_same_to_the_bit():
    model, jobs = Curved(), right_jobs(Curved(), 20)
    first, second = (attack_all(model, ATTACKS["apgd-ce:steps=8"], THREAT, jobs) for _ in range(2))
    assert [facts(r) for r in first] == [facts(r) for r in second]
    assert all(torch.equal(a.adversarial, b.adversarial) for a, b in zip(first, second, strict=True))


def test_another_seed_draws_other_starts():
    model, jobs = Curved(), right_jobs(Curved(), 20)
    a, b = (attack_all(model, PGD(n_iter=3, image_first=False), THREAT, jobs, seed=seed) for seed in (0, 1))
    assert any(x.margin != y.margin for x, y in zip(a, b, strict=True))


def test_a_solved_image_leaves_and_its_lane_is_refilled():
    """Every job of an easy model is solved in a few passes: the batch stays full until the queue is dry."""
    occupied: list[int] = []
    model = Curved()
    jobs = right_jobs(model, 40)
    engine = LaneEngine(
        Oracle(model),
        PGD(n_iter=50),
        ThreatModel("Linf", 0.3),
        lanes=8,
        seed=0,
        on_pass=lambda used, _: occupied.append(used),
    )
    assert len(list(engine.run(jobs))) == 40
    assert set(occupied[: len(occupied) // 2]) == {8}
    assert engine.oracle.passes.forward <= 8 * (len(occupied) + 2), (
        "smaller batches are tried, which pays in longer runs"
    )
    assert engine.oracle.passes.forward < 40 * 50 / 4


def test_jobs_are_taken_from_the_stream_only_when_a_lane_is_free():
    taken = 0

    def stream():
        nonlocal taken
        for job in right_jobs(Curved(), 40):
            taken += 1
            yield job

    engine = LaneEngine(Oracle(Curved()), PGD(n_iter=30), THREAT, lanes=4, seed=0)
    done = 0
    for _ in engine.run(stream()):
        done += 1
        assert taken <= done + 2 * 4
    assert done == 40


@pytest.mark.parametrize("rungs", [(8, 4, 2, 1), (8, 4), (8,)])
def test_smaller_batches_at_the_end_change_no_answer_and_save_passes(rungs):
    jobs, attack = right_jobs(Curved(), 19), ATTACKS["apgd-ce:steps=8"]
    full, laddered = (
        LaneEngine(Oracle(Curved(), precision="fp64"), attack, THREAT, lanes=8, seed=0, rungs=allowed)
        for allowed in ((8,), rungs)
    )
    a, b = (sorted(engine.run(jobs), key=lambda r: r.job.index) for engine in (full, laddered))
    assert [key(result) for result in a] == [key(result) for result in b]
    assert laddered.oracle.passes.forward <= full.oracle.passes.forward
    if rungs[-1] == 1:
        assert laddered.oracle.passes.forward < full.oracle.passes.forward


class Hungry(Curved):
    """Runs out of memory above a batch size."""

    limit = 3

    def forward(self, x):
        if len(x) > self.limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(x)


def test_running_out_of_memory_halves_the_lanes_and_loses_nothing():
    jobs = right_jobs(Curved(), 20)
    engine = LaneEngine(Oracle(Hungry()), ATTACKS["apgd-ce:steps=8"], THREAT, lanes=16, seed=0)
    results = sorted(engine.run(jobs), key=lambda r: r.job.index)
    assert engine.rungs[0] == 2
    plain = attack_all(Curved(), ATTACKS["apgd-ce:steps=8"], THREAT, jobs, lanes=2)
    assert [facts(r) for r in results] == [facts(r) for r in plain]


def test_no_memory_for_a_single_image_is_an_error():
    model = Hungry()
    model.limit = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        list(LaneEngine(Oracle(model), PGD(), THREAT, lanes=4, seed=0).run(right_jobs(Curved(), 4)))


def test_other_errors_of_the_model_are_not_mistaken_for_memory():
    class Broken(Curved):
        def forward(self, x):
            del x
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(LaneEngine(Oracle(Broken()), PGD(), THREAT, lanes=4, seed=0).run(right_jobs(Curved(), 4)))


def test_nan_logits_fail_that_image_and_no_other():
    class Sick(Curved):
        def forward(self, x):
            logits = super().forward(x)
            return torch.where((x[:, 0, 0, 0] > 0.9)[:, None], float("nan"), logits)

    jobs = right_jobs(Curved(), 30)
    sick = {job.index for job in jobs if job.pixels[0, 0, 0] > 0.95}
    assert sick
    results = attack_all(Sick(), PGD(n_iter=5), THREAT, jobs)
    assert {r.job.index for r in results if r.outcome == "failed"} >= sick
    assert any(r.outcome != "failed" for r in results)
    assert all(r.prediction == -1 for r in results if r.outcome == "failed")


def test_low_precision_successes_are_confirmed_in_full_precision():
    model = Curved()
    jobs = right_jobs(model, 40)
    engine = LaneEngine(Oracle(model, precision="bf16"), PGD(n_iter=10), THREAT, lanes=8, seed=0)
    results = sorted(engine.run(jobs), key=lambda r: r.job.index)
    exact = attack_all(model, PGD(n_iter=10), THREAT, jobs)
    for result in results:
        logits = model(result.adversarial[None])[0]
        assert (logits.argmax().item() != result.job.label) == (result.outcome == "fooled")
        others = torch.cat([logits[: result.job.label], logits[result.job.label + 1 :]]).max()
        assert result.margin == pytest.approx((logits[result.job.label] - others).item(), abs=1e-4)
    assert abs(len(fooled(results)) - len(fooled(exact))) <= 3


def test_double_precision_stays_double():
    engine = LaneEngine(Oracle(Curved(), precision="fp64"), PGD(n_iter=4), THREAT, lanes=4, seed=0)
    (result, *_) = engine.run([Job("a", 0, images(1)[0].double(), 0)])
    assert result.adversarial.dtype == torch.float64


def test_passes_are_what_the_model_saw():
    seen = 0

    class Counting(Curved):
        def forward(self, x):
            nonlocal seen
            seen += len(x)
            return super().forward(x)

    model = Counting()
    engine = LaneEngine(Oracle(model), PGD(n_iter=6), THREAT, lanes=8, seed=0)
    results = list(engine.run(right_jobs(Curved(), 20)))
    assert engine.oracle.passes.forward == engine.oracle.passes.backward == seen
    assert sum(r.passes for r in results) <= 2 * seen
