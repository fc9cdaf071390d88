"""The comparison of two programs: what it keeps, what it counts, and that it watches the published one rightly."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks.common import Counted, clock
from benchmarks.duel import OURS, SPARE, Part, Record, run_ours, run_together, timed, versus, where_time_goes
from benchmarks.published import CHECKS, set_budget, watch_autoattack
from robustvlm.attacks import APGD, Job, LaneAttack, Oracle, ThreatModel, parse_attacks
from robustvlm.attacks.probe import probe
from robustvlm.errors import UserError

BALL = ThreatModel("Linf", 0.01)


class Curved(nn.Module):
    """A small network with curved decision boundaries on 3 x 6 x 6 pixels."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(108, 24, generator=draws) * 0.4)
        self.second = nn.Parameter(torch.randn(24, 12, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((x.flatten(1) - 0.5) @ self.first) @ self.second


def jobs(count: int) -> list[Job]:
    x = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return [Job(f"i{row}", row, x[row], int(label)) for row, label in enumerate(Curved()(x).argmax(1))]


def test_a_record_is_continued_and_refuses_other_settings(tmp_path: Path) -> None:
    part = Part("apgd-ce", 3, ["a", "b"], 15, 1.5)
    Record(tmp_path / "x.json", {"eps": "4/255"}).add(OURS, part)
    again = Record(tmp_path / "x.json", {"eps": "4/255"})
    assert again.parts == {OURS: {"apgd-ce": part}}
    assert again.has(OURS, "apgd-ce")
    assert not again.has("other", "apgd-ce")
    assert again.fooled(OURS) == {"a", "b"}
    with pytest.raises(UserError, match="other settings"):
        Record(tmp_path / "x.json", {"eps": "8/255"})


def test_rows_show_robustness_disagreements_and_ratios(tmp_path: Path) -> None:
    record = Record(tmp_path / "x.json", {})
    record.add(OURS, Part("a", 4, ["1", "2"], 50, 5.0))
    record.add("theirs", Part("a", 4, ["2", "3"], 100, 20.0))
    ours, theirs = versus(record, "theirs", ["a"], ids=["1", "2", "3", "4"], seen=5)
    assert ours[1].startswith("2/5 (40.0%")
    assert ours[2:] == ["1: 1", "1", "50", "0.50", "5.0", "0.25"]
    assert theirs[2:] == ["1: 3", "1", "100", "1.00", "20.0", "1.00"]


def test_the_published_program_is_watched_without_changing_what_it_finds() -> None:
    images = jobs(9)
    adjust = set_budget(3, 20)
    parts = watch_autoattack(Counted(Curved()), images, BALL, seed=0, batch_size=4, adjust=adjust)
    assert [part.name for part in parts] == [CHECKS, "apgd-ce", "apgd-t", "fab-t", "square"]
    # Five repetitions, two looks at the output of the first batch, and the clean pass.
    assert (parts[0].passes, parts[0].fooled) == (7 * 4 + 9, [])

    model = Counted(Curved())
    program = AutoAttack(model, norm="Linf", eps=BALL.eps, seed=0, version="standard", device="cpu")
    adjust(program)
    x, y = torch.stack([job.pixels for job in images]), torch.tensor([job.label for job in images])
    found, _ = program.run_standard_evaluation(x, y, batch_size=4)
    broken = {
        job.image_id for job, wrong in zip(images, (Curved()(found).argmax(1) != y).tolist(), strict=True) if wrong
    }
    assert {image for part in parts for image in part.fooled} == broken
    assert 0 < len(broken) < 9
    assert sum(part.passes for part in parts) == model.passes
    for before, after in pairwise(parts):
        assert after.attacked == before.attacked - len(before.fooled)


def test_one_attack_after_another_is_the_whole() -> None:
    """The ensemble by turns, each attack on what the one before left, finds what one call finds."""
    images, by_turns = jobs(9), []
    whole = watch_autoattack(Counted(Curved()), images, BALL, seed=0, batch_size=4, adjust=set_budget(3, 20))
    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
        gone = {image for part in by_turns for image in part.fooled}
        left = [job for job in images if job.image_id not in gone]
        adjust = set_budget(3, 20)
        by_turns += watch_autoattack(Counted(Curved()), left, BALL, seed=0, batch_size=4, attacks=[name], adjust=adjust)
    kept = {part.name: (part.fooled, part.passes) for part in by_turns if part.name != CHECKS}
    assert kept == {part.name: (part.fooled, part.passes) for part in whole if part.name != CHECKS}


def test_our_side_counts_what_the_model_sees() -> None:
    images, model = jobs(6), Counted(Curved())
    found = probe(
        Oracle(model), torch.stack([job.pixels for job in images]), torch.tensor([job.label for job in images])
    )
    before = model.passes
    part = run_ours(model, APGD(name="apgd-ce:steps=4", n_iter=4), BALL, images, found, seed=0)
    assert part.name == "apgd-ce"
    assert part.passes == model.passes - before > 0
    assert 0 < part.model_seconds + part.step_seconds < part.seconds
    assert run_ours(model, APGD(n_iter=4), BALL, [], found, seed=0).attacked == 0


def test_attacks_that_share_batches_find_what_each_finds_by_itself(tmp_path: Path) -> None:
    images = jobs(9)
    x, y = torch.stack([job.pixels for job in images]), torch.tensor([job.label for job in images])
    ranked = Curved()(x).argsort(1, descending=True).tolist()
    images = [
        replace(job, targets=tuple(other for other in classes if other != job.label))
        for job, classes in zip(images, ranked, strict=True)
    ]
    attacks = [item for item in parse_attacks("apgd-ce:steps=4,apgd-t:steps=4") if isinstance(item, LaneAttack)]
    model = Counted(Curved())
    found = probe(Oracle(model), x, y)
    before = model.passes
    parts = run_together(model, attacks, BALL, images, found, seed=0)
    assert [part.name for part in parts] == ["apgd-ce", "apgd-t", SPARE]
    assert sum(part.passes for part in parts) == model.passes - before

    first = run_ours(model, attacks[0], BALL, images, found, seed=0)
    left = [job for job in images if job.image_id not in first.fooled]
    second = run_ours(model, attacks[1], BALL, left, found, seed=0)
    assert [(part.fooled, part.attacked) for part in parts[:2]] == [(p.fooled, p.attacked) for p in (first, second)]

    record = Record(tmp_path / "r.json", {})
    for part in parts:
        record.add(OURS, part)
    row = where_time_goes(record, ["apgd-ce", "apgd-t", SPARE])
    assert row[0] == f"apgd-ce, apgd-t, {SPARE}"
    inside = [float(str(cell).rstrip("%")) for cell in row[2:]]
    assert min(inside) >= 0  # an attack's arithmetic is not counted again in the class that it is built on
    assert sum(inside) == pytest.approx(100, abs=0.2)
    assert record.part("theirs", SPARE).passes == 0


def test_timing_a_method_leaves_it_as_it_was() -> None:
    class Thing:
        def twice(self, value: int) -> int:
            return 2 * value

    original = Thing.twice

    class Other(Thing):
        def twice(self, value: int) -> int:
            time.sleep(0.01)
            return super().twice(value)

    with clock() as whole, timed("twice", Thing, Other) as total:
        assert Thing().twice(3) == Other().twice(3) == 6
    assert Thing.twice is original
    assert 0.01 <= total.seconds <= whole.seconds
