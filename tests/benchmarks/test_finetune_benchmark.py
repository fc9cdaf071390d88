"""The parts of the fine-tuning benchmark that decide what its tables say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks.finetune.__main__ import main
from benchmarks.finetune.full import on_left_out
from benchmarks.finetune.halves import _some, halves
from benchmarks.finetune.kept import kept, made_with
from benchmarks.finetune.lit_model import emoji_tower, folded
from benchmarks.finetune.measure import Images, right_when_attacked, right_when_clean
from benchmarks.finetune.options import arguments, plan_of
from benchmarks.finetune.sets import BenchmarkSet, Condition, Restricted, _of_classes, read_images
from benchmarks.finetune.tables import Compared, adjusted, read_rows, tables
from benchmarks.finetune.trees import by_place
from benchmarks.finetune.variants import VARIANTS
from robustvlm.attacks import Superclass, ThreatModel
from robustvlm.data import open_data
from robustvlm.data.classes import CIFAR10
from robustvlm.data.source import Sample, select
from robustvlm.errors import UserError


@pytest.mark.parametrize(("name", "classes"), [("cifar10", CIFAR10), ("emoji", open_data("emoji").class_names)])
def test_second_trees_cover_the_classes_and_have_roots_of_their_own(name: str, classes: tuple[str, ...]) -> None:
    tree = by_place(name, classes)
    assert tree.class_names == tuple(classes)
    assert tree.root == "place"
    assert tree.levels == 4


def test_restricted_source_labels_its_classes_and_no_others() -> None:
    source = open_data("emoji?split=test&copies=1")
    names = source.class_names[10:30]
    found = {item.id: item.label for item in Restricted(source, names).samples(limit=60) if isinstance(item, Sample)}
    for item in source.samples(limit=60):
        assert isinstance(item, Sample)
        name = source.class_names[item.label]
        assert found[item.id] == (names.index(name) if name in names else -1)


def test_images_of_some_classes_are_relabelled_and_chosen_by_id() -> None:
    images = Images(torch.rand(6, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2]), tuple("abcdef"))
    found = _of_classes(images, ("x", "y", "z"), ("z", "x"), 3)
    old = dict(zip(images.ids, images.labels.tolist(), strict=True))
    assert len(found.ids) == 3
    assert [{2: 0, 0: 1}[old[name]] for name in found.ids] == found.labels.tolist()


def test_chosen_images_keep_the_order_drawn_by_their_ids() -> None:
    ids = tuple(f"i{n:02}" for n in range(30))
    images = Images(torch.arange(30.0)[:, None, None, None], torch.arange(30) // 10, ids)  # class by class
    found = _of_classes(images, ("x", "y", "z"), ("z", "x"), 12)
    wanted = select([*ids[:10], *ids[20:]], 12)
    assert found.ids == tuple(wanted) != tuple(sorted(wanted))
    assert [f"i{int(pixel):02}" for pixel in found.pixels.flatten()] == wanted
    assert found.labels.tolist() == [0 if name >= "i20" else 1 for name in wanted]
    assert set(found.first(4).labels.tolist()) == {0, 1}  # those attacked are not of the first class alone


def test_images_are_read_in_the_order_of_the_ids_asked_for() -> None:
    source = open_data("emoji?split=test&copies=1")
    wanted = select(source.ids() or [], 9)
    found = read_images(source, 8, wanted)
    assert found.ids == tuple(wanted)
    by_source = read_images(source, 8)
    assert found.ids != tuple(name for name in by_source.ids if name in set(wanted))
    rows = [by_source.ids.index(name) for name in wanted]
    torch.testing.assert_close(found.pixels, by_source.pixels[rows], rtol=0, atol=0)
    assert found.labels.tolist() == by_source.labels[rows].tolist()


class Signs(nn.Module):
    """Three classes by the sums of pixels; class 2 wins nothing."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1) - 6
        return torch.stack([total, -total, torch.full_like(total, -100.0)], 1)


def test_survivors_are_those_the_ball_cannot_carry_over_the_border() -> None:
    offsets = torch.tensor([0.3, 0.01, -0.3, -0.01])  # of 12 pixels with margin 12 |offset|, moved by 12 eps
    pixels = (0.5 + offsets)[:, None, None, None].expand(4, 3, 2, 2).contiguous()
    images = Images(pixels, torch.tensor([0, 0, 1, 0]), tuple("abcd"))
    threat = ThreatModel("Linf", 0.1)
    assert right_when_clean(Signs(), images) == [True, True, True, False]  # type: ignore[arg-type]
    assert right_when_attacked(Signs(), images, "pgd:steps=4", threat) == [True, False, True, False]  # type: ignore[arg-type]
    goal = Superclass(torch.tensor([0, 0, 1]), "1")
    assert all(right_when_attacked(Signs(), images, "pgd:steps=4", threat, goal=goal))  # type: ignore[arg-type]


def row(title: str, clean: str, pgd: str, seed: int) -> dict[str, object]:
    both = {"clean": clean, "pgd": pgd}
    return {
        "title": title,
        "set": "s",
        "seed": seed,
        **both,
        "ensemble": pgd,
        "superclass 1": both,
        "transfer": {"t": both},
    }


def test_tables_show_means_over_seeds_and_paired_differences(tmp_path: Path) -> None:
    made = {
        "tecoa-seed0": row("TeCoA", "1110", "1000", 0),
        "tecoa-seed1": row("TeCoA", "1100", "1000", 1),
        "no-norm-order-seed0": row("no norm order", "1111", "1100", 0),
    }
    for name, content in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = read_rows(tmp_path)
    assert {key: len(rows) for key, rows in found.items()} == {"tecoa": 2, "no-norm-order": 1}
    text = tables(found, list(VARIANTS), {"tecoa": {"seconds": 0.5, "megabytes": 12.4}})
    assert "| TeCoA | 0.625 ± 0.125 | 0.250 ± 0.000 | 0.250 ± 0.000 |" in text
    assert "| 0.50 | 12 |" in text
    assert "| no norm order | +0.250 (p 1, Holm 1) | +0.250 (p 1, Holm 1) |" in text


def test_tests_of_one_table_are_adjusted_for_each_other() -> None:
    lines = [["a", Compared(0.1, 0.01), "-"], ["b", Compared(-0.1, 0.04), Compared(0, 0.03)]]
    assert adjusted(lines) == [
        ["a", "+0.100 (p 0.01, Holm 0.03)", "-"],
        ["b", "-0.100 (p 0.04, Holm 0.06)", "+0.000 (p 0.03, Holm 0.06)"],
    ]
    assert adjusted([["a", Compared(0.1, 0.01)]]) == [["a", "+0.100 (p 0.01)"]]


def test_rows_of_other_options_are_refused(tmp_path: Path) -> None:
    path, made, of = tmp_path / "tecoa-seed0.json", {"clean": "1"}, {"eps": 1, "model": "a"}
    tecoa, changed = VARIANTS["tecoa"], replace(VARIANTS["tecoa"], options={"weight": 2})
    assert kept(path, of, tecoa, lambda: made) == made
    assert kept(path, of, tecoa, lambda: {}) == made  # read, not made again
    with pytest.raises(UserError, match=r"made with model 'a' \(asked for: 'b'\): pass that, or name another file"):
        kept(path, {**of, "model": "b"}, tecoa, lambda: made)
    with pytest.raises(UserError, match="made with variant "):
        kept(path, of, changed, lambda: made)
    kept(tmp_path / "fare-seed0.json", of, VARIANTS["fare"], lambda: made)
    assert set(read_rows(tmp_path)) == {"tecoa", "fare"}
    kept(tmp_path / "pmg-seed0.json", {**of, "eps": 2}, VARIANTS["pmg"], lambda: made)
    with pytest.raises(UserError, match="different models or options"):
        read_rows(tmp_path)
    path.write_text(json.dumps(made))
    with pytest.raises(UserError, match="does not say what it was made with"):
        kept(path, of, tecoa, lambda: made)


def test_rows_tell_sets_apart_by_their_images() -> None:
    def told(pixels: Tensor, label: int) -> dict[str, object]:
        condition = Condition("c", ("a", "b"), Images(pixels, torch.tensor([label]), ("i",)))
        source = open_data("emoji")
        assert source.tree is not None
        benchmark = BenchmarkSet("s", "tiny", source, source.tree, 0.1, 1, condition, (), condition)
        return made_with(benchmark, plan_of(arguments("").parse_args(["emoji"])))

    pixels = torch.rand(1, 3, 2, 2)
    assert told(pixels, 0) == told(pixels.clone(), 0)
    assert told(pixels, 0)["images"] != told(pixels, 1)["images"]
    assert told(pixels, 0)["images"] != told(pixels + 1e-6, 0)["images"]


def test_rows_tell_the_orders_of_their_images_apart() -> None:
    def told(order: list[int]) -> object:
        images = Images(torch.arange(6.0).view(2, 3, 1, 1)[order], torch.tensor([0, 1])[order], ("i", "j"))
        images = replace(images, ids=tuple(images.ids[i] for i in order))
        condition, source = Condition("c", ("a", "b"), images), open_data("emoji")
        assert source.tree is not None
        benchmark = BenchmarkSet("s", "tiny", source, source.tree, 0.1, 1, condition, (), condition)
        return made_with(benchmark, plan_of(arguments("").parse_args(["emoji"])))["images"]

    assert told([0, 1]) == told([0, 1])
    assert told([0, 1]) != told([1, 0])


def test_autoattack_of_several_seeds_is_compared_image_by_image() -> None:
    def one(title: str, seed: int, standard: str) -> dict[str, object]:
        return {"title": title, "seed": seed, "clean": "1111", "pgd": "1110", "standard": standard}

    found = {
        "tecoa": [one("TeCoA", 0, "1000"), one("TeCoA", 1, "0000")],
        "fare": [one("FARE", 0, "1110"), one("FARE", 1, "0110")],
    }
    lines = on_left_out(found).splitlines()
    assert lines[-2:] == [
        "| TeCoA | 1.000 ± 0.000 | 0.750 ± 0.000 | 0.125 ± 0.125 | - | 2 |",
        "| FARE | 1.000 ± 0.000 | 0.750 ± 0.000 | 0.625 ± 0.125 | +0.500 (p 0.5) | 2 |",
    ]
    assert "0.250 (" in on_left_out({"tecoa": found["tecoa"][:1]})  # one seed: the interval over images


def test_left_out_sets_are_compared_image_by_image(tmp_path: Path) -> None:
    def told(title: str, seed: int, alone: str, among: str) -> dict[str, object]:
        sets = {"alone": {"clean": alone, "pgd": "0000"}, "among": {"clean": among, "pgd": "0000"}}
        other = {"clean": "1111", "pgd": "1111"}
        transfer = {"transfer": {**sets, "t": other}, "left out": list(sets), "superclass 1 by name": other}
        return {**row(title, "1110", "1000", seed), **transfer}

    made = {
        "zero-shot-seed0": told("zero-shot", 0, "1111", "1111"),
        "tecoa-seed0": told("TeCoA", 0, "1000", "0000"),
        "tecoa-seed1": told("TeCoA", 1, "1000", "1000"),
        # Right on three images in each set where TeCoA is right on none: three pairs, whatever the number of sets.
        "tree-seed0": told("hierarchical, 1 tree", 0, "1111", "0111"),
    }
    for name, content in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    clean, pgd = tables(read_rows(tmp_path), list(VARIANTS), {}).split("\n\n")[-2:]
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in clean.splitlines()}
    assert lines["TeCoA"][:2] == ["0.188 ± 0.062", "-"]
    assert lines["hierarchical, 1 tree"][:5] == ["0.875", *["+0.750 (p 0.25, Holm 1)"] * 3, "+0.000 (p 1, Holm 1)"]
    assert lines["zero-shot"][:2] == ["1.000", "+0.812 (p 0.12, Holm 1)"]
    assert "| zero-shot | 0.000 | +0.000 (p 1, Holm 1) |" in pgd


@pytest.mark.parametrize("data", ["emoji?split=train&labels=all", "emoji"])
def test_halves_share_out_the_classes_of_every_superclass(data: str) -> None:
    tree = open_data(data).tree
    assert tree is not None
    tuned, rest = halves(tree[0])
    assert sorted((*tuned, *rest)) == sorted(tree[0].class_names)
    for group in tree[0].groups(1).values():
        assert 0 <= len(set(group) & set(tuned)) - len(set(group) & set(rest)) <= 1


def test_images_of_a_half_are_labelled_by_the_names_they_are_told_among() -> None:
    names, of = ("a", "b", "c"), ("c", "a")
    images = Images(torch.arange(30.0)[:, None, None, None], torch.arange(30) % 3, tuple(f"i{n}" for n in range(30)))
    for among in (of, names):
        found = _some(images, names, of, among, 9)
        assert len(found.ids) == 9
        for pixel, label, name in zip(found.pixels.flatten().tolist(), found.labels.tolist(), found.ids, strict=True):
            assert name == f"i{int(pixel)}"
            assert among[label] == names[int(pixel) % 3]
    assert found.ids != tuple(sorted(found.ids, key=lambda name: int(name[1:])))  # not by class or order


def test_folding_batch_normalisation_changes_no_feature() -> None:
    torch.manual_seed(0)
    tower, pixels = emoji_tower(), torch.rand(4, 3, 64, 64)
    tower.train()(pixels * 0.7)  # statistics of its own
    with torch.no_grad():
        before = tower.eval()(pixels)
        after = folded(tower)(pixels)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in tower.modules())


def test_precision_is_the_plan_s() -> None:
    options = arguments("").parse_args(["lit-emoji", "--fp32"])
    assert plan_of(options).precision == "fp32"
    assert plan_of(arguments("").parse_args(["emoji"])).precision == "bf16"


def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cifar10"]) == 2
    assert "pass its Parquet files" in capsys.readouterr().err
    assert main(["emoji", "--variants", "tecao"]) == 2
    assert "did you mean 'tecoa'?" in capsys.readouterr().err
