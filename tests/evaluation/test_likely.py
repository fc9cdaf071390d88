"""The likely cost of a run: closed forms, how often the range holds, and that it never says less than was paid."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from attacking import prepared
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.commands.attack.likely import FEWEST, Outlook, first_finished, in_all, passes_left
from robustvlm.report.words import cost_rows, likely_passes
from robustvlm.runs.records import Cost, Estimate
from robustvlm.runs.settings import Observer
from robustvlm.stats import rate


@given(st.lists(st.booleans(), max_size=200))
def test_the_first_images_are_judged_by_as_soon_as_all_of_them_are_finished(finished):
    count = first_finished(finished)
    assert all(finished[:count])
    if all(finished):
        assert count == (len(finished) if len(finished) >= FEWEST else 0)
    elif count:
        assert math.log2(count / FEWEST).is_integer()
        assert not all(finished[: 2 * count])
    else:
        assert not all(finished[:FEWEST]) or len(finished) < FEWEST


def test_images_that_all_cost_the_same_leave_no_doubt():
    same = Outlook(ready=25, least=2, most=500, passes=[40] * 16, withstood=0)
    assert passes_left([same]) == (1000.0, 1000.0)
    low, high = passes_left([same, Outlook(ready=3, least=2, most=80)])
    reach = 25 * rate(0, 16).high  # those that may go on although none has
    assert (low, high) == (1000.0 + 3 * 2, 1000.0 + (3 + reach) * 80)


def test_a_mean_is_known_to_two_standard_errors_of_the_sample_and_of_what_is_to_come():
    passes = [10, 30] * 8
    error = 2 * math.sqrt(sum((one - 20) ** 2 for one in passes) / 15 * (1 / 16 + 1 / 40))
    low, high = passes_left([Outlook(ready=40, least=2, most=500, passes=passes, withstood=4)])
    assert (low, high) == pytest.approx((40 * (20 - error), 40 * (20 + error)))


@given(
    st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 10**6), st.integers(0, 10**6), st.floats(1, 5),
    st.integers(0, 1000),
)  # fmt: skip
def test_never_less_than_is_paid(low, more, paid, under_way, dearer, checks):
    least, most = in_all((low, low + more), paid=paid, under_way=under_way, dearer=dearer, checks=checks)
    assert paid <= least <= most


@pytest.mark.parametrize("seed", range(3))
def test_the_range_holds_as_often_as_it_says(seed):
    """Images that fall after a random number of passes, or cost all of them and go on to a second attack."""
    draws = random.Random(seed)
    held, trials = 0, 200
    for _ in range(trials):
        falls = [min(1 + int(draws.expovariate(0.1)), 60) for _ in range(100)]
        second = [draws.choice((20, 200)) for cost in falls if cost == 60]
        first = falls[:32]
        at = Outlook(ready=68, least=1, most=60, passes=first, withstood=sum(cost == 60 for cost in first))
        ready = at.withstood
        low, high = passes_left([at, Outlook(ready=ready, least=1, most=200)])
        held += low <= sum(falls[32:]) + sum(second) <= high
    assert held / trials > 0.9


def test_words_round_away_from_the_middle():
    assert likely_passes(12_345, 12_346) == "12,345"
    low, high = (int(text.replace(",", "")) for text in likely_passes(12_345, 98_701).split(" \N{EN DASH} "))
    assert (low, high) == (12_000, 99_000)


class Listening(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def advance(self, count: int = 1, **shown: str) -> None:
        del count
        self.said += [shown["likely"]] if "likely" in shown else []


def test_a_run_says_it_once_enough_images_are_finished_and_what_it_became(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustvlm.commands.attack.work.write_report", lambda folder: (folder / "report.html").touch())
    monkeypatch.setattr("robustvlm.commands.attack.run._COST_SECONDS", 0.0)
    seen = Listening()
    run = prepared(make_folder(), attack="pgd:steps=4,apgd-t:steps=4", eps="2/255", lanes=4)
    summary = run.run(seen)
    estimate, cost = summary.estimate, summary.cost
    became = cost.forward_passes + cost.backward_passes
    assert seen.said
    assert seen.said[-1] == f"{became:,} passes in all"
    assert estimate is not None
    assert estimate.likely_least is not None
    assert estimate.likely_most is not None
    assert estimate.likely_least <= became * 1.2
    assert estimate.likely_after is not None
    assert estimate.likely_after >= FEWEST
    rows = dict(cost_rows(cost, estimate))
    assert rows["Likely passes in all, no bound"].endswith(f"{became:,} were spent")


def test_a_run_that_has_said_nothing_likely_has_no_row_of_it():
    plain = Estimate(images=1, passes_least=2, passes_most=3, seconds_least=0.0, seconds_most=0.0)
    assert not [label for label, _ in cost_rows(Cost(), plain) if "ikely" in label]
