"""Trees as arrays, averages up a tree, and the hierarchical loss against loops over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_tower import NAMES, small_forest
from torch import Tensor

from robustvlm.data.emoji import emoji_tree
from robustvlm.data.trees import Tree
from robustvlm.defenses.finetune.hierarchy import (
    HierarchicalOptions,
    Hierarchy,
    alignment,
    image_nodes,
    level_weights,
    norm_order,
    vicinity,
)
from robustvlm.defenses.finetune.hyperbolic import distance, distances, exp0, hyp_avg
from robustvlm.errors import UserError


def build(tree: Tree) -> tuple[Hierarchy, list[str]]:
    names = list(dict.fromkeys([*tree.class_names, *(name for path in tree.paths for name in path)]))
    return Hierarchy(tree, names), names


def embedded(count: int, seed: int) -> Tensor:
    return exp0(torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2, 1.0)


def test_arrays_describe_the_tree() -> None:
    tree = small_forest()[0]
    h, names = build(tree)
    nodes = [name for level in range(tree.levels) for name in tree.level_names(level)]
    assert [names[i] for i in h.text_of] == nodes
    assert h.sizes == (4, 3, 2, 1)
    for k, path in enumerate(tree.paths):
        above = h.node_of_class[:, k].tolist()
        assert [nodes[i] for i in above] == list(path)
        assert [int(h.parent_of[i]) for i in above] == [*above[1:], above[-1]]
    # "all" stands for car on two levels, "animal" for elk on one, and the root is its own parent.
    assert [nodes[i] for i in h.alike.nonzero().flatten()] == ["animal", "all", "all", "all"]


def test_kin_are_no_negatives_and_neighbouring_levels_hold_some() -> None:
    tree = emoji_tree()[0]
    h, names = build(tree)
    nodes = [names[i] for i in h.text_of]
    paths = [set(path) for path in tree.paths]
    draws = torch.randint(len(nodes), (300, 2), generator=torch.Generator().manual_seed(0))
    for i, j in draws.tolist():
        kin = any(nodes[i] in path and nodes[j] in path for path in paths)
        apart = abs(int(h.level_of[i] - h.level_of[j]))
        assert bool(h.near[i, j]) == (i == j or (not kin and apart <= 1))
        assert bool(h.same[i, j]) == (i == j or (not kin and apart == 0))
    leaf = nodes.index("dog")
    rivals = {nodes[j] for j in h.near[leaf].nonzero().flatten()}
    assert {"cat", "bird"} <= rivals
    assert not rivals & {"mammal", "animal", "root"}


def test_superclass_images_are_averages_of_what_the_batch_shows() -> None:
    h, _ = build(small_forest()[0])
    points, labels = embedded(4, 0), torch.tensor([0, 1, 1, 2])  # cat, dog, dog, elk: no car
    found = image_nodes(points, labels, h, 1.0)
    pet = hyp_avg(points[:3], torch.ones(1, 3), 1.0)
    elk = points[3:]
    animal = hyp_avg(torch.cat([pet, elk]), torch.ones(1, 2), 1.0)
    expected = torch.cat([points, pet, elk, torch.zeros(1, 4), animal, torch.zeros(1, 4), animal])
    torch.testing.assert_close(found.points, expected)
    assert found.shown.tolist() == [True] * 6 + [False, True, False, True]
    assert found.parent.tolist() == [4, 4, 4, 5, 7, 7, 8, 9, 9, 9]


def loops(
    tree: Tree, points: Tensor, labels: Tensor, texts: dict[str, Tensor], weights: Tensor, *, beside: bool
) -> Tensor:
    """The loss as it is defined, one node at a time (no class less deep than others)."""
    rows = [(0, tree.paths[int(k)][0], x) for x, k in zip(points, labels, strict=True)]
    below = [(tree.paths[int(k)][1], x) for x, k in zip(points, labels, strict=True)]
    for level in range(1, tree.levels):
        here = {}
        for name in dict.fromkeys(name for name, _ in below):
            children = torch.stack([x for parent, x in below if parent == name])
            here[name] = hyp_avg(children, torch.ones(1, len(children)), 1.0)[0]
        rows += [(level, name, x) for name, x in here.items()]
        up = {path[level]: path[min(level + 1, tree.levels - 1)] for path in tree.paths}
        below = [(up[name], x) for name, x in here.items()]
    total = torch.zeros((), dtype=torch.float64)
    for level in range(tree.levels):
        mine = [(name, x) for at, name, x in rows if at == level]
        for name, x in mine:
            own = {name} | {other for path in tree.paths if name in path for other in path}
            reach = range(max(0, level - beside), min(tree.levels, level + beside + 1))
            others = {o for at in reach for o in tree.level_names(at)} - own
            logits = torch.stack([-distance(x, texts[o], 1.0) / 0.3 for o in [name, *sorted(others)]])
            total = total - weights[level] * logits.log_softmax(0)[0] / len(mine)
    return total


@pytest.mark.parametrize("beside", [True, False])
def test_alignment_agrees_with_loops_over_its_definition(beside: bool) -> None:
    tree = emoji_tree("default")[0]
    h, names = build(tree)
    draws = torch.Generator().manual_seed(3)
    points, labels = embedded(12, 4), torch.randint(len(tree.paths), (12,), generator=draws)
    texts = embedded(len(names), 5)
    weights = level_weights(tree.levels).double()
    images = image_nodes(points, labels, h, 1.0)
    apart = distances(images.points, texts[h.text_of], 1.0)
    found = alignment(apart, images, h, weights, 0.3, beside=beside)
    by_name = dict(zip(names, texts, strict=True))
    torch.testing.assert_close(found, loops(tree, points, labels, by_name, weights, beside=beside))


def test_constraints_agree_with_loops_over_their_definition() -> None:
    tree = small_forest()[0]
    h, names = build(tree)
    points, labels, texts = embedded(4, 0), torch.tensor([0, 1, 1, 2]), embedded(len(names), 1)
    images, own = image_nodes(points, labels, h, 1.0), texts[h.text_of]
    by_name = dict(zip(names, texts, strict=True))
    seen = {"pet": images.points[4], "elk": points[3], "animal": images.points[7]}
    near = [distance(x, by_name[NAMES[k]], 1.0) for x, k in zip(points, labels.tolist(), strict=True)]
    levels = [
        torch.stack(near),
        torch.stack([distance(seen["pet"], by_name["pet"], 1.0), distance(seen["elk"], by_name["animal"], 1.0)]),
        distance(seen["animal"], by_name["animal"], 1.0)[None],
        distance(seen["animal"], by_name["all"], 1.0)[None],
    ]
    expected = sum((d - 0.5).clamp_min(0).mean() for d in levels)
    found = vicinity(distances(images.points, own, 1.0), images, h, torch.ones(4, dtype=torch.float64), 0.5)
    torch.testing.assert_close(found, expected, check_dtype=False)

    pairs = [("pet", "cat"), ("pet", "dog"), ("animal", "elk"), ("all", "car"), ("animal", "pet"), ("all", "animal")]
    labelled = [(by_name[p].norm() - by_name[c].norm() + 0.1).clamp_min(0) for p, c in pairs]
    shown = [(seen["pet"], x) for x in points[:3]] + [(seen["elk"], seen["elk"])]  # elk's parent shows elk alone
    shown += [(seen["animal"], seen["pet"]), (seen["animal"], seen["animal"])]
    within = [(p.norm() - c.norm() + 0.1).clamp_min(0) for p, c in shown]
    torch.testing.assert_close(
        norm_order(images, own, h, 0.1), torch.stack(labelled).mean() + torch.stack(within).mean()
    )


def test_perfect_embedding_costs_nothing() -> None:
    tree = small_forest()[1]
    h, names = build(tree)
    texts = exp0(5 * torch.eye(len(names), dtype=torch.float64), 1.0)
    images = image_nodes(texts[:4], torch.arange(4), h, 1.0)
    apart = distances(images.points, texts[h.text_of], 1.0)
    only_leaves = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert alignment(apart, images, h, only_leaves, 0.01, beside=True) < 1e-6
    assert vicinity(apart, images, h, only_leaves, 0.0) < 1e-3


def test_nothing_is_lost_where_a_batch_shows_one_class() -> None:
    h, names = build(small_forest()[0])
    points = embedded(3, 0).requires_grad_()
    images = image_nodes(points, torch.tensor([3, 3, 3]), h, 1.0)
    texts = embedded(len(names), 1)[h.text_of]
    apart = distances(images.points, texts, 1.0)
    loss = alignment(apart, images, h, level_weights(4).double(), 0.1, beside=True) + norm_order(images, texts, h, 0.1)
    (gradient,) = torch.autograd.grad(loss, points)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"curvature": 0.0},
        {"depth": -1.0},
        {"temperature": 0.0},
        {"eps_text": -1.0},
        {"vicinity": math.nan},
        {"leaf_only": True, "per_level": True},
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        HierarchicalOptions(**wrong)  # type: ignore[arg-type]
