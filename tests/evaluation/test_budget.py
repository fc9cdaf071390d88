"""Budgets: read as written, spent to the last pass and never beyond, shared among processes."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.attacks import PGD, Job, LaneEngine, ThreatModel
from robustvlm.attacks.oracle import Passes
from robustvlm.commands.attack.cost import Budget, BudgetSpent, Meter, MeteredOracle, parse_budget
from robustvlm.core.ranks import Ranks
from robustvlm.errors import UserError


@pytest.mark.parametrize(
    ("text", "passes", "seconds"),
    [
        ("20000passes", 20000, float("inf")),
        (" 1e6 Passes ", 1e6, float("inf")),
        ("1pass", 1, float("inf")),
        ("90s", float("inf"), 90),
        ("1.5min", float("inf"), 90),
        (".5h", float("inf"), 1800),
    ],
)
def test_budgets_are_read(text: str, passes: float, seconds: float) -> None:
    budget = parse_budget(text)
    assert (budget.passes, budget.seconds) == (passes, seconds)


@pytest.mark.parametrize("text", ["", "10", "min", "-5min", "0passes", "10 days", "1e999h", "nanmin", "1_000passes"])
def test_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UserError, match="expected for example 20000passes, 90s, 10min or 2h"):
        parse_budget(text)


def test_no_budget_is_no_limit() -> None:
    meter = Meter(parse_budget(None), Passes(forward=10**12), Ranks())
    meter.deal_out(10**15)
    meter.require(10**12)


def engine(oracle: MeteredOracle, lanes: int = 4) -> LaneEngine:
    return LaneEngine(oracle, PGD(n_iter=5), ThreatModel("Linf", 1e-4), lanes=lanes, seed=0)


def linear() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))


@settings(max_examples=25, deadline=None)
@given(allowed=st.integers(0, 150), lanes=st.integers(1, 5))
def test_an_attack_stops_before_the_pass_that_goes_beyond_and_keeps_what_it_has(allowed: int, lanes: int) -> None:
    jobs = [Job(str(i), i, torch.rand(3, 2, 2), label=0) for i in range(6)]
    oracle = MeteredOracle(linear(), budget=Budget(passes=allowed), ranks=Ranks())
    oracle.meter.deal_out(0)
    done, stopped = [], False
    try:
        for result in engine(oracle, lanes).run(jobs):
            done.append(result)
    except BudgetSpent:
        stopped = True
    spent = oracle.passes.forward + oracle.passes.backward
    assert spent <= allowed
    assert stopped == (len(done) < 6)
    assert not stopped or spent > allowed - 2 * lanes, "it stops only when the next pass would not fit"


@pytest.mark.parametrize("allowed", [0, 40, 200, 500, 1000])
def test_second_looks_are_paid_from_the_budget_too(allowed: int) -> None:
    class Noisy(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = super().forward(x)
            return logits + torch.randn_like(logits)

    jobs = [Job(str(i), i, torch.rand(3, 2, 2), label=0) for i in range(6)]
    oracle = MeteredOracle(Noisy(*linear()), budget=Budget(passes=allowed), ranks=Ranks(), eot=2, draws=21)
    oracle.upholding = 101
    oracle.meter.deal_out(0)
    with pytest.raises(BudgetSpent):
        list(engine(oracle).run(jobs))
    assert allowed - 16 < oracle.passes.forward + oracle.passes.backward <= allowed


def test_what_is_left_is_dealt_out_evenly() -> None:
    passes = Passes()
    meter = Meter(Budget(passes=100), passes, Ranks(1, 4))
    passes.forward = 7
    meter.deal_out(20)
    meter.require(20)
    with pytest.raises(BudgetSpent):
        meter.require(21)
    passes.forward += 20
    meter.deal_out(100)
    with pytest.raises(BudgetSpent):
        meter.require(1)


def test_time_runs_out() -> None:
    meter = Meter(Budget(seconds=0.05), Passes(), Ranks())
    meter.require(1)
    time.sleep(0.06)
    with pytest.raises(BudgetSpent):
        meter.require(1)


def test_batches_are_timed_by_size_and_kind() -> None:
    oracle = MeteredOracle(linear(), budget=Budget(), ranks=Ranks())
    list(engine(oracle).run([Job("a", 0, torch.rand(3, 2, 2), label=0)]))
    oracle.confirm(torch.rand(2, 3, 2, 2))
    # The engine has tried a smaller batch as well, since three of the four rows were spare.
    assert {(4, True), (2, False)} <= oracle.seconds.keys() <= {(4, True), (2, False), (1, True), (2, True), (3, True)}
    assert all(0 < seconds < 5 for seconds in oracle.seconds.values())
