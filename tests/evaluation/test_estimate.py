"""Estimates: bounds that the engine keeps, whatever the model does."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.attacks import Job, LaneEngine, ThreatModel, parse_attacks
from robustvlm.commands.attack.cost import Budget, MeteredOracle, Speed, Work, estimate, looks_per_image
from robustvlm.commands.common.store import new_session
from robustvlm.core.ranks import Ranks

LABEL = 1


class Constant(torch.nn.Module):
    """Always says the label, or never; with a gradient, which leads nowhere."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = x.flatten(1).mean(1, keepdim=True) * 1e-3 + (5.0 if self.right else -5.0)
        return torch.cat([torch.zeros_like(score), score, torch.zeros_like(score) - 9], 1)


def spent(attacks: str, images: int, rungs: tuple[int, ...], model: torch.nn.Module) -> int:
    """Run attacks one after the other on the images that are left, and count the passes."""
    oracle = MeteredOracle(model, budget=Budget(), ranks=Ranks())
    jobs = [Job(str(i), i, torch.rand(3, 2, 2), LABEL, targets=(0, 2)) for i in range(images)]
    for attack in parse_attacks(attacks):
        engine = LaneEngine(oracle, attack, ThreatModel("L2", 0.1), lanes=rungs[0], seed=0, rungs=rungs)
        fooled = {result.job.index for result in engine.run(jobs) if result.outcome == "fooled"}
        jobs = [job for job in jobs if job.index not in fooled]
    return oracle.spent["images"]  # smaller batches that were tried are questions


@cache
def spent_one_by_one(attacks: str, images: int) -> int:
    """Count the passes of batches of one on images that never fall."""
    return spent(attacks, images, (1,), Constant(right=True))


def forecast(attacks: str, images: int, rungs: tuple[int, ...]) -> tuple[int, int]:
    work = [Work(attack, range(images), n_targets=2) for attack in parse_attacks(attacks)]
    found = estimate(work, Speed(rungs, {(rungs[0], True): 1.0}))
    return found.passes_least, found.passes_most


@settings(max_examples=15, deadline=None)
@given(images=st.integers(0, 9), rungs=st.sampled_from([(1,), (2, 1), (3, 2, 1)]))
def test_the_bounds_are_met_exactly_by_models_that_never_and_always_fall(images: int, rungs: tuple[int, ...]) -> None:
    attacks = "pgd:steps=3,apgd-ce:steps=2"
    least, most = forecast(attacks, images, rungs)
    assert spent(attacks, images, rungs, Constant(right=True)) == most
    assert spent(attacks, images, rungs, Constant(right=False)) == least


@settings(max_examples=8, deadline=None)
@given(images=st.integers(0, 4), rungs=st.sampled_from([(4,), (4, 2, 1), (8, 4, 2)]))
def test_restarts_that_run_ahead_in_spare_rows_cost_less_than_said(images: int, rungs: tuple[int, ...]) -> None:
    attacks = "pgd:steps=3:restarts=3,apgd-t:steps=2"
    _, most = forecast(attacks, images, rungs)
    needed = spent_one_by_one(attacks, images)
    assert needed <= spent(attacks, images, rungs, Constant(right=True)) <= most


@settings(max_examples=10, deadline=None)
@given(images=st.integers(0, 9), rungs=st.sampled_from([(1,), (4,), (8, 4, 2)]), right=st.booleans())
def test_attacks_that_share_batches_stay_between_the_bounds(images: int, rungs: tuple[int, ...], right: bool) -> None:
    attacks = "pgd:steps=3:restarts=2,apgd-ce:steps=2,apgd-dlr:steps=4"
    least, most = forecast(attacks, images, rungs)
    oracle = MeteredOracle(Constant(right), budget=Budget(), ranks=Ranks())
    jobs = [Job(str(i), i, torch.rand(3, 2, 2), LABEL, targets=(0, 2)) for i in range(images)]
    first, *then = parse_attacks(attacks)
    engine = LaneEngine(oracle, first, ThreatModel("L2", 0.1), lanes=rungs[0], seed=0, rungs=rungs, then=then)
    assert len(list(engine.run(jobs))) == images * (3 if right else 1)
    assert least <= oracle.spent["images"] <= most


@settings(max_examples=15, deadline=None)
@given(images=st.integers(1, 9), seed=st.integers(0, 99), rungs=st.sampled_from([(3,), (4, 2, 1)]))
def test_any_model_stays_between_the_bounds(images: int, seed: int, rungs: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    attacks = "pgd:steps=3,apgd-t:steps=2"
    least, most = forecast(attacks, images, rungs)
    assert least <= spent(attacks, images, rungs, model) <= most


def test_looks_count_starts_restarts_and_targets() -> None:
    plain, restarted, targeted = parse_attacks("pgd:steps=4,apgd-ce:steps=9:restarts=3,apgd-t:steps=9:targets=5")
    assert looks_per_image(plain, 9) == 5
    assert looks_per_image(restarted, 9) == 30
    assert looks_per_image(targeted, 9) == 5 * targeted.n_points()
    assert looks_per_image(targeted, 2) == 2 * targeted.n_points(), "a model of three classes has two targets"


def test_images_that_fall_are_counted_once_and_later_stages_add_only_to_the_most() -> None:
    first, second = parse_attacks("pgd:steps=1,apgd-ce:steps=1")
    speed = Speed((2,), {(2, True): 1.0})
    found = estimate([Work(first, {"a", "b"}), Work(second, {"a", "b", "c", "d"})], speed)
    assert found.images == 4
    assert (found.passes_least, found.seconds_least) == (4 + 4, 2.0)
    assert (found.passes_most, found.seconds_most) == (8 + 16, 2.0 + 4.0)


def test_processes_divide_the_time_but_not_the_passes() -> None:
    (attack,) = parse_attacks("pgd:steps=9")
    alone = estimate([Work(attack, range(64))], Speed((8,), {(8, True): 0.5}))
    four = estimate([Work(attack, range(64))], Speed((8,), {(8, True): 0.5}, ranks=4))
    assert four.passes_most == alone.passes_most == 64 * 10 * 2
    assert four.seconds_most == alone.seconds_most / 4 == 10.0


def test_draws_and_second_looks_of_random_models_cost_more() -> None:
    (attack,) = parse_attacks("pgd:steps=1")
    speed = Speed((2,), {(2, True): 1.0, (2, False): 0.25}, eot=3, second_looks=5)
    found = estimate([Work(attack, range(2))], speed)
    assert found.passes_most == 2 * (2 * 3 * 2 + 5)
    assert found.second_looks
    assert not estimate([Work(attack, range(2))], dataclasses.replace(speed, second_looks=0)).second_looks
    assert found.seconds_most == 2 * 3 * 1.0 + 5 * 0.25
    assert found.passes_least == 2 * (1 * 3 * 2 + 5)
    held = estimate([Work(attack, range(2)), Work(attack, range(2))], dataclasses.replace(speed, upholding=7))
    assert held.passes_least == found.passes_least + 2 * 7
    assert held.passes_most == 2 * found.passes_most + 2 * 7, "an image falls once"
    assert held.seconds_least == found.seconds_least + 7 * 0.25


def test_attacks_of_other_packages_are_named_and_not_guessed() -> None:
    (attack,) = parse_attacks("pgd:steps=1")
    found = estimate([Work(attack, ["a"]), Work("autoattack", ["a"])], Speed((1,), {}))
    assert found.unknown == ["autoattack"]
    assert found.passes_most == 4
    assert estimate([Work("autoattack", [])], Speed((1,), {})).unknown == []


def test_sessions_have_names_of_their_own() -> None:
    assert new_session() != new_session()
