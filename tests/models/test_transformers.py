"""Models of the transformers library against the library's own forward pass, and all that is refused of them."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", minversion="4.57")

import transformers

from robustvlm.cli.main import main
from robustvlm.core.framing import Framing, to_pixels
from robustvlm.defenses.specs import Operation, split_spec
from robustvlm.errors import UserError
from robustvlm.models import load_model, zero_shot
from robustvlm.models.transformers_files import read_config, split_sides
from robustvlm.models.transformers_pixels import patches
from robustvlm.models.transformers_vlm import TowerVLM, TransformersVLM, pooled

from .transformers_folders import (
    PAIRS,
    SIDE,
    TOWERS,
    VISION,
    bert_tokenizer,
    clip_processor,
    make,
    siglip_tokenizer,
    write_processor,
)

# Before 5.1 the text side of ChineseCLIP has a defect of its own.
_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_CHINESE_WORKS = _VERSION >= (5, 1)
PAIR_NAMES = [name for name in PAIRS if name != "chinese_clip" or _CHINESE_WORKS]
TEXTS = ["a photo of a cat", "two dogs", "the red bike and a border collie on a train, an apple too", "x"]


def pictures(count: int = 3, side: int = SIDE) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def refused(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def theirs(folder: Path, model: Any, texts: list[str]) -> torch.Tensor:
    """Return the library's own logits [images, texts] as its documentation has them computed."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    processor = transformers.AutoImageProcessor.from_pretrained(str(folder))
    if kind.startswith("siglip"):
        words = {
            "input_ids": tokenizer(
                texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
            ).input_ids
        }
    else:
        room = {"clip": 16, "metaclip_2": 16, "altclip": 16, "chinese_clip": 20}[kind]
        words = dict(tokenizer(texts, padding=True, truncation=True, max_length=room, return_tensors="pt"))
        if kind != "chinese_clip":
            words.pop("token_type_ids", None)
    with torch.no_grad():
        return model(**words, **processor(images=pictures(), return_tensors="pt")).logits_per_image


@pytest.mark.parametrize("kind", PAIR_NAMES)
def test_logits_are_those_of_the_library_on_the_same_pixels_and_texts(kind: str, tmp_path: Path) -> None:
    model = make(tmp_path / kind, kind)
    vlm = load_model(f"transformers:{tmp_path / kind}")
    assert isinstance(vlm, TransformersVLM)
    pixels = torch.stack([to_pixels(image, vlm.framing) for image in pictures()])
    ours = vlm.logit_scale * vlm.encode_image(pixels) @ vlm.encode_text(TEXTS).T + (vlm.logit_bias or 0.0)
    wanted = theirs(tmp_path / kind, model, TEXTS)
    assert wanted.std() > 0.3  # else any features would do
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert (vlm.logit_bias is not None) == kind.startswith("siglip")
    # A text's features do not depend on the others of its batch.
    torch.testing.assert_close(vlm.encode_text(TEXTS[:1]), vlm.encode_text(TEXTS)[:1], atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", [*PAIR_NAMES, *TOWERS])
def test_gradients_reach_the_pixels_and_the_model_is_frozen(kind: str, tmp_path: Path) -> None:
    make(tmp_path / kind, kind)
    vlm = load_model(f"transformers:{tmp_path / kind}")
    assert not vlm.training
    assert not any(value.requires_grad for value in vlm.parameters())
    assert all(value.dtype == torch.float32 for value in vlm.parameters())
    pixels = torch.rand(2, 3, 24, 24, requires_grad=True)  # another size: through the resize
    vlm.encode_image(pixels)[:, 0].sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()
    assert (pixels.grad.flatten(1).norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize("kind", list(TOWERS))
def test_towers_give_the_features_of_the_library_and_refuse_texts(kind: str, tmp_path: Path) -> None:
    model = make(tmp_path / kind, kind)
    spec = f"transformers:{tmp_path / kind}"
    vlm = load_model(spec)
    assert isinstance(vlm, TowerVLM)
    pixels = torch.stack([to_pixels(image, vlm.framing) for image in pictures(side=vlm.framing.scaled)])
    processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path / kind))
    with torch.no_grad():
        output = model(**processor(images=pictures(side=vlm.framing.scaled), return_tensors="pt"))
    wanted = output.image_embeds if "image_embeds" in output else output.pooler_output
    if kind == "vit":
        wanted = output.last_hidden_state[:, 0]
    torch.testing.assert_close(vlm.embed_image(pixels), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"image tower without a text side: name the model .*, as .*@MODEL") as caught:
        vlm.encode_text(["a cat"])
    assert "\n" not in str(caught.value)


def test_a_tower_beside_the_text_side_of_another_model(tmp_path: Path) -> None:
    tower, pair = make(tmp_path / "tower", "clip_vision_projected"), make(tmp_path / "pair", "clip", seed=1)
    spec = f"transformers:{tmp_path / 'tower'}@transformers:{tmp_path / 'pair'}"
    vlm, text = load_model(spec), load_model(f"transformers:{tmp_path / 'pair'}")
    torch.testing.assert_close(vlm.encode_text(TEXTS), text.encode_text(TEXTS))
    assert vlm.logit_scale == text.logit_scale == pytest.approx(pair.logit_scale.exp().item())
    assert vlm.cut_tokens(TEXTS) == text.cut_tokens(TEXTS)
    # Either side's weights change the fingerprint.
    found = {vlm.fingerprint}
    for place, model in (("tower", tower), ("pair", pair)):
        next(model.parameters()).data.add_(0.5)
        model.save_pretrained(str(tmp_path / place))
        found.add(load_model(spec).fingerprint)
    assert len(found) == 3


def test_an_alignment_leads_a_tower_into_the_text_side_s_space(tmp_path: Path) -> None:
    make(tmp_path / "tower", "dinov2"), make(tmp_path / "pair", "clip")
    pair = f"transformers:{tmp_path / 'pair'}"
    spec = f"transformers:{tmp_path / 'tower'}@{pair}"
    assert "image features have 24 dimensions, text features 12" in refused(spec)
    weight, bias = torch.randn(12, 24), torch.randn(12)
    save_file({"weight": weight, "bias": bias}, tmp_path / "tower/align.safetensors", metadata={"text": pair})
    vlm, bare = load_model(spec), load_model(f"transformers:{tmp_path / 'tower'}")
    pixels = torch.rand(2, 3, SIDE, SIDE)
    torch.testing.assert_close(vlm.embed_image(pixels), bare.embed_image(pixels) @ weight.T + bias)
    assert vlm.encode_image(pixels).shape[1] == vlm.encode_text(["a cat"]).shape[1] == 12
    save_file({"weight": weight}, tmp_path / "tower/align.safetensors", metadata={"text": "tiny"})
    assert "leads into the space of 'tiny', not of 'transformers:" in refused(spec)
    save_file({"w": weight}, tmp_path / "tower/align.safetensors")
    assert "must hold weight [D_text, D_image]" in refused(spec)


def test_siglip_reads_small_letters_and_sees_no_mask(tmp_path: Path) -> None:
    for kind in ("siglip", "siglip2"):
        make(tmp_path / kind, kind)
        vlm = load_model(f"transformers:{tmp_path / kind}")
        assert isinstance(vlm, TransformersVLM)
        torch.testing.assert_close(vlm.encode_text(["A CAT"]), vlm.encode_text(["a cat"]))
        found = vlm.words(["a cat"])
        assert list(found) == ["input_ids"]
        assert found["input_ids"].shape == (1, 12)


def test_naflex_patches_are_those_of_its_processor(tmp_path: Path) -> None:
    make(tmp_path / "m", "siglip2")
    processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path / "m"))
    (image,) = pictures(1)
    found = processor(images=image, return_tensors="pt")
    assert found["spatial_shapes"].tolist() == [[2, 2]]
    ours = patches((to_pixels(image, SIDE)[None] - 0.5) / 0.5, 8)
    torch.testing.assert_close(ours, found["pixel_values"][:, :4], atol=1e-6, rtol=0)


def test_cut_tokens_counts_what_does_not_fit(tmp_path: Path) -> None:
    make(tmp_path / "m", "clip")
    vlm = load_model(f"transformers:{tmp_path / 'm'}")
    # Start and end take two of 16 places; letters that were never merged take one each.
    assert vlm.cut_tokens(["zz", "z" * 14, "z" * 17]) == [0, 0, 3]
    torch.testing.assert_close(vlm.encode_text(["z" * 14 + "q"]), vlm.encode_text(["z" * 14 + "b"]))


@pytest.mark.parametrize(("kind", "taken"), [("siglip", 1), ("clips", 3)])
def test_tokens_are_counted_for_open_clips_wrappers_of_transformers(kind: str, taken: int, tmp_path: Path) -> None:
    from open_clip.tokenizer import HFTokenizer, SigLipTokenizer

    from robustvlm.models.clip import ClipVLM

    vlm, room = copy.copy(load_model("tiny")), 12
    assert isinstance(vlm, ClipVLM)
    if kind == "siglip":  # ends and fills a text with one token
        siglip_tokenizer(tmp_path, room)
        wrapper = SigLipTokenizer.__new__(SigLipTokenizer)  # its constructor reads a T5 vocabulary
        wrapper.tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        wrapper.context_length = room
    else:  # puts a token for the class last, after those that fill
        bert_tokenizer(tmp_path)
        made = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        made.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
        made.save_pretrained(str(tmp_path))
        wrapper = HFTokenizer(str(tmp_path), context_length=room, tokenizer_mode="clips")
    vlm.tokenizer = wrapper
    texts = ["z" * count for count in range(1, 25)]
    lengths = [len(wrapper.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert {room - taken, room - taken + 1} <= set(lengths)  # one fits exactly, the next does not
    assert vlm.cut_tokens(texts) == [max(0, length + taken - room) for length in lengths]


def test_the_fingerprint_covers_both_towers_the_tokenizer_and_the_processor(tmp_path: Path) -> None:
    base = make(tmp_path / "m", "clip")
    spec = f"transformers:{tmp_path / 'm'}"
    first = load_model(spec).fingerprint
    assert load_model(spec).fingerprint == first
    shutil.copytree(tmp_path / "m", tmp_path / "elsewhere")
    assert load_model(f"transformers:{tmp_path / 'elsewhere'}").fingerprint == first
    found = {first}
    for tower in ("text_model", "vision_model"):
        with torch.no_grad():
            next(getattr(base, tower).parameters()).add_(0.1)
        base.save_pretrained(str(tmp_path / "m"))
        found.add(load_model(spec).fingerprint)
    file = tmp_path / "m/tokenizer.json"
    tokens = json.loads(file.read_text())
    vocab = tokens["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokens))
    found.add(load_model(spec).fingerprint)
    clip_processor(tmp_path / "m")
    settings = json.loads((tmp_path / "m/preprocessor_config.json").read_text())
    (tmp_path / "m/preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    found.add(load_model(spec).fingerprint)
    assert len(found) == 5


# Preprocessing


@pytest.mark.parametrize(
    ("settings", "framing"),
    [
        ({"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}, Framing(16)),
        ({"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}, Framing(16, short_side=20)),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": False}, Framing(16, resize_mode="squash")),
        (
            {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "resample": 2},
            Framing(16, "bilinear"),
        ),
        (
            {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "rescale_factor": 0.01},
            Framing(16),
        ),
    ],
)
def test_the_processor_s_settings_become_pixels(settings: dict[str, Any], framing: Framing, tmp_path: Path) -> None:
    make(tmp_path / "m", "clip_vision")
    own = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    write_processor(tmp_path / "m", "CLIPImageProcessor", **own, **settings)
    vlm = load_model(f"transformers:{tmp_path / 'm'}")
    assert vlm.framing == framing
    processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path / "m"))
    (image,) = pictures(1, framing.scaled)
    wanted = processor(images=image, return_tensors="pt")["pixel_values"]
    pixels = to_pixels(image, vlm.framing)[None]
    assert isinstance(vlm, TowerVLM)
    torch.testing.assert_close((pixels - vlm.mean) / vlm.std, wanted, atol=2e-5, rtol=1e-5)


def test_a_tower_takes_height_and_width(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ViTModel(transformers.ViTConfig(**VISION | {"image_size": [16, 24]}))
    model.save_pretrained(str(tmp_path))
    own = {"image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.4, 0.3], "size": {"height": 16, "width": 24}}
    write_processor(tmp_path, "ViTImageProcessor", resample=3, **own)
    vlm = load_model(f"transformers:{tmp_path}")
    assert vlm.framing == Framing((16, 24), resize_mode="squash")
    processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path))
    image = pictures(1, 16)[0].resize((24, 16))
    wanted = processor(images=image, return_tensors="pt")["pixel_values"]
    assert isinstance(vlm, TowerVLM)
    pixels = to_pixels(image, vlm.framing)[None]
    torch.testing.assert_close((pixels - vlm.mean) / vlm.std, wanted, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        output = model.eval()(pixel_values=wanted)
    found = vlm.embed_image(pixels)
    assert any(torch.allclose(found, one, atol=1e-4) for one in (output.pooler_output, output.last_hidden_state[:, 0]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"do_resize": False}, "does not resize"),
        ({"resample": 0}, "resizes by filter 0: only bilinear (2) and bicubic (3) are known"),
        ({"size": {"shortest_edge": 12}}, "crops 16 pixels out of 12"),
        ({"size": {"height": 20, "width": 20}}, "squashes images to 20 pixels and crops 16 of them"),
        ({"do_center_crop": False}, "resizes and does not crop"),
        ({"size": {"height": 16, "width": 20}, "do_center_crop": False}, "an image"),
        ({"crop_size": {"height": 16, "width": 20}}, "crops 16x20 pixels out of 16"),
        ({"size": {"longest_edge": 16}, "do_center_crop": False}, "expected height and width"),
        ({"image_std": [0.1, 0.0, 0.1]}, "needs 3 numbers as image_mean and image_std"),
        ({"image_mean": [0.1, 0.2]}, "needs 3 numbers as image_mean and image_std"),
    ],
)
def test_processors_that_do_something_else_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    make(tmp_path / "m", "clip")
    own = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    write_processor(tmp_path / "m", "CLIPImageProcessor", **own | settings)
    assert said in refused(f"transformers:{tmp_path / 'm'}")


# What is refused


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_code_in_the_folder_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "m", "clip")
    (tmp_path / "m/evil.py").write_text("raise SystemExit('ran')")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        before = (tmp_path / "m" / name).read_text()
        edit(tmp_path / "m" / name, auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
        assert f"{name} of 'transformers:{tmp_path / 'm'}' asks to run code" in refused(
            f"transformers:{tmp_path / 'm'}"
        )
        (tmp_path / "m" / name).write_text(before)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    model = make(tmp_path / "m", "clip")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "m/pytorch_model.bin")
    assert "has no weights as safetensors" in refused(f"transformers:{tmp_path / 'm'}")


def test_shards_are_read_and_a_lost_one_is_named(tmp_path: Path) -> None:
    model = make(tmp_path / "m", "clip")
    whole = load_model(f"transformers:{tmp_path / 'm'}").fingerprint
    (tmp_path / "m/model.safetensors").unlink()
    model.save_pretrained(str(tmp_path / "m"), max_shard_size="20KB")
    assert load_model(f"transformers:{tmp_path / 'm'}").fingerprint == whole
    lost = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    lost.unlink()
    assert f"names {lost.name}, which is not there" in refused(f"transformers:{tmp_path / 'm'}")


def test_missing_and_broken_weights_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "m", "clip")
    file = tmp_path / "m/model.safetensors"
    values = load_file(file)
    lost = {name: value for name, value in values.items() if name != "text_projection.weight"}
    save_file(lost, file, metadata={"format": "pt"})
    assert "'text_projection.weight' would be random; refused" in refused(f"transformers:{tmp_path / 'm'}")
    save_file(values | {"text_projection.weight": values["text_projection.weight"] * torch.nan}, file, {"format": "pt"})
    assert "'text_projection.weight' holds NaN or infinite values" in refused(f"transformers:{tmp_path / 'm'}")
    save_file(values | {"visual_projection.weight": torch.zeros(3, 24)}, file, {"format": "pt"})
    assert "cannot be loaded as CLIPModel" in refused(f"transformers:{tmp_path / 'm'}") or "would be random" in refused(
        f"transformers:{tmp_path / 'm'}"
    )


def test_weights_of_another_kind_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path / "m", "vit")
    file = tmp_path / "m/model.safetensors"
    save_file(load_file(file) | {"classifier.weight": torch.zeros(2, 24)}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        load_model(f"transformers:{tmp_path / 'm'}")
    assert "1 weights of" in caplog.text
    assert "'classifier.weight'" in caplog.text


def test_an_end_of_text_that_is_not_the_highest_id_is_refused(tmp_path: Path) -> None:
    # With 2 in the config the text tower takes the highest id for the end, whatever the tokenizer says.
    make(tmp_path / "good", "clip", eos_token_id=2)
    load_model(f"transformers:{tmp_path / 'good'}")
    make(tmp_path / "m", "clip", eos_token_id=2)
    for name in ("tokenizer.json", "vocab.json"):
        path = tmp_path / "m" / name
        content = json.loads(path.read_text())
        vocab = content["model"]["vocab"] if name == "tokenizer.json" else content
        end, letter = vocab["<|endoftext|>"], vocab["a</w>"]
        vocab["<|endoftext|>"], vocab["a</w>"] = letter, end
        if name == "tokenizer.json":
            for added in content["added_tokens"]:
                added["id"] = vocab[added["content"]]
            text = json.dumps(content["post_processor"]).replace(str(end), str(letter))
            content["post_processor"] = json.loads(text)
        path.write_text(json.dumps(content))
    config = tmp_path / "m/tokenizer_config.json"
    decoder = json.loads(config.read_text())
    decoder.pop("added_tokens_decoder", None)
    config.write_text(json.dumps(decoder))
    assert "takes its feature at another token than the end of the text" in refused(f"transformers:{tmp_path / 'm'}")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda m: (m / "config.json").unlink(), "expected config.json and model.safetensors in"),
        (lambda m: (m / "config.json").write_text("{}"), "names no model_type"),
        (lambda m: edit(m / "config.json", model_type="bert"), "is a model of type 'bert'; known are clip,"),
        (lambda m: edit(m / "config.json", quantization_config={"bits": 4}), "are quantised"),
        (lambda m: (m / "preprocessor_config.json").unlink(), "does not say how images are prepared"),
        (lambda m: [(m / n).unlink() for n in ("tokenizer.json", "vocab.json", "merges.txt")], "has no tokenizer"),
        (lambda m: (m / "model.safetensors").write_bytes(b"no"), "cannot be loaded as CLIPModel"),
    ],
)
def test_broken_folders_are_refused_in_one_line(break_it: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path / "m", "clip")
    break_it(tmp_path / "m")
    assert said in refused(f"transformers:{tmp_path / 'm'}")


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "m", "clip", vocab_size=2000, eos_token_id=515, bos_token_id=514, pad_token_id=515)
    assert "has room for 2000 tokens, but its tokenizer knows" in refused(f"transformers:{tmp_path / 'm'}")


def test_specs_that_name_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "robustvlm.models.transformers_files.reach_hub", lambda: (_ for _ in ()).throw(OSError("offline"))
    )
    assert "could not fetch 'org/none' from the Hugging Face hub (offline)" in refused("transformers:org/none")
    assert "no folder at './none'" in refused("transformers:./none")
    assert "no folder at ''" in refused("transformers:")
    make(tmp_path / "m", "clip")
    assert "has a text tower of its own: leave out '@tiny'" in refused(f"transformers:{tmp_path / 'm'}@tiny")


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "pip install 'robustvlm[hub]'" in refused(f"transformers:{tmp_path}")


@pytest.mark.skipif(_CHINESE_WORKS, reason="works in this version of the library")
def test_a_version_with_a_defect_is_named(tmp_path: Path) -> None:
    make(tmp_path / "m", "chinese_clip")
    assert f"under transformers {transformers.__version__}" in refused(f"transformers:{tmp_path / 'm'}")


@pytest.mark.parametrize("kind", ["clip", "siglip2"])
def test_attacked_and_certified_by_the_commands(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "m", kind)
    spec = "transformers:m"
    vlm = load_model(f"transformers:{tmp_path / 'm'}")
    classifier = zero_shot(vlm, ["cat", "dog"], ["a {}"], cache=False)
    for number, image in enumerate(pictures(6)):
        label = ("cat", "dog")[int(classifier(to_pixels(image, vlm.framing)[None]).argmax())]
        for name in ("cat", "dog"):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "photos" / label / f"{number}.png")
    (tmp_path / "prompts.txt").write_text("a {}\n")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    monkeypatch.chdir(tmp_path)
    # A model that is named after a library is no code of the user's.
    shared = ["--data", "imagefolder:photos", "--classes", "names.txt", "--templates", "prompts.txt", "--no-code"]
    for words in (
        ["attack", spec, *shared, "--eps", "16/255", "--attack", "pgd:steps=8", "--name", "a"],
        ["certify", spec, *shared, "--sigma", "0.1", "--samples", "200", "--limit", "2", "--name", "c"],
    ):
        monkeypatch.setattr(sys, "argv", ["robustvlm", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "runs/a/summary.json").read_text())
    assert found["clean_accuracy"]["value"] == 1.0
    assert found["per_eps"][0]["fooled"] > 0
    manifest = json.loads((tmp_path / "runs/a/manifest.json").read_text())
    assert manifest["model"]["fingerprint"] == vlm.fingerprint
    assert json.loads((tmp_path / "runs/c/summary.json").read_text())["images"] == 2


def test_a_sequence_of_tokens_is_never_taken_for_features() -> None:
    class Output(dict):  # type: ignore[type-arg]
        pooler_output = None

    with pytest.raises(UserError, match="must give features"):
        pooled(Output(), "the image tower")
    with pytest.raises(UserError, match="must give features"):
        pooled(torch.zeros(2, 5, 8), "the image tower")


def test_folders_whose_path_holds_signs_of_specs(tmp_path: Path) -> None:
    odd = tmp_path / "a@b" / "m+smooth"
    make(odd, "clip")
    assert split_spec(f"transformers:{odd}+smooth:0.1") == (f"transformers:{odd}", (Operation("smooth", ("0.1",)),))
    assert split_sides(f"{odd}@tiny") == (str(odd), "tiny")
    assert load_model(f"transformers:{odd}").spec == f"transformers:{odd}"
    assert read_config(odd, "m")["model_type"] == "clip"


def test_a_zero_shot_classifier_stands_on_it(tmp_path: Path) -> None:
    make(tmp_path / "m", "siglip")
    vlm = load_model(f"transformers:{tmp_path / 'm'}")
    classifier = zero_shot(vlm, ["cat", "dog"], ["a {}"], cache=False)
    pixels = torch.rand(4, 3, SIDE, SIDE)
    cosines = vlm.encode_image(pixels) @ F.normalize(vlm.embed_text(["a cat", "a dog"]), dim=1).T
    torch.testing.assert_close(classifier(pixels), vlm.logit_scale * cosines)
