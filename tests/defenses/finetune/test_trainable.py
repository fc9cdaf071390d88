"""Subsets of a vision tower: what is trained, that nothing changes at the start, and merging."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_tower import SmallVLM, images, make_task, small_forest, small_vlm
from torch import Tensor, nn

from robustvlm.defenses.finetune.trainable import (
    make_trainable,
    merge,
    parse_trainable,
    plain_state,
    vision_blocks,
    vision_module,
    vision_parameters,
)
from robustvlm.errors import UserError
from robustvlm.models import VLM, load_model
from robustvlm.training import Draws


def trained(vlm: VLM) -> set[str]:
    return {name for name, p in vlm.named_parameters() if p.requires_grad}


def step(vlm: VLM) -> None:
    """Move every trained parameter."""
    vlm.embed_image(images()[0]).square().sum().backward()
    with torch.no_grad():
        for p in vlm.parameters():
            if p.requires_grad:
                assert p.grad is not None
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
                p.grad = None


def test_vision_tower_is_what_images_pass_through() -> None:
    vlm = small_vlm()
    make_trainable(vlm, "all")
    towers = ("stem", "blocks", "proj")
    assert trained(vlm) == {name for name, _ in vlm.named_parameters() if name.startswith(towers)}


def test_bundled_model_has_its_usual_tower() -> None:
    vlm = load_model("tiny")
    assert all(name.startswith("model.visual.") for name in vision_parameters(vlm))
    assert len(vision_blocks(vlm)) == 8  # four stages of two bottlenecks
    assert vision_module(vlm) is vlm.model.visual  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [1, 3])
def test_last_blocks_and_what_follows_them(count: int) -> None:
    vlm = small_vlm()
    make_trainable(vlm, f"last:{count}")
    prefixes = ("proj", *(f"blocks.{2 - i}." for i in range(count)))
    assert trained(vlm) == {name for name, _ in vlm.named_parameters() if name.startswith(prefixes)}
    assert not vlm.blocks[-count]._forward_pre_hooks


@pytest.mark.parametrize("subset", ["lora:2", "lora:100", "ssf"])
def test_added_parameters_change_nothing_at_first_and_merge_exactly(subset: str) -> None:
    plain, vlm, x = small_vlm(), small_vlm(), images()[0]
    make_trainable(vlm, subset)
    assert torch.equal(vlm.embed_image(x), plain.embed_image(x))
    assert plain_state(vlm).keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in plain_state(vlm).items())
    step(vlm)
    moved = vlm.embed_image(x)
    assert (moved - plain.embed_image(x)).abs().max() > 0.01

    plain.load_state_dict(plain_state(vlm))
    torch.testing.assert_close(plain.embed_image(x), moved, rtol=1e-6, atol=1e-6)
    again = copy.deepcopy(vlm)
    merge(vlm)
    assert vlm.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(vlm.embed_image(x), moved, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again.embed_image(x), moved)  # a copy keeps its own updates


def test_lora_has_the_rank_asked_for_and_ssf_is_a_scale_and_a_shift() -> None:
    vlm, before = small_vlm(), small_vlm().state_dict()
    make_trainable(vlm, "lora:2")
    step(vlm)
    change = plain_state(vlm)["blocks.1.inner.weight"] - before["blocks.1.inner.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    assert torch.equal(plain_state(vlm)["blocks.1.norm.weight"], before["blocks.1.norm.weight"])

    scaled = small_vlm()
    make_trainable(scaled, "ssf")
    step(scaled)
    state = plain_state(scaled)
    ratio = state["stem.weight"] / before["stem.weight"]
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)
    assert not torch.equal(state["stem_norm.bias"], before["stem_norm.bias"])


def test_updates_follow_from_the_seed() -> None:
    first, second, third = small_vlm(), small_vlm(), small_vlm()
    for vlm, seed in ((first, 1), (second, 1), (third, 2)):
        make_trainable(vlm, "lora", seed=seed)
    name = next(name for name in trained(first) if name.endswith("down"))
    values = [dict(vlm.named_parameters())[name] for vlm in (first, second, third)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


class Attending(SmallVLM):
    """A tower with torch's attention, whose weights are used without the modules that hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def _image_features(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0].mean(1) @ self.proj


@pytest.mark.parametrize("subset", ["lora:2", "ssf"])
def test_attention_takes_part(subset: str) -> None:
    torch.manual_seed(0)
    vlm = Attending().eval()
    nn.init.normal_(vlm.proj)
    plain = copy.deepcopy(vlm)
    make_trainable(vlm, subset)
    assert any("in_proj_weight" in name for name in trained(vlm))
    step(vlm)
    with torch.no_grad():  # the fused kernel of evaluation reads the weights directly
        moved = vlm.embed_image(images()[0])
    plain.load_state_dict(plain_state(vlm))
    torch.testing.assert_close(plain.embed_image(images()[0]), moved, rtol=1e-5, atol=1e-5)
    assert not torch.equal(plain_state(vlm)["attention.in_proj_weight"], Attending().attention.in_proj_weight)


@pytest.mark.parametrize("subset", ["lora:2", "ssf", "last:1"])
@pytest.mark.parametrize("method", ["tecoa", "hierarchical"])
def test_every_trained_parameter_gets_a_gradient_and_no_other_one(subset: str, method: str) -> None:
    vlm = small_vlm()
    task = make_task(vlm, method, small_forest(), trainable=subset)
    pixels, labels = images()
    task.losses(pixels, labels, 0, Draws(0, 0, list("abcdef")))["loss"].backward()
    assert {name for name, p in vlm.named_parameters() if p.grad is not None} == trained(vlm)
    assert ("text_projection" in trained(vlm)) == (method == "hierarchical" and subset.startswith("last"))


class Frozen(SmallVLM):
    def _image_features(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return super()._image_features(pixels)


def test_models_that_cannot_be_trained_say_so() -> None:
    with pytest.raises(UserError, match="no parameters that its image features depend on"):
        make_trainable(Frozen(), "all")
    with pytest.raises(UserError, match="has 3 blocks, got last:4"):
        make_trainable(small_vlm(), "last:4")


@pytest.mark.parametrize("text", ["", "half", "lora:0", "last", "last:0", "lora:-1", "lora:2:3", "all:1"])
def test_unknown_subsets_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_trainable(text)
