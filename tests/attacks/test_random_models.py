"""Random models: averaged gradients, verdicts by majority over fresh draws, the caller's random state left alone."""

from __future__ import annotations

import pytest
import torch
from toy import CHANNELS, SIDE, Curved, Linear, images

from robustvlm.attacks import (
    FOOLED,
    PGD,
    ROBUST,
    Case,
    Job,
    LaneEngine,
    Misclassify,
    Oracle,
    ThreatModel,
    objective,
    parse_attacks,
)
from robustvlm.attacks.lanes import Best, Fact
from robustvlm.attacks.oracle import Tally
from robustvlm.attacks.perturb import perturb
from robustvlm.attacks.probe import probe, settle_draws


class Noisy(torch.nn.Module):
    """A linear model behind fresh Gaussian noise on its logits."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.scale, self.calls = Linear(), scale, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits = self.inner(x)
        return logits + self.scale * torch.randn(logits.shape)


class NoisyInput(Noisy):
    """The same behind noise on the pixels, so that gradients are random too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x + self.scale * torch.randn(x.shape)))


def image() -> torch.Tensor:
    return torch.rand(CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_gradients_are_averaged_over_the_draws() -> None:
    x, label = image()[None], torch.tensor([0])
    spread = []
    for eot in (1, 64):
        oracle = Oracle(NoisyInput(1.0), eot=eot, draws=3)
        looks = [oracle.look(x, Misclassify(), objective("margin"), Case(label))[2] for _ in range(24)]
        spread.append(torch.stack(looks).std(0).mean().item())
        assert oracle.passes.forward == oracle.passes.backward == 24 * eot
    assert spread[1] < spread[0] / 5, "the error of a mean of 64 draws is 8 times smaller"


@pytest.mark.parametrize("draws", [2, 3, 7])
def test_the_prediction_is_the_most_frequent_of_the_side_that_won(draws: int) -> None:
    """Against a second implementation, image by image; of several that are as frequent, the lowest class."""
    generator = torch.Generator().manual_seed(draws)
    label = torch.arange(60) % 4
    outputs = [torch.randint(0, 3, (60, 4), generator=generator).float() for _ in range(draws)]
    tally = Tally(Misclassify(), Case(label), 60, torch.device("cpu"))
    for output in outputs:
        tally.add(output)
    answer = tally.answer()
    for row in range(60):
        said = [int(output[row].argmax()) for output in outputs]
        fooled = [bool(Misclassify().reached(output, Case(label))[row]) for output in outputs]
        won = [k for k, reached in zip(said, fooled, strict=True) if reached == bool(answer.reached[row])]
        expected = min(set(won), key=lambda k: (-won.count(k), k)) if won else said[0]
        assert int(answer.prediction[row]) == expected


def test_a_lucky_draw_is_no_success() -> None:
    """Noise flips the class in a minority of draws: every single look finds flips, the majority never does."""
    model = Noisy(2.0)
    x = image()
    label = int(model.inner(x[None]).argmax())
    gap = model.inner(x[None])[0].detach().sort(descending=True).values
    model.scale = float(gap[0] - gap[1]) * 0.8
    torch.manual_seed(0)
    flips = sum(int(model(x[None]).argmax()) != label for _ in range(400)) / 400
    assert 0.05 < flips < 0.35
    threat = ThreatModel("Linf", 1e-7)
    outcomes = {}
    for draws in (1, 101):
        oracle = Oracle(model, eot=1, draws=draws, seed=3)
        engine = LaneEngine(oracle, PGD(n_iter=20), threat, lanes=1, seed=0)
        outcomes[draws] = [r.outcome for r in engine.run([Job("a", 0, x, label)])]
    assert outcomes == {1: [FOOLED], 101: [ROBUST]}


def test_a_majority_of_wrong_draws_is_a_success_and_the_worst_draw_is_the_margin() -> None:
    model = Noisy(0.05)
    x = image()
    label = int(model.inner(x[None]).argmax())
    oracle = Oracle(model, eot=4, draws=21)
    engine = LaneEngine(oracle, PGD(n_iter=20), ThreatModel("Linf", 0.5), lanes=1, seed=0)
    (result,) = engine.run([Job("a", 0, x, label)])
    assert result.outcome == FOOLED
    assert result.prediction != label
    # Two looks at least (start, success) of four draws forward and backward, and one verdict of 21 draws.
    assert result.passes % 8 == 21 % 8


@pytest.mark.parametrize(("eot", "draws"), [(1, 1), (2, 5)])
def test_draws_follow_from_the_seed_and_leave_the_callers_alone(eot: int, draws: int) -> None:
    answers, model = [], Noisy(1.0)
    for caller in (7, 8):
        torch.manual_seed(caller)
        before = torch.random.get_rng_state()
        oracle = Oracle(model, eot=eot, draws=draws, seed=1)
        answer = oracle.judge(image()[None], Misclassify(), Case(torch.tensor([0])))
        assert torch.equal(torch.random.get_rng_state(), before)
        answers.append(answer.margin.item())
    assert answers[0] == answers[1]
    other = Oracle(model, eot=eot, draws=draws, seed=2)
    assert other.judge(image()[None], Misclassify(), Case(torch.tensor([0]))).margin.item() != answers[0]


@pytest.mark.parametrize("draws", [1, 3, 20])
def test_memory_of_an_averaged_gradient_does_not_grow(draws: int) -> None:
    """Only one draw's graph is alive at a time."""
    alive: list[int] = []

    class Watch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            token = _Token.apply(x, alive)
            return token.flatten(1)[:, :4] * 2

    Oracle(Watch(), eot=draws, draws=1 + 2 * draws).look(
        image()[None], Misclassify(), objective("ce"), Case(torch.tensor([0]))
    )
    assert alive == [0]


class _Token(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alive):
        ctx.alive = alive
        alive.append(0) if not alive else None
        alive[0] += 1
        assert alive[0] == 1, "a second graph was built before the first was freed"
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.alive[0] -= 1
        return grad, None


@pytest.mark.parametrize("name", ["apgd-t:steps=2", "fab-t:steps=2", "apgd-t:steps=2:restarts=2"])
def test_targeted_attacks_come_to_their_end_under_a_second_look(name: str) -> None:
    model = Noisy(1e-3)
    x = image()
    order = model.inner(x[None])[0].argsort(descending=True).tolist()
    engine = LaneEngine(
        Oracle(model, eot=2, draws=3), parse_attacks(name)[0], ThreatModel("Linf", 1e-6), lanes=2, seed=0
    )
    jobs = [Job(f"image-{i}", i, x, order[0], tuple(order[1:])) for i in range(3)]
    assert [result.outcome for result in engine.run(jobs)] == [ROBUST] * 3


class Gated(torch.nn.Module):
    """Says that it draws, and does so only on images that are darker than the first ones."""

    random_draws = 16
    attack_remark = "it draws behind a gate"

    def __init__(self) -> None:
        super().__init__()
        self.inner = Curved()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = 0.3 * torch.randn_like(x) * (x.flatten(1).mean(1) < 0.2).float()[:, None, None, None]
        return self.inner(x + noise)


def bright(count: int) -> torch.Tensor:
    return torch.rand(count, CHANNELS, SIDE, SIDE) * 0.2 + 0.6


def test_a_part_that_says_it_draws_is_believed_where_the_first_images_do_not_show_it() -> None:
    oracle = Oracle(torch.nn.Sequential(Gated()))
    found = probe(oracle, bright(8), torch.zeros(8, dtype=torch.int64))
    assert (found.repeat_change, found.random, found.shown_random, found.coupled) == (0, True, False, False)
    settle_draws(oracle, found)
    assert (oracle.eot, oracle.draws) == (16, 21)
    assert not probe(Oracle(Curved()), bright(8), torch.zeros(8, dtype=torch.int64)).random


def test_what_a_part_has_to_say_is_said() -> None:
    x = bright(2)
    found = perturb(Gated(), x, Curved()(x).argmax(1), eps=0.01, attack="pgd:steps=2", eot=1, draws=1)
    assert "It draws behind a gate." in found.remarks
    assert any("random" in remark for remark in found.remarks)


class NoisyLogits(torch.nn.Module):
    """A linear model behind noise on its logits: around its boundary every share of wrong draws is met."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.inner(x)
        return logits + torch.randn(logits.shape)


@pytest.mark.parametrize("leave", [True, False])
def test_a_success_that_holds_is_kept_and_none_is_bought_twice(leave: bool) -> None:
    """Upheld by its majority of 101 draws it has the worse margin of them all, and is the success all the same."""
    model, x = NoisyLogits(), images(24)
    labels = model.inner(x).argmax(1).tolist()
    oracle = Oracle(model, eot=10, draws=21, seed=0)
    oracle.upholding = 101
    attack = parse_attacks("apgd-ce:steps=8")[0].for_random_model()
    engine = LaneEngine(oracle, attack, ThreatModel("Linf", 0.04), lanes=24, seed=0, leave=leave)
    results = list(engine.run([Job(str(i), i, x[i], labels[i]) for i in range(24)]))
    fooled = [result for result in results if result.outcome == FOOLED]
    assert 4 < engine.upheld <= len(fooled) < 24
    assert engine.claimed > engine.upheld
    assert all(result.prediction != result.job.label for result in fooled)
    most = 24 * 9 * 2 * oracle.eot + (engine.claimed + 24) * (oracle.draws + oracle.upholding)
    assert sum(result.passes for result in results) < most


def test_a_success_comes_before_a_lower_margin_and_the_best_look_after_it_waits() -> None:
    x = torch.rand(4, 3, 2, 2)

    def fact(margin: float, *, upheld: bool = False, look: float | None = None) -> Fact:
        return Fact(upheld, margin, 1, 0.5, True, None, upheld=upheld, look=margin if look is None else look)

    best = Best()
    best.take(x[0], fact(-2.0), 0, decisive=False)
    best.take(x[1], fact(0.5, upheld=True, look=-1.0), 0, decisive=False)
    assert (best.fact, best.deeper) == (fact(0.5, upheld=True, look=-1.0), None)
    for place, margin in ((2, -0.5), (2, -3.0), (3, -2.0)):
        best.take(x[place], fact(margin), 0, decisive=False)
    assert best.deeper is not None
    assert torch.equal(best.deeper.x, x[2])
    best.settle(fact(0.9, upheld=True))
    assert torch.equal(best.x, x[1])
    best.take(x[2], fact(-3.0), 0, decisive=False)
    best.settle(fact(0.2, upheld=True))
    assert torch.equal(best.x, x[2])
    assert best.deeper is None


class BreaksWhereBright(Curved):
    """Not finite once the images are bright; the class changes before that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (x.flatten(1).mean(1) - 0.5)[:, None]
        logits = torch.cat([0.01 - bright, bright - 0.01], 1)
        return torch.where(bright > 0.05, torch.nan, logits)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_success_stands_where_the_attack_then_comes_to_outputs_that_are_not_finite(precision: str) -> None:
    x = torch.full((2, CHANNELS, SIDE, SIDE), 0.5)
    found = perturb(
        BreaksWhereBright(),
        x,
        [0, 0],
        eps=0.1,
        attack="pgd:steps=20:restarts=2,apgd-ce:steps=20",
        precision=precision,
        stop_at_success=False,
        lanes=2,
    )
    assert found.fooled.all()
    assert not found.failed.any()
    assert (found.margins < 0).all()
