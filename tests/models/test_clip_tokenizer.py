"""A tokenizer that is not the one a model was trained with is refused; an exported one is found by open_clip alone."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from robustvlm.commands.export import export
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.clip import MERGES
from robustvlm.models.export import write_clip_folder
from robustvlm.models.zoo import BUNDLED


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLED["tiny"], tmp_path / "tiny"))


@pytest.mark.parametrize("kept", [0, 1, 3000])
def test_a_merges_file_that_was_cut_short(kept: int, tiny: Path) -> None:
    (path,) = tiny.glob("bpe_*.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    path.write_bytes(gzip.compress("\n".join(lines[:kept]).encode()))
    with pytest.raises(UserError, match=r"has room for 4096 tokens, but its tokenizer knows \d+: put the merges file"):
        load_model(str(tiny))


def test_an_empty_file_a_damaged_one_and_two(tiny: Path) -> None:
    (path,) = tiny.glob("bpe_*.txt.gz")
    whole = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="its tokenizer knows 514"):
        load_model(str(tiny))
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"the merges file '.*' of model '.*' is damaged .*: fetch it again"):
        load_model(str(tiny))
    path.write_bytes(whole)
    (tiny / "bpe_other.txt.gz").write_bytes(whole)
    with pytest.raises(UserError, match=r"has several merges files \(bpe_4096.txt.gz, bpe_other.txt.gz\): name one"):
        load_model(str(tiny))


def test_a_named_file_that_is_gone(tiny: Path) -> None:
    path = tiny / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": "mine.txt.gz"}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"names the merges file '.*mine.txt.gz', which is not there"):
        load_model(str(tiny))


def test_open_clip_alone_reads_an_exported_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, out = load_model("tiny"), tmp_path / "out"
    write_clip_folder(vlm, out)
    monkeypatch.chdir(tmp_path)
    texts, pixels = ["a drawing of a dog", "Zwölf"], torch.rand(2, 3, 64, 64)
    model, tokenizer = open_clip.create_model("local-dir:out").eval(), open_clip.get_tokenizer("local-dir:out")
    assert torch.equal(tokenizer(texts), vlm.tokenizer(texts))
    with torch.no_grad():
        assert torch.allclose(model.encode_image(pixels, normalize=True), vlm.encode_image(pixels), atol=1e-6)
        assert torch.allclose(model.encode_text(tokenizer(texts), normalize=True), vlm.encode_text(texts), atol=1e-6)
    moved = Path(shutil.move(out, tmp_path / "moved"))
    assert load_model(str(moved)).fingerprint == vlm.fingerprint
    (moved / MERGES).unlink()
    with pytest.raises(UserError, match="which is not there"):
        load_model(str(moved))


def test_what_a_written_folder_keeps(save_clip: Callable[..., Path], tmp_path: Path) -> None:
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text | {"tokenizer_kwargs": {"clean": "canonicalize"}}}
    folder = save_clip(
        model_cfg=config | {"quick_gelu": True},
        resize_mode="longest",
        fill_color=5,
        mean=[0.1] * 3,
        interpolation="bilinear",
    )
    vlm = load_model(str(folder))
    write_clip_folder(vlm, tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    assert again.framing == vlm.framing
    assert again.fingerprint == vlm.fingerprint
    pixels, texts = torch.rand(2, 3, 16, 16), ["Hot-Dog, please!"]
    assert torch.equal(again.encode_image(pixels), vlm.encode_image(pixels))
    assert torch.equal(again.encode_text(texts), vlm.encode_text(texts))


def test_a_pipe_for_a_merges_file_is_refused_and_not_waited_for(tiny: Path) -> None:
    (path,) = tiny.glob("bpe_*.txt.gz")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"the merges file .* is damaged \(.* is no regular file\)"):
        load_model(str(tiny))


def test_exporting_what_is_there_already_is_no_mistake_and_another_model_is_one(tiny: Path) -> None:
    """Also with a merges file, whose path stands in both configs and differs."""
    first, second = tiny.parent / "first", tiny.parent / "second"
    first.mkdir()
    for left in (".tmpvOESOB", ".open_clip_model.safetensors.kzwoaq_a.part"):  # of an export that was killed
        (first / left).write_bytes(b"half")
    export(str(tiny), first)
    assert not list(first.glob(".*"))
    export(str(first), second)
    before = [(path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(second.iterdir())]
    export(str(first), second)
    assert [(path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(second.iterdir())] == before
    with pytest.raises(UserError, match="choose another one to export to"):
        export(str(first), second, half=True)
    with pytest.raises(UserError, match="choose another one to export to"):
        export("tiny-robust", second)
