"""Checkpoints are read without running their code, and misfits are named."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.checkpoints import fit_weights
from robustvlm.models.weights import read_weights


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path, kind: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / "evil.pt"
    content = {"visual.conv1.weight": torch.ones(2), "x": Payload(mark)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match="safetensors") as caught:
        read_weights(file)
    assert not mark.exists()
    assert "\n" not in str(caught.value)
    if kind != "pickle":
        assert "would run code when loaded" in str(caught.value)
        assert "mkdir" in str(caught.value)
    torch.load(file, weights_only=False) if kind != "pickle" else pickle.loads(file.read_bytes())
    assert mark.exists(), "the payload must be live for this test to mean anything"


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 20])
def test_garbage_is_damaged(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_weights(file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_file_is_damaged(tmp_path: Path, suffix: str, share: float) -> None:
    file = tmp_path / f"w{suffix}"
    weights = {"a": torch.rand(50, 50), "b": torch.rand(9)}
    torch.save(weights, file) if suffix == ".pt" else save_file(weights, file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(UserError, match="damaged"):
        read_weights(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "no named tensors but list"),
        ({}, "no named tensors"),
        ({"a": torch.ones(1), "b": 3}, "'b' is a int"),
        ({"a": torch.tensor([1.0, float("nan")])}, "'a' holds NaN"),
    ],
)
def test_other_content_is_named(tmp_path: Path, content: object, says: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path / "w.pt")
    assert says in str(caught.value)


def test_unknown_suffix_and_missing_file(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.ones(3))
    with pytest.raises(UserError, match=r"ends in \.safetensors, .*got 'w.npy'"):
        read_weights(tmp_path / "w.npy")
    with pytest.raises(UserError, match="no checkpoint file at"):
        read_weights(tmp_path / "none.pt")


class TestFit:
    def test_half_precision_and_scalar_shapes_are_taken(self, save_clip: Callable[..., Path]) -> None:
        folder = save_clip()
        exact = load_model(str(folder))
        file = folder / "open_clip_model.safetensors"
        weights = {name: tensor.half() for name, tensor in load_file(file).items()}
        weights["logit_scale"] = weights["logit_scale"].reshape(1)
        save_file(weights, file)
        half = load_model(str(folder))
        assert half.model.visual.conv1.weight.dtype == torch.float32
        assert half.logit_scale == pytest.approx(exact.logit_scale, rel=1e-3)
        pixels = torch.rand(2, 3, 16, 16)
        assert torch.allclose(half.encode_image(pixels), exact.encode_image(pixels), atol=1e-2)

    def test_shapes_missing_and_unknown_names_are_named(self, save_clip: Callable[..., Path]) -> None:
        folder = save_clip()
        file = folder / "open_clip_model.safetensors"
        weights = load_file(file)
        weights["visual.proj"] = torch.ones(32, 7)
        weights["more"] = torch.ones(1)
        del weights["text_projection"]
        save_file(weights, file)
        with pytest.raises(UserError) as caught:
            load_model(str(folder))
        message = str(caught.value)
        assert "'visual.proj' is [32, 7], the model needs [32, 24]" in message
        assert "'text_projection' is missing" in message
        assert "(1 more)" in message
        assert "\n" not in message

    def test_another_architecture_is_a_misfit(self, save_clip: Callable[..., Path]) -> None:
        weights = read_weights(save_clip() / "open_clip_model.safetensors")
        with pytest.raises(UserError, match=r"a\.pt does not fit the model: .*more"):
            fit_weights(torch.nn.Linear(2, 2), weights, what="a.pt")
