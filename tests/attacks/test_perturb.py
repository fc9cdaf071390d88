"""perturb: closed forms, second implementations, the ball, order and batch, and the model left as it was."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import CHANNELS, PIXELS, SIDE, Curved, Linear, images

from robustvlm.attacks import FOOLED, Intrude, Job, LaneEngine, Misclassify, Oracle, ThreatModel, parse_attacks
from robustvlm.attacks.perturb import CLEAN, AutoAttack, Perturbed, perturb
from robustvlm.errors import UserError


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def least_eps(model: Linear, x: Tensor, label: Tensor, order: float) -> Tensor:
    """The exact distance of every image from another class, where no pixel meets the edge of [0, 1]."""
    weight, logits = model.layer.weight.detach().double(), model(x).detach().double()
    gaps = logits.gather(1, label[:, None]) - logits
    normals = weight[label][:, None] - weight[None]
    sizes = torch.linalg.vector_norm(normals, ord=order, dim=2)
    return (gaps / sizes.clamp_min(1e-30)).scatter(1, label[:, None], float("inf")).amin(1)


@pytest.mark.parametrize(("norm", "order", "scale"), [("Linf", 1, 1.0), ("L2", 2, 6.0)])
def test_an_image_of_a_linear_model_is_fooled_exactly_when_the_ball_reaches_another_class(
    norm: str, order: float, scale: float
) -> None:
    model, x = Linear(), 0.3 + 0.4 * images(32)
    label = labels_of(model, x)
    needed = least_eps(model, x, label, order)
    eps = float(needed.median()) + 1e-9
    assert float(needed.quantile(0.9)) < 0.3 * scale  # no pixel meets the edge of [0, 1] before
    found = perturb(model, x, label, eps=eps, norm=norm, attack="apgd-ce,apgd-t", steps=40, lanes=32)
    clear = (needed / eps - 1).abs() > 0.02
    assert clear.sum() > 24
    assert torch.equal(found.fooled[clear], (needed < eps)[clear])
    with torch.no_grad():
        assert torch.equal(model(found.images).argmax(1) != label, found.fooled)


def test_the_margin_is_that_of_the_worst_point_of_the_ball() -> None:
    model, x = Linear(classes=2), 0.3 + 0.4 * images(8)
    label, eps = labels_of(model, x), 0.002
    weight = model.layer.weight.detach().double()
    logits = model(x).detach().double()
    clean = logits.gather(1, label[:, None]).squeeze(1) - logits.gather(1, 1 - label[:, None]).squeeze(1)
    worst = clean - eps * (weight[0] - weight[1]).abs().sum()
    found = perturb(model, x, label, eps=eps, attack="apgd-ce", steps=20, lanes=8, stop_at_success=False)
    assert torch.allclose(found.margins, worst, atol=1e-4)


@pytest.mark.parametrize(("eps", "count"), [pytest.param(0.01, 32, marks=pytest.mark.slow), (0.01, 9), (0.06, 32)])
def test_no_more_accuracy_is_left_than_by_the_packages(eps: float, count: int) -> None:
    import pyautoattack
    import torchattacks

    model, x = Curved(classes=10).eval(), images(count)
    label = labels_of(model, x)
    label[:4] = (label[:4] + 1) % 10
    found = AutoAttack(eps=eps, lanes=32)(model, x, label)
    held = len(x) - int(found.fooled.sum())
    assert (held > 0) == (eps < 0.06)  # at the smaller radius every attack has its turn
    assert held < len(x) - 4
    assert found.by[:4] == (CLEAN,) * 4
    with torch.no_grad():
        apgd = torchattacks.APGD(model, eps=eps, steps=50)(x, label)
        assert held <= int((model(apgd).argmax(1) == label).sum())
        theirs = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard", device="cpu")
    points, _ = theirs.run_standard_evaluation(x, label, batch_size=32)
    with torch.no_grad():
        assert held <= int((model(points).argmax(1) == label).sum())
    assert found.robust_accuracy.successes == held


@settings(max_examples=25, deadline=None)
@given(
    eps=st.floats(1e-4, 1.0),
    norm=st.sampled_from(["Linf", "L2"]),
    attack=st.sampled_from(["pgd", "apgd-ce", "fab", "square:queries=8", "fgsm"]),
    seed=st.integers(0, 2**31),
    edge=st.floats(0.0, 1.0),
)
def test_every_image_lies_in_the_ball_and_in_the_pixel_range(
    eps: float, norm: str, attack: str, seed: int, edge: float
) -> None:
    x = images(5, seed)
    x = torch.where(x < edge / 2, torch.zeros_like(x), torch.where(x > 1 - edge / 2, torch.ones_like(x), x))
    found = perturb(Curved(), x, [0, 1, 2, 3, 4], eps=eps, norm=norm, attack=attack, steps=3, lanes=4, seed=seed)
    delta = (found.images.double() - x.double()).flatten(1)
    size = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    assert bool((size <= eps).all())
    assert float(found.images.min()) >= 0
    assert float(found.images.max()) <= 1
    assert torch.equal(found.fooled, torch.tensor([by is not None for by in found.by]))
    assert torch.equal(found.fooled, found.margins < 0)


def same(one: Perturbed, other: Perturbed, rows: Tensor) -> bool:
    tensors = ("images", "fooled", "margins", "predictions", "passes")
    return all(torch.equal(getattr(one, name)[rows], getattr(other, name)) for name in tensors) and [
        one.by[row] for row in rows.tolist()
    ] == list(other.by)


def test_an_answer_depends_on_its_image_and_the_seed_alone() -> None:
    model, x = Curved(), images(12)
    label = labels_of(model, x)
    options = {"eps": 0.02, "attack": "square:queries=20,pgd", "steps": 5, "restarts": 2, "lanes": 4}
    every = perturb(model, x, label, **options)
    assert same(every, perturb(model, x, label, **options), torch.arange(12))
    assert not torch.equal(every.images, perturb(model, x, label, seed=1, **options).images)
    torch.manual_seed(7)
    for rows in (torch.randperm(12), torch.tensor([3]), torch.tensor([11, 0, 5])):
        assert same(every, perturb(model, x[rows], label[rows], **options), rows)


def test_the_answers_are_those_of_the_engine_under_the_same_ids() -> None:
    model, x = Curved(), images(8)
    with torch.no_grad():
        logits = model(x)
    label = logits.argmax(1)
    names = [f"image-{i}" for i in range(8)]
    jobs = [
        Job(names[i], i, x[i], int(label[i]), tuple(Misclassify().targets(logits[i], int(label[i]), 9)))
        for i in range(8)
    ]
    (attack,) = parse_attacks("apgd-t", steps=6)
    engine = LaneEngine(Oracle(model), attack, ThreatModel("Linf", 0.04), lanes=8, seed=3)
    results = sorted(engine.run(jobs), key=lambda result: result.job.index)
    found = perturb(model, x, label, eps=0.04, attack="apgd-t", steps=6, lanes=8, seed=3, ids=names)
    assert found.fooled.tolist() == [result.outcome == FOOLED for result in results]
    assert torch.equal(found.images, torch.stack([result.adversarial for result in results]))


class Fickle(nn.Module):
    """Modes, buffers and gradients that an attack could disturb."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(CHANNELS), nn.Dropout().eval()
        self.head = nn.Linear(PIXELS, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x.to(self.head.weight.dtype))).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_model_is_left_as_it_was(dtype: torch.dtype) -> None:
    model = Fickle(dtype).train()
    model.drop.eval()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, state = copy.deepcopy(model), torch.random.get_rng_state()
    before.head.weight.grad = torch.ones_like(model.head.weight)
    x = images(4)
    found = perturb(model, x, [0, 1, 2, 0], eps=0.05, attack="pgd", steps=3, lanes=4)
    assert found.images.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for (name, part), was in zip(model.named_modules(), before.modules(), strict=True):
        assert part.training == was.training, name
        assert vars(part).keys() == vars(was).keys()
    for one, was in zip(model.parameters(), before.parameters(), strict=True):
        assert one.dtype == was.dtype == dtype
        assert one.requires_grad == was.requires_grad
        assert (one.grad is None) == (was.grad is None)
        assert one.grad is None or torch.equal(one.grad, was.grad)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_part_without_gradient_is_opened_and_closed_again() -> None:
    class Rounded(nn.Module):
        differentiable = False

        def forward(self, x: Tensor) -> Tensor:
            return (x * 31).round() / 31

    model = nn.Sequential(Rounded(), Curved())
    x = images(8)
    found = perturb(model, x, labels_of(model, x), eps=0.1, attack="apgd-ce", steps=10, lanes=8)
    assert "forward" not in vars(model[0])
    assert int(found.fooled.sum()) > 4
    assert "straight through" in found.remarks[0]


def test_models_are_modules_functions_and_those_with_logits() -> None:
    inner, x = Curved(), images(6)
    label, options = labels_of(inner, x), {"eps": 0.05, "attack": "apgd-ce", "steps": 5, "lanes": 6}
    wanted = perturb(inner, x, label, **options)

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, pixels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.inner(pixels), loss=None)

    for model in (lambda pixels: inner(pixels), Output()):
        assert same(wanted, perturb(model, x, label, **options), torch.arange(6))


class Coin(nn.Module):
    """Right in 1 - p of its draws, whatever the image: a majority of many draws is right at every point."""

    random_draws = 1

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.last = p, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        wrong = (torch.rand(len(x)) < self.p).to(x)
        logits = torch.tensor([1.0, 0.0, 0.0]) + 2 * wrong[:, None] * torch.tensor([0.0, 1.0, 0.0])
        return logits + 1e-3 * self.last(x.flatten(1))


def test_one_lucky_majority_of_a_random_model_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = torch.rand(48, 3, 2, 2), torch.zeros(48, dtype=torch.int64)
    asked: dict[str, Any] = {
        "eps": 4 / 255,
        "attack": "pgd:steps=40",
        "draws": 21,
        "eot": 1,
        "brisk": True,
        "lanes": 48,
    }
    assert int(perturb(Coin(0.3), pixels, labels, **asked).fooled.sum()) == 0
    found = perturb(Coin(0.7), pixels, labels, **asked)  # wrong as it is, and that stands
    assert bool(found.fooled.all())
    monkeypatch.setattr("robustvlm.attacks.probe.UPHOLDING_DRAWS", 0)
    assert int(perturb(Coin(0.3), pixels, labels, **asked).fooled.sum()) >= 5


class Noisy(nn.Module):
    """Wrong in 2 % of its draws at the grey image, more often the brighter it is: in 60 % at the ball's edge."""

    random_draws = 1

    def forward(self, x: Tensor) -> Tensor:
        margin = 2.0 - 2.25 * (x.flatten(1) - 0.5).mean(1) / (8 / 255) + torch.randn(len(x)).to(x)
        return torch.stack([margin / 2, -margin / 2], 1)


@pytest.mark.parametrize("eot", [1, 10])
def test_an_attack_goes_on_from_a_success_that_does_not_hold(eot: int) -> None:
    """On its way to the edge it meets points whose first majority is luck, and must not stop there."""
    pixels, labels = torch.full((12, 3, 4, 4), 0.5), torch.zeros(12, dtype=torch.int64)
    found = perturb(Noisy(), pixels, labels, eps=8 / 255, attack="pgd:steps=60", eot=eot, brisk=True, lanes=12)
    assert int(found.fooled.sum()) >= 11


def test_a_random_model_is_judged_by_fresh_draws() -> None:
    class Noisy(Curved):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.05 * torch.randn_like(x))

    x = images(6)
    label = labels_of(Curved(), x)
    found = perturb(Noisy(), x, label, eps=0.1, attack="pgd", steps=5, lanes=6, eot=3, draws=9)
    assert "over 3 draws, and 9 fresh draws" in found.remarks[0]
    share = torch.stack([Noisy()(found.images).argmax(1) != label for _ in range(200)]).float().mean(0)
    assert bool((share[found.fooled] > 0.3).all())
    assert found.fooled.any()


def test_goals_by_word() -> None:
    model, x = Curved(), images(10)
    label = labels_of(model, x)
    other = label[label != 2]
    aimed = perturb(model, x[label != 2], other, eps=0.2, goal="targeted:2", attack="apgd-t", steps=20, lanes=8)
    assert aimed.fooled.any()
    assert torch.equal(model(aimed.images).argmax(1) == 2, aimed.fooled)
    turned = perturb(model, x, eps=0.3, goal="feature", attack="pgd", steps=10, lanes=8)
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(model(x), model(turned.images))
    assert torch.allclose(turned.margins, cosine.double() - 0.5, atol=1e-5)

    class Refusing(Curved):
        can_reject = True

    refusing = Refusing(classes=5)
    accepted = refusing(x)[:, -1] > 0
    denied = perturb(refusing, x, eps=0.2, goal="deny", attack="pgd", steps=10, lanes=8)
    assert torch.equal(refusing(denied.images)[:, -1] <= 0, denied.fooled)
    assert [by == CLEAN for by in denied.by] == (~accepted).tolist()
    let_in = perturb(refusing, x, eps=0.2, goal=Intrude(), attack="pgd", steps=10, lanes=8)
    assert torch.equal(refusing(let_in.images)[:, -1] > 0, let_in.fooled)


def test_outputs_that_break_in_the_ball_are_neither_robust_nor_fooled() -> None:
    class Breaking(Curved):
        def forward(self, x: Tensor) -> Tensor:
            far = (x[:, None] - images(4)[None]).abs().flatten(2).amax(2).amin(1) > 0.009
            return torch.where(far[:, None], torch.nan, super().forward(x))

    found = perturb(Breaking(), images(4), labels_of(Curved(), images(4)), eps=0.01, attack="pgd", steps=3, lanes=4)
    assert found.failed.any()
    assert not (found.fooled & found.failed).any()
    assert found.robust_accuracy.successes <= int((~found.failed).sum())
    assert "NaN or infinite" in found.remarks[-1]


X = images(3)
MISTAKES = [
    ({"images": X * 255}, r"pixels from .* divide 8-bit images by 255"),
    ({"images": (X * 255).byte()}, "torch.uint8: divide 8-bit images by 255"),
    ({"images": X[0]}, r"pass images\[None\]"),
    ({"images": X[:0], "labels": []}, "pass at least one image"),
    ({"images": torch.full_like(X, float("nan"))}, "image 0 holds NaN"),
    ({"images": X.tolist()}, "must be a tensor"),
    ({"labels": [0, 1, 5]}, "from 0 to 4, the model's 5 classes, got 5 for image 2"),
    ({"labels": [0, -1, 1]}, "got -1 for image 1"),
    ({"labels": [0, 1]}, r"shape \[3\]"),
    ({"labels": torch.eye(3).long()}, "argmax"),
    ({"labels": torch.rand(3)}, "whole numbers"),
    ({"labels": None}, "needs labels"),
    ({"eps": 8}, "8 is larger than the pixel range"),
    ({"eps": "1/255,2/255"}, "one radius, got 2"),
    ({"eps": 0}, "positive"),
    ({"eps": None}, "number or a text"),
    ({"norm": "L1"}, "expected Linf or L2"),
    ({"attack": "pdg"}, "did you mean 'pgd'"),
    ({"goal": "mislead"}, "unknown goal 'mislead'"),
    ({"goal": "targeted:9"}, "the model has 5 classes"),
    ({"goal": "deny"}, "may refuse"),
    ({"steps": 0}, "^steps must be a whole number"),
    ({"lanes": 2.5}, "^lanes must be"),
    ({"seed": -1}, "^seed must be"),
    ({"device": "tpu"}, "tpu"),
    ({"ids": ["a"]}, "3 names"),
    ({"attack": "torchattacks:PGD", "norm": "L2", "eps": 0.5}, "take norm=?"),
    ({"model": "tiny"}, r"load_classifier\('tiny', classes\)"),
    ({"model": lambda x: (x.flatten(1), None)}, "got a tuple"),
    ({"model": lambda x: x.flatten(1) * float("nan")}, "NaN or infinite"),
    ({"model": lambda x: x.flatten(1)[:, :1]}, "at least 2 classes"),
    ({"model": nn.Linear(2, 2)}, r"failed on images \[2, 3, 6, 6\]"),
    ({"model": lambda x: x.flatten(1).detach()}, "no gradient"),
    ({"model": lambda x: (x - x.mean(0)).flatten(1)}, "other images of the batch: pass lanes=1"),
]


@pytest.mark.parametrize(("change", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_argument(change: dict[str, object], said: str) -> None:
    options: dict = {"model": Curved(), "images": X, "labels": [0, 1, 2], "eps": 0.05, "attack": "pgd", "lanes": 4}
    with pytest.raises(UserError, match=said) as caught:
        perturb(**(options | change))
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)


def test_side_is_what_the_table_of_mistakes_says() -> None:
    assert (CHANNELS, SIDE) == (3, 6)
