"""Every form of a model spec, and what is said when one is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from robustvlm.errors import UserError
from robustvlm.models import list_models, load_model, zoo
from robustvlm.models import weights as hub


def refused(spec: str, **options: Any) -> str:
    """Return the message, which must be one line without a path of ours or Python's words."""
    with pytest.raises(UserError) as caught:
        load_model(spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.fixture
def architecture(save_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder model whose config open_clip also knows by the name mini-8."""
    folder = save_clip()
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "mini-8", config)
    return folder


class TestTiny:
    def test_bundled_model_sees_and_reads(self) -> None:
        vlm = load_model("tiny")
        assert (vlm.spec, vlm.image_size) == ("tiny", 64)
        features = vlm.encode_image(torch.rand(2, 3, 64, 64))
        assert features.shape == vlm.encode_text(["a cat", "a dog"]).shape

    def test_its_own_merges_file_is_used(self) -> None:
        tokens = load_model("tiny").tokenizer(["cat"])[0]  # type: ignore[operator]
        assert tokens.max() == 4095, "the end token is the last of the 4,096"

    def test_a_device_that_is_not_there(self) -> None:
        assert "unknown device 'gpu'" in refused("tiny", device="gpu")
        assert "CUDA devices" in refused("tiny", device="cuda:99")


class TestFolder:
    def test_relative_and_absolute(self, save_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        folder = save_clip()
        monkeypatch.chdir(folder.parent)
        assert load_model("model").fingerprint == load_model(str(folder)).fingerprint

    def test_an_attack_run_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text('{"format": 1, "kind": "attack"}')
        assert "is a run of `robustvlm attack` and holds no model" in refused(str(tmp_path))

    def test_any_other_folder_is_no_model(self, tmp_path: Path) -> None:
        assert "expected open_clip_config.json and open_clip_model.safetensors" in refused(str(tmp_path))
        (tmp_path / "manifest.json").write_text("[")
        assert "holds no model: expected" in refused(str(tmp_path))

    def test_no_weights(self, save_clip: Callable[..., Path]) -> None:
        folder = save_clip()
        (folder / "open_clip_model.safetensors").unlink()
        assert "but no weights" in refused(str(folder))

    @pytest.mark.parametrize(
        "config",
        ["{", "[]", "{}", '{"model_cfg": {"embed_dim": 8}}', '{"model_cfg": {"vision_cfg": 1, "text_cfg": 2}}'],
    )
    def test_broken_config(self, save_clip: Callable[..., Path], config: str) -> None:
        folder = save_clip()
        (folder / "open_clip_config.json").write_text(config)
        said = refused(str(folder))
        reasons = ("cannot be built from its config", "open_clip_config.json' (Expecting", "expected an object, {...}")
        assert any(reason in said for reason in reasons)

    def test_a_tokenizer_too_large_for_the_vocabulary(self, save_clip: Callable[..., Path]) -> None:
        folder = save_clip(
            model_cfg={
                "embed_dim": 24,
                "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
                "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1},
            }
        )
        assert "has room for 600 tokens, but its tokenizer knows 49408" in refused(str(folder))

    @pytest.mark.parametrize("content", ["[]", '"clip"', "null", '{"model_type": "clip", "vision_config": []}'])
    def test_a_config_of_transformers_that_is_no_object(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "config.json").write_text(content)
        assert "expected an object, {...}" in refused(f"transformers:{tmp_path}")

    @pytest.mark.parametrize("content", ["[]", '{"model_cfg": {"text_cfg": []}}', '{"model_cfg": [1]}'])
    def test_a_config_of_the_hub_that_is_no_object(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
    ) -> None:
        (tmp_path / "config.json").write_text(content)
        monkeypatch.setattr("robustvlm.models.zoo.hub_file", lambda *_, **__: tmp_path / "config.json")
        assert "expected an object, {...}" in refused("hf-hub:org/name")

    def test_a_list_beside_a_checkpoint_is_no_config(self, architecture: Path) -> None:
        (architecture / "config.json").write_text("[]")
        assert "holds a list, expected an object" in refused(f"mini-8/{architecture / 'open_clip_model.safetensors'}")

    def test_a_config_that_asks_for_code_is_refused(self, save_clip: Callable[..., Path]) -> None:
        folder = save_clip()
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        assert "trust_remote_code" in refused(str(folder))

    def test_nothing_there(self) -> None:
        assert refused("./no/such/folder") == "no model folder at './no/such/folder'"


class TestName:
    def test_local_checkpoints_by_path(self, architecture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = load_model(str(architecture))
        weights = load_file(architecture / "open_clip_model.safetensors")
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, architecture / "w.pt")
        pixels = torch.rand(2, 3, 16, 16)
        monkeypatch.chdir(architecture)
        for path in (architecture / "open_clip_model.safetensors", architecture / "w.pt", "w.pt", "../model/w.pt"):
            found = load_model(f"mini-8/{path}")
            assert torch.equal(found.encode_image(pixels), expected.encode_image(pixels))
        # The same function under a name and from a folder; OpenAI's way of writing a name with a slash.
        assert torch.equal(load_model("mini/8/w.pt").encode_image(pixels), expected.encode_image(pixels))

    def test_checkpoint_of_another_shape(self, architecture: Path) -> None:
        weights = load_file(architecture / "open_clip_model.safetensors")
        weights["visual.conv1.weight"] = torch.ones(32, 3, 4, 4)
        save_file(weights, architecture / "other.safetensors")
        message = refused(f"mini-8/{architecture}/other.safetensors")
        assert "'visual.conv1.weight' is [32, 3, 4, 4], the model needs [32, 3, 8, 8]" in message

    def test_missing_checkpoint(self, architecture: Path) -> None:
        assert "no checkpoint file at" in refused(f"mini-8/{architecture}/none.safetensors")

    def test_unknown_model_has_near_names(self) -> None:
        assert "did you mean" in refused("ViT-B-33/laion2b_s34b_b79k")
        assert "'ViT-B-32'" in refused("ViT-B-33")
        assert "did you mean 'tiny'" in refused("tinny")

    def test_unknown_tag_has_near_tags(self) -> None:
        message = refused("ViT-B-32/laion2b_s34b_b79")
        assert "no weights 'laion2b_s34b_b79'" in message
        assert "did you mean 'laion2b_s34b_b79k'" in message
        assert "no published weights" in refused("ViT-M-16/nothing")

    def test_name_without_weights(self) -> None:
        assert "'ViT-B-32' is an architecture: say which weights, as 'ViT-B-32/openai'" in refused("ViT-B-32")
        assert "needs its architecture before it, as 'ViT-B-32/best.safetensors'" in refused("best.safetensors")

    @pytest.mark.parametrize("spec", ["", " ", "/", "a:b:c", "hf-hub:", "hf-hub:nope", "..", "\0", "x" * 500])
    def test_odd_specs_are_refused(self, spec: str) -> None:
        with pytest.raises(UserError):
            load_model(spec)

    def test_local_siglip_gets_siglips_normalisation(self) -> None:
        shared = zoo._shared_preprocess("ViT-B-16-SigLIP")
        assert shared is not None
        assert tuple(shared["mean"]) == (0.5, 0.5, 0.5)
        # The weights of this one were trained with different means: none can be assumed.
        assert zoo._shared_preprocess("ViT-L-14") is None

    def test_what_a_checkpoint_leaves_open_is_told(
        self, architecture: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert "differ in mean and std" in zoo._unsure("ViT-L-14")
        assert "QuickGELU" in zoo._unsure("ViT-L-14")
        assert zoo._unsure("ViT-L-14-quickgelu") == zoo._unsure("ViT-B-16-SigLIP") == ""
        weights = f"mini-8/{architecture}/open_clip_model.safetensors"
        load_model(weights)
        assert not caplog.messages
        monkeypatch.setattr(zoo, "_unsure", lambda name: f"{name} is open")
        load_model(weights)
        assert "does not say how it was trained: mini-8 is open" in caplog.messages[0]


class TestPretrained:
    def test_tag_decides_normalisation_and_activation(
        self, architecture: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
        tags = {
            "plain": {"hf_hub": "org/plain/", "mean": mean, "std": std, "interpolation": "bilinear"},
            "quick": {"hf_hub": "org/quick/w.bin", "mean": mean, "std": std, "quick_gelu": True},
        }
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "mini-8", tags)
        asked: list[tuple[str, tuple[str, ...]]] = []

        def file(repo: str, names: tuple[str, ...], *, advice: str) -> Path:
            assert "mini-8/FILE.safetensors" in advice
            asked.append((repo, tuple(names)))
            return architecture / "open_clip_model.safetensors"

        monkeypatch.setattr(hub, "hub_file", file)
        plain, quick = load_model("mini-8/plain"), load_model("mini-8/quick")
        assert asked == [("org/plain", hub.WEIGHT_NAMES), ("org/quick", ("w.safetensors", "w.bin"))]
        assert plain.mean.flatten().tolist() == pytest.approx(mean)
        assert plain.std.flatten().tolist() == pytest.approx(std)
        assert (plain.interpolation, quick.interpolation) == ("bilinear", "bicubic")
        pixels = torch.rand(2, 3, 16, 16)
        assert not torch.allclose(plain.encode_image(pixels), quick.encode_image(pixels), atol=1e-5)
        assert plain.fingerprint != quick.fingerprint

    def test_no_network_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise OSError("[Errno -2] Name or service not known\nlong story")

        monkeypatch.setattr(hub, "_reach_hub", fail)
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
        message = refused("ViT-B-32/laion2b_s34b_b79k")
        assert "could not fetch 'laion/CLIP-ViT-B-32-laion2B-s34B-b79K'" in message
        assert "(" + "[Errno -2] Name or service not known)" in message
        assert "'ViT-B-32/FILE.safetensors'" in message
        message = refused("hf-hub:org/name")
        assert "could not fetch 'org/name'" in message
        assert "local folder" in message
        # A local checkpoint does not help where the tokenizer is on the hub as well.
        message = refused("ViT-B-16-SigLIP/local.safetensors")
        assert "could not fetch 'timm/ViT-B-16-SigLIP'" in message
        assert "a folder that holds its tokenizer" in message

    def test_cached_files_need_no_network(self, architecture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def cached(repo: str, name: str) -> str | None:
            assert repo == "org/name"
            return str(architecture / name) if (architecture / name).is_file() else None

        monkeypatch.setattr(hub, "_reach_hub", lambda: pytest.fail("the network was asked"))
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
        vlm = load_model("hf-hub:org/name")
        assert vlm.spec == "hf-hub:org/name"
        assert vlm.fingerprint == load_model(str(architecture)).fingerprint

    def test_a_repository_without_the_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.utils import EntryNotFoundError

        tried = []

        def download(repo: str, name: str) -> str:
            tried.append((repo, name))
            raise EntryNotFoundError("404")

        monkeypatch.setattr(hub, "_reach_hub", lambda: None)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
        assert "has none of the files open_clip_config.json" in refused("hf-hub:org/name")
        assert tried == [("org/name", "open_clip_config.json")]


def test_list_models_names_what_can_be_loaded() -> None:
    specs = [model.spec for model in list_models()]
    assert specs[:2] == list(zoo.BUNDLED) == ["tiny", "tiny-robust"]
    assert "ViT-B-32/laion2b_s34b_b79k" in specs
    assert len(specs) == len(set(specs)) == len(open_clip.list_pretrained()) + 2
    for spec in specs[2:]:
        name, tag = zoo._split(spec, open_clip.list_models())
        assert open_clip.pretrained.get_pretrained_cfg(name, tag), spec
