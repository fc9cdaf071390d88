"""The parts of the fine-tuning benchmark that decide what its tables say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks.finetune.__main__ import main
from benchmarks.finetune.measure import Images, right_when_attacked, right_when_clean
from benchmarks.finetune.sets import Restricted, _of_classes
from benchmarks.finetune.tables import read_rows, tables
from benchmarks.finetune.trees import by_place
from benchmarks.finetune.variants import VARIANTS
from robustvlm.attacks import Superclass, ThreatModel
from robustvlm.data import open_data
from robustvlm.data.classes import CIFAR10
from robustvlm.data.source import Sample


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
    assert "| no norm order | +0.250 (p 1) | +0.250 (p 1) |" in text


def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cifar10"]) == 2
    assert "pass its Parquet files" in capsys.readouterr().err
    assert main(["emoji", "--variants", "tecao"]) == 2
    assert "did you mean 'tecoa'?" in capsys.readouterr().err
