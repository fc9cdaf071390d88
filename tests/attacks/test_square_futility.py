"""When Square gives up: the rule against a second implementation, searches it must not stop, masked models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import Curved, attack_all, fooled, right_jobs

from robustvlm.attacks import Job, ThreatModel, futility, objective, parse_attacks
from robustvlm.attacks.perturb import perturb
from robustvlm.attacks.square import Square


def stops(margins: torch.Tensor, reached: torch.Tensor | None = None) -> list[int | None]:
    """Return after how many queries the rule gives up on searches with these best margins [L, n + 1], or None.

    Args:
        reached: margins that gradients led to [L].
    """
    n_iter, lanes = margins.shape[1] - 1, len(margins)
    state = {name: value.expand(lanes, *value.shape[1:]) for name, value in futility.begin(torch.zeros(1)).items()}
    if reached is not None:
        state["by_gradients"] = -reached
    before, stopped = torch.full((lanes,), float("inf")), [None] * lanes
    for query in range(n_iter + 1):
        now, step = margins[:, query], torch.full((lanes,), query)
        state |= futility.watch(state, -now, now < before, step, n_iter)
        before = now
        if query % 5 == 0:
            for lane in torch.nonzero(futility.futile(state, step, n_iter)).flatten().tolist():
                stopped[lane] = stopped[lane] or query
    return stopped


def stops_at(margins: list[float]) -> int | None:
    return stops(torch.tensor([margins], dtype=torch.float64))[0]


def second_opinion(margins: list[float], reached: float = math.inf) -> int | None:
    """The rule again, query by query, from its description (for a number of queries that 320 divides)."""
    n = len(margins) - 1

    def reaches(now: float, half: float, quarter: float, query: int, doubt: float) -> bool:
        pace, before = (half - now) / (query / 2), (quarter - half) / (query / 4)
        if math.isnan(pace) or math.isnan(before):
            return True
        if pace == 0:
            return now <= 0
        falls = min(max(math.log2(before / pace) - doubt, 0), 1) if 0 < before < math.inf else 0
        # The pace of every query to come, summed up in small pieces.
        edges = torch.linspace(math.log(query), math.log(n), 4001, dtype=torch.float64).exp()
        middles, widths = (edges[1:] * edges[:-1]).sqrt(), edges.diff()
        return now - 2 * pace * float(((middles / query) ** -falls * widths).sum()) <= 0

    def odds(value: float) -> float:
        return 2 * math.atanh(value) if abs(value) < 1 else math.copysign(math.inf, value)

    for query in (ask for ask in range(0, n, n // 80) if ask >= max(n // 10, 500)):
        now, half, quarter = margins[query], margins[query // 2], margins[query // 4]
        if query % (n // 40) and not now > reached:
            continue  # asked half as often
        improvements, earlier = (
            sum(margins[i] < margins[i - 1] for i in range(start + 1, end + 1))
            for start, end in ((query // 2, query), (query // 4, query // 2))
        )
        doubt = math.sqrt(1 / max(improvements, 1) + 1 / max(earlier, 1)) / math.log(2) if now > reached else math.inf
        steady = (half - now) / (query / 2) <= 1.5 * (quarter - half) / (query / 4)
        sure = margins[0] > 1 or not reaches(odds(now), odds(half), odds(quarter), query, doubt)
        if improvements >= 5 and steady and sure and not reaches(now, half, quarter, query, doubt):
            return query
    return None


def test_the_rule_is_the_one_described():
    draws, lanes, n = torch.Generator().manual_seed(0), 150, 1600
    paces = torch.rand(lanes, 8, generator=draws, dtype=torch.float64) ** 3
    improves = torch.rand(lanes, n, generator=draws) < torch.rand(lanes, 1, generator=draws) ** 4
    falls = torch.cat([torch.zeros(lanes, 1), (paces.repeat_interleave(n // 8, dim=1) * improves).cumsum(1)], dim=1)
    start = torch.rand(lanes, 1, generator=draws) * 3
    margins = start * (1 - 0.95 * falls / falls[:, -1:].clamp_min(1))
    expected = [second_opinion(row) for row in margins.tolist()]
    assert stops(margins) == expected
    assert len(set(expected)) > 5
    assert expected.count(None) > 20
    reached = torch.where(
        torch.rand(lanes, generator=draws) < 0.2, torch.inf, margins[:, -1] * torch.rand(lanes, generator=draws) * 1.5
    ).double()
    behind = [second_opinion(row, bound) for row, bound in zip(margins.tolist(), reached.tolist(), strict=True)]
    assert stops(margins, reached) == behind
    sooner = [(b or n) - (a or n) for a, b in zip(expected, behind, strict=True)]
    assert max(sooner) == 0
    assert sum(value < 0 for value in sooner) > 5


def falling(shape: str, n: int = 2000) -> list[float]:
    """Searches that succeed shortly before their end."""
    share = [query / (n - 20) for query in range(n + 1)]
    return {
        "at an even pace": [1.5 * (1 - s) for s in share],
        "slower and slower": [1.5 * (1 - math.log1p(50 * s) / math.log(51)) for s in share],
        "from a saturated start": [math.tanh(8 * (1 - s)) for s in share],
        "in float32, saturated flat": torch.tensor([24 * (1 - s) for s in share]).tanh().tolist(),
        "after a standstill": [min(1.5, 3 * (1 - s)) for s in share],
        "in rare jumps": [1.5 - 0.5 * round(3 * s - 0.4) for s in share],
    }[shape]


@pytest.mark.parametrize(
    "shape",
    ["at an even pace", "slower and slower", "from a saturated start", "in float32, saturated flat",
     "after a standstill", "in rare jumps"],
)  # fmt: skip
def test_a_search_that_succeeds_late_is_not_stopped(shape):
    margins = falling(shape)
    assert min(margins) <= 0
    assert stops_at(margins[: 1 + next(i for i, margin in enumerate(margins) if margin <= 0)] + [0.0] * 20) is None


def test_a_search_far_from_success_is_stopped_early_but_not_before_500_queries():
    for n in (800, 2000, 5000):
        margins = [3.0 - 0.1 * math.log1p(query) for query in range(n + 1)]
        assert 500 <= (stops_at(margins) or n) <= max(n // 8, 520)
    assert stops_at([3.0 - 0.1 * math.log1p(query) for query in range(501)]) is None


class Noisy(nn.Module):
    """A linear model of independent weights: only small squares make progress, so that successes come late."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 16 * 16, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return (x.flatten(1) - 0.5) @ self.weight


class Rounded(Noisy):
    """Pixels are rounded to 17 levels first: the gradient is zero wherever it is taken."""

    def forward(self, x):
        return super().forward((x * 16).round() / 16)


class Saturated(Noisy):
    """Probabilities in place of logits: margins start next to 1 and move only shortly before the end."""

    def forward(self, x):
        return (super().forward(x) * 0.5).softmax(1)


def large_jobs(model: nn.Module, count: int) -> list[Job]:
    x = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [Job(str(i), i, x[i], int(label)) for i, label in enumerate(model(x).argmax(1))]


@pytest.mark.parametrize(("model", "eps"), [(Rounded(), 0.02), (Saturated(), 0.03)], ids=["rounded", "saturated"])
def test_on_masked_models_square_finds_as_much_as_without_giving_up(model, eps):
    threat, jobs = ThreatModel("Linf", eps), large_jobs(model, 16)
    on, off = (attack_all(model, Square(n_iter=1500, futility=give_up), threat, jobs, lanes=16) for give_up in (1, 0))
    late = [result.steps for result in off if result.outcome == "fooled" and result.steps > 500]
    assert len(late) > 1, "a rule that is asked from query 500 on can only fail on later successes"
    assert fooled(on) == fooled(off)


def test_square_breaks_what_a_masked_gradient_hides():
    model, threat = Rounded(), ThreatModel("Linf", 0.02)
    jobs = large_jobs(model, 16)
    gradient = fooled(attack_all(model, parse_attacks("apgd-ce", steps=20)[0], threat, jobs, lanes=16))
    assert len(fooled(attack_all(model, Square(n_iter=300), threat, jobs, lanes=16))) > len(gradient) + 4


def test_hopeless_images_cost_less_and_answers_say_the_same():
    model, threat = Curved(), ThreatModel("Linf", 0.004)
    jobs = right_jobs(model, 8)
    on, off = (attack_all(model, Square(n_iter=1200, futility=give_up), threat, jobs, lanes=8) for give_up in (1, 0))
    assert fooled(on) == fooled(off)
    robust = [(a.passes, b.passes) for a, b in zip(on, off, strict=True) if b.outcome == "robust"]
    assert {b for _, b in robust} == {1201}
    assert sum(a for a, _ in robust) < 0.6 * sum(b for _, b in robust)


def test_objectives_without_a_zero_at_success_never_give_up():
    model, threat = Curved(), ThreatModel("Linf", 1e-4)
    attack = Square(n_iter=520, objective=objective("ce"))
    assert {result.steps for result in attack_all(model, attack, threat, right_jobs(model, 4))} == {520}


@pytest.mark.parametrize("eps", [0.015, 0.02])
def test_what_gradients_hide_square_finds_after_them_as_well(eps):
    model = Rounded()
    images = torch.stack([job.pixels for job in large_jobs(model, 16)])
    labels = model(images).argmax(1)
    found = [
        perturb(model, images, labels, eps=eps, attack=f"apgd-ce:steps=10,square:queries=1500:futility={on}", lanes=16)
        for on in ("on", "off")
    ]
    assert sum(by is not None and by.startswith("square") for by in found[0].by) > 5
    assert torch.equal(found[0].fooled, found[1].fooled)


def test_square_is_told_how_far_gradients_came_where_its_loss_is_the_margin():
    threat = ThreatModel("Linf", 0.008)
    job = replace(right_jobs(Curved(seed=4), 1, seed=4)[0], reached=0.25)
    told = {}
    for text in ("square", "square:objective=dlr", "square:futility=off"):
        attack = parse_attacks(text)[0]
        state = attack.begin(job.pixels[None], threat, torch.Generator().manual_seed(0), 0)
        told[text] = attack.told(state, job).get("by_gradients")
    assert told["square"].tolist() == [-0.25]
    assert told["square:objective=dlr"].tolist() == [-math.inf]
    assert told["square:futility=off"] is None
