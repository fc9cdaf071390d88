"""Whatever a training script wrapped weights in, the same weights come out, or one line says why not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.checkpoints import Found, find_weights, fit_weights
from robustvlm.models.weights import read_archive, read_checkpoint

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1},
}


def clip(seed: int = 0, kind: type[nn.Module] = open_clip.CLIP) -> nn.Module:
    torch.manual_seed(seed)
    return kind(**CONFIG).eval()


MODEL, CUSTOM = clip(), clip(kind=open_clip.CustomTextCLIP)
STATE, CUSTOM_STATE = MODEL.state_dict(), CUSTOM.state_dict()
VISION = {name.removeprefix("visual."): tensor for name, tensor in STATE.items() if name.startswith("visual.")}
TEXT = {name: tensor for name, tensor in STATE.items() if not name.startswith(("visual.", "logit_scale"))}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def refused(content: Mapping[str, Any], model: nn.Module = MODEL, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        fit_weights(model, content, what="'x.pt'", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# Every nesting

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")
NAMES = (*WRAPPERS, "model", "net", "clip_model", "encoder", "student.clip", "visual", "text", "transformer")
KEYS = ("state_dict", "module", "model", "state_dict_ema", "model_ema", "ema", "weights")


@st.composite
def wrapped(draw: st.DrawFn, state: dict[str, Tensor]) -> dict[str, Any]:
    """The weights behind prefixes, with wrappers inside their names, in dicts in dicts with bookkeeping beside them."""
    prefix = draw(st.lists(st.sampled_from(NAMES), max_size=4))
    inside = draw(st.dictionaries(st.sampled_from(["visual", "transformer", "resblocks"]), st.sampled_from(WRAPPERS)))

    def name(key: str) -> str:
        parts = (f"{part}.{inside[part]}" if part in inside else part for part in key.split("."))
        return ".".join([*prefix, *parts])

    content: dict[str, Any] = {name(key): tensor for key, tensor in state.items()}
    if draw(st.booleans()):
        content |= {"n_averaged": torch.tensor(7), "input_resolution": torch.tensor(224), "epoch": 3}
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=2)):
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        content = {"epoch": 1, key: content, "optimizer": optimizer, "prompt": {"pad_up": torch.zeros(1, 3)}}
    return content


@settings(max_examples=150, deadline=None)
@given(wrapped(STATE))
def test_a_whole_model_is_found_in_every_nesting(content: dict[str, Any]) -> None:
    found = find_weights(MODEL, content, what="x.pt")
    assert found.tower is None
    assert same(found.weights, STATE)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([("vision", VISION), ("text", TEXT)]), st.data())
def test_a_tower_is_found_in_every_nesting(tower: tuple[str, dict[str, Tensor]], data: st.DataObject) -> None:
    found = find_weights(MODEL, data.draw(wrapped(tower[1])), what="x.pt")
    assert found.tower == tower[0]
    before = "visual." if tower[0] == "vision" else ""
    assert same(found.weights, {before + name: tensor for name, tensor in tower[1].items()})


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_model_with_a_text_module_takes_both_layouts(data: st.DataObject) -> None:
    found = find_weights(CUSTOM, data.draw(wrapped(CUSTOM_STATE)), what="x.pt")
    assert same(found.weights, CUSTOM_STATE)
    older = {name.removeprefix("text."): tensor for name, tensor in CUSTOM_STATE.items()}
    assert same(find_weights(CUSTOM, {"state_dict": older}, what="x.pt").weights, CUSTOM_STATE)
    text = {name: tensor for name, tensor in older.items() if name in TEXT}
    assert find_weights(CUSTOM, data.draw(wrapped(text)), what="x.pt").tower == "text"


@settings(max_examples=60, deadline=None)
@given(wrapped(STATE), st.sampled_from(sorted(STATE)))
def test_a_weight_less_or_another_shape_is_refused_in_every_nesting(content: dict[str, Any], name: str) -> None:
    def spoilt(part: Any, change: Callable[[dict[str, Any], str], None]) -> Any:
        if not isinstance(part, dict):
            return part
        copy = {key: spoilt(value, change) for key, value in part.items()}
        for key, value in part.items():
            if isinstance(value, Tensor) and value is STATE[name]:
                change(copy, key)
        return copy

    assert f"'{name}' is missing" in refused(spoilt(content, lambda part, key: part.pop(key)))
    larger = torch.zeros(*STATE[name].shape, 2)
    assert f"'{name}' is [" in refused(spoilt(content, lambda part, key: part.update({key: larger})))


# What is not taken without a word


def test_two_tensors_for_one_name_are_refused_and_equal_ones_are_one() -> None:
    name = "visual.proj"
    twice = {**STATE, f"module.{name}": STATE[name] + 1}
    assert f"'{name}' and 'module.{name}' are two different tensors for one weight" in refused(twice)
    assert same(find_weights(MODEL, {**STATE, f"module.{name}": STATE[name].clone()}, what="x").weights, STATE)


def test_several_sets_of_weights_are_told_and_named() -> None:
    averaged = {f"module.{name}": tensor + 1 for name, tensor in STATE.items()}
    content = {"model": STATE, "model_ema": averaged, "epoch": 2}
    assert "several sets of weights that fit, model and model_ema: name one" in refused(content)
    assert same(find_weights(MODEL, content, what="x", part="model").weights, STATE)
    found = find_weights(MODEL, content, what="x", part="model_ema")
    assert torch.equal(found.weights["visual.proj"], STATE["visual.proj"] + 1)
    assert "no weights named 'ema': it has model, model_ema" in refused(content, part="ema")
    assert "no weights named 'ema': all its tensors stand at the top, so leave out #ema" in refused(STATE, part="ema")
    # The same weights twice are no choice.
    assert same(find_weights(MODEL, {"model": STATE, "state_dict": dict(STATE)}, what="x").weights, STATE)


def test_two_modules_of_one_training_script_are_two_sets() -> None:
    pair = {f"model.{n}": t for n, t in STATE.items()} | {f"model_orig.{n}": t + 1 for n, t in STATE.items()}
    assert "state_dict.model and state_dict.model_orig" in refused({"state_dict": pair})
    assert same(find_weights(MODEL, {"state_dict": pair}, what="x", part="state_dict.model").weights, STATE)


def test_weights_beside_the_model_are_refused_until_it_is_named() -> None:
    content = {"state_dict": {**{f"model.{n}": t for n, t in STATE.items()}, "head.weight": torch.ones(3, 24)}}
    assert "beside the model, 'head.weight': if the model is what stands under 'state_dict.model'" in refused(content)
    assert same(find_weights(MODEL, content, what="x", part="state_dict.model").weights, STATE)
    assert "'adapter.weight' is not part of the model" in refused({**STATE, "adapter.weight": torch.ones(2)})


def test_a_broken_weight_is_refused_and_one_that_is_not_used_is_not() -> None:
    bad = {**STATE, "visual.proj": STATE["visual.proj"] * float("nan")}
    assert "'visual.proj' holds NaN" in refused(bad)
    content = {"model": STATE, "optimizer": {"exp_avg": torch.tensor(float("inf"))}}
    assert same(find_weights(MODEL, content, what="x").weights, STATE)


def test_the_bias_of_a_sigmoid_loss_is_kept_beside() -> None:
    found = find_weights(
        MODEL, {"module." + n: t for n, t in STATE.items()} | {"module.logit_bias": torch.tensor([-9.5])}, what="x"
    )
    assert (found.logit_bias, same(found.weights, STATE)) == (-9.5, True)


def test_a_tower_alone_is_said_to_be_one() -> None:
    message = refused({"epoch": 1, "state_dict": {"pad_up": torch.zeros(1)}, "vision_encoder_state_dict": VISION})
    assert "holds a vision tower alone: name the model that it was made from, whose text tower" in message
    assert "holds a text tower alone" in refused(TEXT)
    assert "does not fit the model's vision tower" in refused({n: t[..., :1] for n, t in VISION.items()})


def test_position_embeddings_of_another_size_are_refused_and_not_resampled() -> None:
    other = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": 32}}
    larger = open_clip.CLIP(**other).state_dict()
    told = refused(larger)
    assert "'visual.positional_embedding' is [17, 32], the model needs [5, 32] (images of 32 pixels): name the" in told
    longer = open_clip.CLIP(**CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"context_length": 24}}).state_dict()
    told = refused(longer)
    assert "'positional_embedding' is [24, 16], the model needs [16, 16] (texts of 24 tokens, not 16): name" in told
    finer = open_clip.CLIP(**CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"patch_size": 4}}).state_dict()
    assert "pixels" not in refused(finer)


def test_the_position_embedding_of_a_residual_network_counts_cells_of_32_pixels() -> None:
    config = CONFIG | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}}
    model = open_clip.CLIP(**config)
    larger = open_clip.CLIP(**config | {"vision_cfg": config["vision_cfg"] | {"image_size": 96}}).state_dict()
    with pytest.raises(UserError, match=r"'visual.attnpool.positional_embedding' is \[10, .*\(images of 96 pixels\)"):
        find_weights(model, larger, what="x")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {"a": 1}}, {"a": [torch.ones(1)]}])
def test_nothing_to_fit(content: dict[str, Any]) -> None:
    assert "holds no named tensors" in refused(content)


# What files are made of


def test_numpy_numbers_and_options_beside_the_weights_run_nothing(tmp_path: Path) -> None:
    import argparse

    content = {
        "state_dict": STATE,
        "best_acc1": np.float64(71.5),
        "means": np.ones(3),
        "args": argparse.Namespace(lr=1),
    }
    torch.save(content, tmp_path / "x.pth.tar")
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # before torch 2.6
        with pytest.raises(UserError, match=r"would run code when loaded .* and is refused"):
            read_checkpoint(tmp_path / "x.pth.tar")
        return
    read = read_checkpoint(tmp_path / "x.pth.tar")
    assert same(find_weights(MODEL, read, what="x").weights, STATE)
    assert not hasattr(read["args"], "lr")


class Archived(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 3).half(), nn.Sequential(nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2)))
        self.shared = self.tower[0]
        self.register_buffer("input_resolution", torch.tensor(224))
        self.scale = nn.Parameter(torch.ones([]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_an_archive_gives_the_tensors_of_its_state_dict(tmp_path: Path) -> None:
    module = Archived().eval()
    for archive in (torch.jit.script(module), torch.jit.trace(module, torch.ones(1))):
        archive.save(str(tmp_path / "net.pt"))
        found, wanted = read_checkpoint(tmp_path / "net.pt"), archive.state_dict()
        assert same({name: found[name] for name in wanted}, wanted)
        assert all(found[name].dtype == wanted[name].dtype for name in wanted)


def test_an_archive_that_names_anything_else_is_refused_and_not_run(tmp_path: Path) -> None:
    import zipfile

    file, mark = tmp_path / "evil.pt", tmp_path / "ran"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("evil/data.pkl", f"cos\nmkdir\n(S'{mark}'\ntR.".encode())
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(UserError, match=r"cannot be read without running it \(it calls os.mkdir\)"):
        read_archive(file)
    assert not mark.exists()


# Whole models


def put(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


@pytest.fixture
def folder(save_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that open_clip also knows by the name mini-8."""
    made = save_clip()
    config = json.loads((made / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "mini-8", config)
    return made


def test_a_tower_takes_the_other_from_its_base(folder: Path, save_clip: Callable[..., Path]) -> None:
    base, other = load_model(str(folder)), load_model(str(save_clip("other", seed=5)))
    pixels, texts = torch.rand(2, 3, 16, 16), ["a cat", "two dogs"]
    vision = {n.removeprefix("visual."): t for n, t in other.model.state_dict().items() if n.startswith("visual.")}
    text = {n: t for n, t in other.model.state_dict().items() if not n.startswith(("visual.", "logit"))}
    fare, leaf = put(folder / "fare@4.pt", vision), put(folder / "leaf.pth.tar", {"text_state": text, "epoch": 1})
    for spec in (f"mini-8/{fare}@{folder}", f"{fare}@{folder}"):
        found = load_model(spec)
        assert (found.spec, found.logit_scale) == (spec, base.logit_scale)
        assert torch.equal(found.encode_image(pixels), other.encode_image(pixels))
        assert torch.equal(found.encode_text(texts), base.encode_text(texts))
        assert found.fingerprint not in (base.fingerprint, other.fingerprint)
    swapped = load_model(f"{fare}@{other_folder(folder)}")
    assert swapped.fingerprint == load_model(str(other_folder(folder))).fingerprint
    both = load_model(f"{leaf}#text_state@{fare}@{folder}")
    assert torch.equal(both.encode_text(texts), other.encode_text(texts))
    assert torch.equal(both.encode_image(pixels), other.encode_image(pixels))


def other_folder(folder: Path) -> Path:
    return folder.parent / "other"


class Own:
    image_size, logit_scale = 4, 10.0

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3))

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.eye(3)[: len(texts)]


def test_what_a_tower_and_its_base_cannot_be(folder: Path, save_clip: Callable[..., Path]) -> None:
    def said(spec: str) -> str:
        with pytest.raises(UserError) as caught:
            load_model(spec)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    whole = load_model(str(folder)).model.state_dict()
    vision = {n.removeprefix("visual."): t for n, t in whole.items() if n.startswith("visual.")}
    fare, all_of_it = put(folder / "fare.pt", vision), put(folder / "whole.pt", whole)
    assert f"as 'mini-8/{fare}@BASE'" in said(f"mini-8/{fare}")
    assert f"holds a whole model: leave out '@{folder}'" in said(f"{all_of_it}@{folder}")
    assert "is no ViT-B-32" in said(f"ViT-B-32/{fare}@{folder}")
    assert "base of a tower must be an open_clip model" in said(f"{fare}@{__name__}:Own")
    bare = save_clip("bare")
    (bare / "open_clip_model.safetensors").unlink()
    inside = put(bare / "open_clip_pytorch_model.bin", {"vision_encoder_state_dict": vision})
    assert f"as '{inside}@BASE'" in said(str(bare))


def test_a_folder_with_several_sets_takes_a_name(folder: Path) -> None:
    state = load_model(str(folder)).model.state_dict()
    (folder / "open_clip_model.safetensors").unlink()
    put(folder / "open_clip_pytorch_model.bin", {"model": state, "ema": {n: t * 0.5 for n, t in state.items()}})
    with pytest.raises(UserError, match="model and ema: name one of them behind the file, as FILE#ema"):
        load_model(str(folder))
    assert torch.equal(load_model(f"{folder}#model").model.visual.proj, state["visual.proj"])


def test_a_bias_that_has_no_place_is_an_attribute(folder: Path) -> None:
    state = load_model(str(folder)).model.state_dict()
    found = load_model(f"mini-8/{put(folder / 'bias.pt', {**state, 'logit_bias': torch.tensor(-10.0)})}")
    assert found.logit_bias == -10.0  # type: ignore[attr-defined]
    assert found.fingerprint == load_model(f"mini-8/{put(folder / 'none.pt', dict(state))}").fingerprint


# CLIP of transformers


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**vision, "hidden_size": 16, "intermediate_size": 64, "vocab_size": 300, "eos_token_id": 299,
                     "bos_token_id": 298, "max_position_embeddings": 16, "projection_dim": 24},
        vision_config={**vision, "image_size": 16, "patch_size": 8, "projection_dim": 24},
        projection_dim=24,
    )  # fmt: skip
    return transformers.CLIPModel(config).eval()


def ours(quick: bool) -> nn.Module:
    vision, text = CONFIG["vision_cfg"] | {"layers": 2}, CONFIG["text_cfg"] | {"layers": 2}
    return open_clip.CLIP(**(CONFIG | {"vision_cfg": vision, "text_cfg": text}), quick_gelu=quick).eval()


def features(model: Any, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if isinstance(model, open_clip.CLIP):
            return model.encode_image(pixels), model.encode_text(tokens)
        vision = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return vision, model.text_projection(model.text_model(input_ids=tokens).pooler_output)


@pytest.mark.parametrize("prefix", ["", "module.", "clip."])
def test_transformers_weights_give_the_same_features(theirs: Any, prefix: str) -> None:
    pixels, tokens = torch.rand(3, 3, 16, 16), torch.randint(1, 290, (3, 16))
    tokens[:, 9] = 299
    model = ours(quick=True)
    fit_weights(model, {prefix + n: t for n, t in theirs.state_dict().items()}, what="x")
    for found, wanted in zip(features(model, pixels, tokens), features(theirs, pixels, tokens), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    plain = ours(quick=False)
    fit_weights(plain, theirs.state_dict(), what="x")
    assert not torch.allclose(features(plain, pixels, tokens)[0], features(theirs, pixels, tokens)[0], atol=1e-5)


def test_the_activation_that_transformers_names_is_held_against_the_architecture(folder: Path) -> None:
    spec = f"mini-8/{folder / 'open_clip_model.safetensors'}"
    (folder / "config.json").write_text('{"model_type": "clip", "vision_config": {}, "text_config": {}}')
    with pytest.raises(UserError, match=r"trained with quick_gelu, and .* computes gelu: name the architecture"):
        load_model(spec)
    gelu = {"hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": gelu, "text_config": gelu}))
    load_model(spec)


def test_transformers_towers_alone(theirs: Any) -> None:
    whole: Found = find_weights(ours(quick=True), theirs.state_dict(), what="x")
    for tower, projection in (("vision", "visual_projection"), ("text", "text_projection")):
        state = {f"{tower}_model.{n}": t for n, t in getattr(theirs, f"{tower}_model").state_dict().items()}
        state[f"{projection}.weight"] = getattr(theirs, projection).weight.detach()
        found = find_weights(ours(quick=True), state, what="x")
        assert found.tower == tower
        assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in found.weights.items())
        del state[f"{projection}.weight"]
        assert "' is missing" in refused(state, ours(quick=True))
        # As a tower's class of its own saves it, without a name before it.
        bare = {n.removeprefix(f"{tower}_model."): t for n, t in state.items()}
        bare[f"{projection}.weight"] = getattr(theirs, projection).weight.detach()
        assert find_weights(ours(quick=True), bare, what="x").tower == tower
