"""The CIFAR-10 benchmark model: it learns, it can be saved and loaded, it meets the model protocol."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks.cifar10 import data, fit, prompts, train
from benchmarks.cifar10.attack import pgd
from benchmarks.cifar10.evaluate import accuracy
from benchmarks.cifar10.model import CifarCLIP, ModelConfig, load, save
from robustvlm.errors import UserError
from robustvlm.models import load_model

SMALL = ModelConfig(stem=8, widths=(8, 16, 16), embed_dim=16, text_width=16, text_layers=1)
FAST = fit.Recipe(epochs=6, batch=20, lr=2e-2, smoothing=0.0, ema=0.5, bf16=False)


def jpeg(label: int, rng: np.random.Generator) -> bytes:
    """A noisy picture whose colour tells its class."""
    colour = np.array([label % 3, label // 3 % 3, label // 9], dtype=float) * 90 + 30
    pixels = np.clip(colour + rng.normal(0, 12, (32, 32, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_parquet(path: Path, n: int, *, seed: int, metadata: dict[str, str] | None = None) -> Path:
    rng = np.random.default_rng(seed)
    rows = [{"bytes": jpeg(i % 10, rng), "path": f"{i}.jpg"} for i in range(n)]
    table = pa.table({"image": rows, "label": [i % 10 for i in range(n)]})
    pq.write_table(table.replace_schema_metadata(metadata or {}), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cifar10")


@pytest.fixture(scope="module")
def images(folder: Path) -> data.Images:
    return data.read_images(write_parquet(folder / "train.parquet", 200, seed=0), cache=folder)


@pytest.fixture(scope="module")
def trained(images: data.Images) -> CifarCLIP:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return fit.fit(CifarCLIP(SMALL), images, images, FAST)


def test_training_learns_separable_classes(trained: CifarCLIP, folder: Path) -> None:
    unseen = data.read_images(write_parquet(folder / "test.parquet", 100, seed=1), cache=folder)
    assert accuracy(trained, unseen) > 0.3  # chance is 0.1; reaches 0.6


def test_protocol(trained: CifarCLIP) -> None:
    assert trained.image_size == 32
    assert isinstance(trained.logit_scale, float)
    assert trained.logit_scale > 1
    assert not trained.training
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    assert trained.encode_image(torch.rand(3, 3, 32, 32)).shape == (3, 16)
    assert trained.encode_text(["a cat", "a photo of a dog."]).shape == (2, 16)


def test_features_of_an_image_ignore_the_rest_of_the_batch(trained: CifarCLIP) -> None:
    pixels = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(trained.encode_image(pixels)[:2], trained.encode_image(pixels[:2]), rtol=1e-4, atol=1e-4)


def test_round_trip_keeps_every_feature(trained: CifarCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(trained, tmp_path / "run")
    monkeypatch.setenv("ROBUSTVLM_CIFAR10", str(tmp_path / "run"))
    again, pixels = load(), torch.rand(2, 3, 32, 32)
    assert again.config == trained.config
    assert again.logit_scale == trained.logit_scale
    assert torch.equal(again.encode_image(pixels), trained.encode_image(pixels))
    assert torch.equal(again.encode_text(["a frog"]), trained.encode_text(["a frog"]))


def test_spec_of_the_model_loads(trained: CifarCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(trained, tmp_path)
    monkeypatch.setenv("ROBUSTVLM_CIFAR10", str(tmp_path))
    vlm, pixels = load_model("benchmarks.cifar10.model:load"), torch.rand(2, 3, 32, 32)
    expected = torch.nn.functional.normalize(trained.encode_image(pixels), dim=-1)
    torch.testing.assert_close(vlm.encode_image(pixels), expected)
    assert vlm.logit_scale == trained.logit_scale


def test_robust_training_moves_only_the_image_tower(trained: CifarCLIP, images: data.Images, tmp_path: Path) -> None:
    save(trained, tmp_path)
    recipe = fit.Recipe(epochs=0.5, batch=20, eps=8 / 255, attack_steps=1, bf16=False)
    robust = fit.fit(load(tmp_path), images, images, recipe)
    assert torch.equal(robust.encode_text(["a ship"]), trained.encode_text(["a ship"]))
    assert robust.logit_scale == trained.logit_scale
    assert not torch.equal(robust.visual.head.weight, trained.visual.head.weight)


def test_pgd_stays_in_the_ball_and_raises_the_loss(trained: CifarCLIP, images: data.Images) -> None:
    pixels, labels = data.to_unit(images.pixels[:40]), images.labels[:40]
    targets, eps = prompts.class_embeddings(trained, images.class_names), 8 / 255
    adversarial = pgd(trained, pixels, labels, targets, eps=eps, alpha=eps / 4, steps=10)
    assert (adversarial - pixels).abs().max() <= eps + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    loss = torch.nn.functional.cross_entropy
    assert loss(trained.logits(adversarial, targets), labels) > loss(trained.logits(pixels, targets), labels)


def test_augment_only_translates_and_flips() -> None:
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    rows = torch.tensor([2, 0, 1, 1])
    out = (data.augment(data.pad(pixels), rows, torch.Generator().manual_seed(0)) * 255).round().to(torch.uint8)
    for row, image in zip(rows, out, strict=True):
        windows = data.pad(pixels)[row].unfold(0, 32, 1).unfold(1, 32, 1).flatten(0, 1)
        same = (windows == image).flatten(1).all(dim=1) | (windows == image.flip(-1)).flatten(1).all(dim=1)
        assert int(same.sum()) == 1


def test_class_names_come_from_the_file(tmp_path: Path) -> None:
    names = [f"thing {i}" for i in range(10)]
    features = {"info": {"features": {"label": {"names": names}}}}
    for metadata in ({"classes": json.dumps(names)}, {"huggingface": json.dumps(features)}):
        path = write_parquet(tmp_path / "named.parquet", 10, seed=0, metadata=metadata)
        assert data.read_images(path, cache=tmp_path).class_names == tuple(names)


def test_command_writes_a_loadable_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "ModelConfig", lambda: SMALL)
    train_file = write_parquet(tmp_path / "train.parquet", 40, seed=2)
    test_file = write_parquet(tmp_path / "test.parquet", 10, seed=3)
    common = ["--train", str(train_file), "--test", str(test_file), "--epochs", "1", "--threads", "1", "--fp32"]
    assert train.main([*common, "--out", str(tmp_path / "run")]) == 0
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())) >= {"clean", "pgd20_4/255", "threads"}
    assert load(tmp_path / "run").config == SMALL
    assert train.main([*common, "--out", str(tmp_path / "robust"), "--robust"]) == 2
    assert "--start" in capsys.readouterr().err


def test_unusable_files_and_folders_are_one_clear_line(tmp_path: Path, trained: CifarCLIP) -> None:
    with pytest.raises(UserError, match="train one with"):
        load(tmp_path / "nowhere")
    save(trained, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="no readable"):
        load(tmp_path / "run")
    with pytest.raises(UserError, match="no file"):
        data.read_images(tmp_path / "none.parquet", cache=tmp_path)
    pq.write_table(pa.table({"picture": [b""]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="columns"):
        data.read_images(tmp_path / "other.parquet", cache=tmp_path)
