"""What a random search is told of the attacks before it: the margins of those with gradients, at its radius."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attacking import prepared, run_in_pieces

from robustvlm.attacks import Job
from robustvlm.commands.attack.run import AttackRun
from robustvlm.commands.attack.store import Ledger


def test_square_is_told_the_margins_of_attacks_with_gradients_before_it(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[tuple[float, str, int], float] = {}
    jobs_of = AttackRun._jobs

    def noted(self: AttackRun, wanted: Any, stage: Any) -> Iterator[Job]:
        for job in jobs_of(self, wanted, stage):
            told[stage.threat.eps, stage.attack.name, job.index] = job.reached
            yield job

    monkeypatch.setattr(AttackRun, "_jobs", noted)
    monkeypatch.setattr("robustvlm.commands.attack.work.write_report", lambda folder: (folder / "report.html").touch())
    first, between, last = "square:queries=2", "pgd:steps=2", "square:queries=3"
    plan = {"attack": f"{first},{between},{last},fgsm", "eps": "0.25/255,0.5/255"}
    photos = make_folder(12)
    prepared(photos, name="straight", **plan).run()
    straight, found = dict(told), Ledger(prepared(photos, name="straight", **plan).folder).found
    told.clear()
    run_in_pieces(lambda: prepared(photos, **plan), [5, 17, 9])
    assert told == straight, "after interruptions as well"
    heard = {key: value for key, value in told.items() if key[1] == last}
    assert heard
    for (eps, _, index), value in heard.items():
        fact = found[eps, "misclassify", between, index]
        assert fact.outcome == "robust"
        assert value == fact.margin
    assert {value for (_, name, _), value in told.items() if name == first} == {math.inf}
