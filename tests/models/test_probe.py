"""A model is known by what it answers, wherever its weights are."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustvlm.core.probe import change_of
from robustvlm.defenses import smooth
from robustvlm.models import VLM, load_model
from robustvlm.models.custom import CustomVLM, Hidden
from robustvlm.models.probe import probe_encoder


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6), nn.Tanh())


class Plain:
    """An encoder that is no network itself; `hide` puts one somewhere."""

    image_size, logit_scale = 8, 20.0

    def __init__(self, seed: int, hide: Callable[[Plain, nn.Module], Callable[[Tensor], Tensor]]) -> None:
        self._ask = [hide(self, net(seed))]

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self._ask[0](pixels)

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.eye(6)[[len(text) % 6 for text in texts]]


def in_dict(one: Plain, network: nn.Module) -> Callable[[Tensor], Tensor]:
    one.parts = {"net": [network]}  # type: ignore[attr-defined]
    return network


def in_closure(_: Plain, network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda pixels: network(pixels)


def in_arrays(_: Plain, network: nn.Module) -> Callable[[Tensor], Tensor]:
    weight = np.asarray(network[1].weight.detach())  # type: ignore[index]
    return lambda pixels: pixels.flatten(1) @ torch.from_numpy(weight).T


def in_default(_: Plain, network: nn.Module) -> Callable[[Tensor], Tensor]:
    def ask(pixels: Tensor, by: nn.Module = network) -> Tensor:
        return by(pixels)

    return ask


class Slotted:
    __slots__ = ("inner",)


def in_slots(_: Plain, network: nn.Module) -> Callable[[Tensor], Tensor]:
    box = Slotted()
    box.inner = network
    return lambda pixels: box.inner(pixels)


def custom(seed: int, hide: Any) -> VLM:
    return CustomVLM(Plain(seed, hide), spec="mine:make")


@pytest.mark.parametrize("hide", [in_dict, in_closure, in_arrays, in_default, in_slots])
def test_other_weights_are_seen_wherever_they_hide(hide: Any) -> None:
    one, same, other = custom(0, hide), custom(0, hide), custom(1, hide)
    assert change_of(probe_encoder(one), probe_encoder(same)) is None
    assert "its image features of fixed inputs differ by" in str(change_of(probe_encoder(one), probe_encoder(other)))
    if hide is not in_slots:
        assert one.fingerprint == same.fingerprint != other.fingerprint


def test_what_stands_in_the_open_is_not_counted_twice() -> None:
    open_net = net(0)
    assert Hidden(open_net).state() == {}
    plain = Plain(0, in_closure)
    plain._ask = []
    plain.net = open_net  # type: ignore[attr-defined]
    assert Hidden(plain).state() == {}


def test_a_slightly_different_checkpoint_is_another_model_and_a_layout_is_not() -> None:
    tiny, other = load_model("tiny"), load_model("tiny")
    before = probe_encoder(tiny)
    assert change_of(before, probe_encoder(other.to(memory_format=torch.channels_last))) is None
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 + 1e-3 * torch.randn(weight.shape, generator=draws))
    assert "image features" in str(change_of(before, probe_encoder(other)))


def test_a_model_that_computes_in_half_precision_is_given_its_rounding() -> None:
    class Half(Plain):
        def encode_image(self, pixels: Tensor) -> Tensor:
            return super().encode_image(pixels.bfloat16().float() * 0.999).bfloat16().float()

    probe = probe_encoder(CustomVLM(Half(0, in_dict), spec="mine:half"))
    assert probe["parts"]["image features"]["tolerance"] > 1e-3
    assert "spread" not in probe["parts"]["image features"]


def test_smoothed_models_are_asked_without_noise_and_random_ones_within_their_spread() -> None:
    tiny = load_model("tiny")
    one, again = probe_encoder(smooth(tiny, 0.25, 4)), probe_encoder(smooth(tiny, 0.25, 4))
    assert one == again
    assert "spread" not in one["parts"]["image features"]
    assert change_of(one, probe_encoder(smooth(tiny, 0.5, 4))) is not None

    class Noisy(Plain):
        def encode_image(self, pixels: Tensor) -> Tensor:
            features = super().encode_image(pixels)
            return features + 0.05 * torch.randn_like(features)

    noisy = [CustomVLM(Noisy(seed, in_dict), spec="mine:noisy") for seed in (0, 0, 1)]
    assert "spread" in probe_encoder(noisy[0])["parts"]["image features"]
    assert change_of(probe_encoder(noisy[0]), probe_encoder(noisy[1])) is None
    assert change_of(probe_encoder(noisy[0]), probe_encoder(noisy[2])) is not None


def test_asking_leaves_random_states_and_the_model_as_they_were() -> None:
    model = smooth(load_model("tiny"), 0.25, 4).train()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    probe_encoder(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert model.training
    assert torch.is_grad_enabled()


def test_draws_of_python_itself_are_the_same_every_time() -> None:
    class Rare(Plain):
        def encode_image(self, pixels: Tensor) -> Tensor:
            return super().encode_image(pixels if random.random() < 0.5 else pixels.flip(-1))

    model = CustomVLM(Rare(0, in_dict), spec="mine:rare")
    random.seed(0)
    first = probe_encoder(model)
    assert all(probe_encoder(model) == first for _ in range(4))


def test_a_model_in_training_is_asked_as_it_will_be_used() -> None:
    class Dropped(Plain, nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            Plain.__init__(self, 0, in_dict)
            self.norm = nn.BatchNorm2d(3)

        def encode_image(self, pixels: Tensor) -> Tensor:
            return super().encode_image(self.norm(pixels))

    model = CustomVLM(Dropped(), spec="mine:dropped").train()
    probe_encoder(model)
    assert (model.encoder.norm.training, int(model.encoder.norm.num_batches_tracked)) == (True, 0)


def test_a_model_that_fails_is_left_to_the_run() -> None:
    class Broken(Plain):
        def encode_image(self, pixels: Tensor) -> Tensor:
            raise ValueError(f"no features of {len(pixels)} images")

    assert sorted(probe_encoder(CustomVLM(Broken(0, in_dict), spec="mine:broken"))["parts"]) == ["text features"]
