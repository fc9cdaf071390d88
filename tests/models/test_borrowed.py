"""A caller's model is given back as it was, by whatever works on it, also after an error."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustvlm.attacks import ExternalEngine, Job, LaneEngine, Oracle, ThreatModel, parse_attacks
from robustvlm.attacks.external import parse_external
from robustvlm.commands.certify.encoder import NoisyEncoder
from robustvlm.commands.evaluate.work import evaluate_clean
from robustvlm.core.boundary import borrowed, own_copy
from robustvlm.data import open_data
from robustvlm.defenses import load_classifier, smooth
from robustvlm.defenses.finetune import FinetuneSettings, finetune_task
from robustvlm.errors import UserError
from robustvlm.models import load_model, zero_shot
from robustvlm.models.custom import wrap_encoder
from robustvlm.models.vlm import VLM


class Net(nn.Module):
    """Half of it in training, a frozen weight, statistics that training mode would change, and perhaps a fault."""

    image_size, logit_scale = 4, 10.0

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(64, outputs)
        self.train()
        self.drop.eval()
        self.head.bias.requires_grad_(False)
        self.head.weight.grad = torch.ones_like(self.head.weight)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("no such luck")
        return self.head(self.drop(self.norm(self.conv(x))).flatten(1))

    def encode_image(self, x: Tensor) -> Tensor:
        return self(x)

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.eye(len(texts), 3) if len(texts) < 4 else torch.ones(len(texts), 3)


class Encoder(VLM):
    """The same as a model of ours."""

    def __init__(self) -> None:
        super().__init__(spec="net", image_size=4, logit_scale=10.0)
        self.net = Net()

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.net.encode_text(texts)


def snapshot(module: nn.Module) -> list[Any]:
    """Return all that a caller may find changed, as comparable values."""
    parts = [(name, part.training, len(part._forward_hooks)) for name, part in module.named_modules()]
    weights = [
        (
            name,
            p.requires_grad,
            p.data_ptr(),
            p.stride(),
            p.dtype,
            p.tolist(),
            None if p.grad is None else p.grad.tolist(),
        )
        for name, p in module.named_parameters()
    ]
    buffers = [(name, b.dtype, b.tolist()) for name, b in module.named_buffers()]
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    flags = [torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()]
    cudnn = [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark]
    return [parts, weights, buffers, states, flags, cudnn, torch.are_deterministic_algorithms_enabled()]


def jobs() -> list[Job]:
    return [Job(str(i), i, torch.full((3, 4, 4), 0.4), label=i % 3, targets=(1, 2)) for i in range(2)]


def ours(spec: str) -> Callable[[Any], object]:
    def run(model: Any) -> object:
        (attack,) = parse_attacks(spec)
        return list(LaneEngine(Oracle(model), attack, ThreatModel("Linf", 0.1), lanes=2, seed=0).run(jobs()))

    return run


def published(model: Any) -> object:
    attack = parse_external("torchattacks:PGD:steps=2")
    return list(ExternalEngine(Oracle(model), attack, ThreatModel("Linf", 0.1), lanes=2, seed=0).run(jobs()))


def in_double(model: Any) -> object:
    return Oracle(model, precision="fp64").confirm(torch.rand(2, 3, 4, 4, generator=torch.Generator()))


def as_encoder(model: Any) -> object:
    return zero_shot(model, ["a", "b", "c"], ["{}"], cache=False)


def certified(model: Any) -> object:
    return [NoisyEncoder(model, precision=precision)(torch.zeros(2, 3, 4, 4)) for precision in ("fp32", "fp64")]


def smoothed(model: Any) -> object:
    with torch.random.fork_rng():
        return smooth(model, 0.1, 4).encode_image(torch.zeros(2, 3, 4, 4))


def tuned(model: Any) -> object:
    task = finetune_task(
        model,
        FinetuneSettings(method="tecoa"),
        class_names=["a", "b"],
        templates=["{}"],
        calibration=torch.zeros(2, 3, 4, 4),
    )
    assert task.vlm is not model
    return task


MODULES = [ours("pgd:steps=2"), ours("square:queries=2"), ours("fab:steps=2"), published, in_double]
ENCODERS = [as_encoder, certified, smoothed, tuned]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("use", [*MODULES, *ENCODERS])
def test_a_model_is_left_as_it_was(use: Callable[[Any], object], fails: bool) -> None:
    model: Any = Net() if use in MODULES else Encoder()
    net = model if use in MODULES else model.net
    net.fails = fails
    before = snapshot(model)
    if fails and use is not as_encoder:  # which asks for texts only
        with pytest.raises((RuntimeError, UserError)):
            use(model)
    else:
        use(model)
    assert snapshot(model) == before


def test_hooks_of_a_smoothed_model_are_used_as_they_should_and_left_in_training() -> None:
    dropout = nn.Dropout(0.9)
    with torch.random.fork_rng():
        features = smooth(load_model("tiny"), 0.01, 2, purifier=dropout).encode_image(torch.ones(1, 3, 64, 64) / 2)
    assert dropout.training
    assert (
        torch.nn.functional.cosine_similarity(features, load_model("tiny").encode_image(torch.ones(1, 3, 64, 64) / 2))
        > 0.9
    )


def test_an_evaluated_classifier_may_be_in_training() -> None:
    source = open_data("emoji")
    classifier = zero_shot(load_model("tiny"), source.class_names, source.templates, cache=False).train()
    evaluate_clean(classifier, source, limit=2)
    assert classifier.training
    assert classifier.vlm.training


def test_an_object_that_a_factory_keeps_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("encoder", "classifier"):
        module: Any = type(sys)(f"kept_{name}")
        module.kept = Net(3)
        if name == "classifier":
            module.kept = nn.Sequential(Net(3))
            module.kept.image_size = 4
        module.make = lambda module=module: module.kept
        monkeypatch.setitem(sys.modules, f"kept_{name}", module)
        before = snapshot(module.kept)
        made = load_classifier(f"kept_{name}:make", ["a", "b", "c"], ["{}"], cache=False)
        made(torch.zeros(2, 3, 4, 4))
        assert snapshot(module.kept) == before
        assert not any(part.training for part in made.modules())


class _Patched(nn.Module):
    """Runs dropout through what a deep copy shares with its original: `hold` makes it of the network."""

    image_size, logit_scale = 4, 10.0

    def __init__(self, hold: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3))
        self.held = hold(self.net)

    def encode_image(self, x: Tensor) -> Tensor:
        return self.net(x) if self.held is None else self.held(x)  # type: ignore[no-any-return, operator]

    forward = encode_image

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.eye(3)[: len(texts)] + 0.1


def _patch_layer(net: nn.Module) -> None:
    """Replace a layer's forward by a function around it, as adapters of low rank do."""
    layer = net[1]  # type: ignore[index]
    inner = type(layer).forward
    layer.forward = lambda x: inner(layer, x)


@pytest.mark.parametrize(
    "hold",
    [lambda net: lambda x: net(x), lambda net: [lambda x: net(x)][0], _patch_layer],
    ids=["closure", "list", "layer"],
)
def test_a_copy_that_would_run_the_original_is_none(hold: Callable[[nn.Module], object]) -> None:
    pixels = torch.rand(4, 3, 4, 4)
    for made in (wrap_encoder(_Patched(hold), "my:encoder", torch.device("cpu")), own_copy(_Patched(hold)).eval()):
        answer = made.encode_image
        with torch.no_grad():
            assert torch.equal(answer(pixels), answer(pixels))  # no dropout: all that is run is in evaluation mode


def test_a_module_that_shares_what_is_no_part_of_it_is_copied() -> None:
    beside = nn.Linear(2, 2)
    plain = _Patched(lambda _: lambda x: beside(x))
    assert own_copy(plain) is not plain


def test_borrowing_ends_with_an_error_too() -> None:
    net = Net()
    before = snapshot(net)

    def work() -> None:
        with borrowed(net):
            assert not any(part.training for part in net.modules())
            assert not any(p.requires_grad for p in net.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert snapshot(net) == before
