"""Ways to move image tokens: each loss against a second implementation, by loops or by exact transport."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from robustvlm.attacks.goals import Case, Known, Match, Unsay, read_goals
from robustvlm.attacks.goals.matching import (
    TO,
    aligned,
    anchored,
    cluster_centres,
    crop,
    matched,
    pooled_cosine,
    token_cosine,
    transport,
)
from robustvlm.attacks.objectives import objective
from robustvlm.errors import UserError
from tests.attacks.test_words_goals import LENGTH, WORDS, Toy, outputs

SHAPE = (3, 12, 6)


def tokens(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_cosines_of_tokens_and_of_their_mean() -> None:
    a, b = tokens(0), tokens(1)
    for row in range(len(a)):
        mine, theirs = unit(a[row].numpy()), unit(b[row].numpy())
        assert token_cosine(a, b)[row] == pytest.approx(np.mean([x @ y for x, y in zip(mine, theirs, strict=True)]))
        assert pooled_cosine(a, b)[row] == pytest.approx(unit(mine.mean(0)) @ unit(theirs.mean(0)))


def test_anchored_pulls_to_the_least_alike_picture_where_it_matters() -> None:
    a, clean, anchors = tokens(2), tokens(3), tokens(4, (5, *SHAPE[1:]))
    found = anchored(a, clean, anchors, pull=0.7)
    for row in range(len(a)):
        mine, own = unit(a[row].numpy()), unit(clean[row].numpy())
        pictures = [unit(one.numpy()) for one in anchors]
        farthest = min(pictures, key=lambda one: float((own * one).sum()))
        matters = np.exp(20 * own @ unit(own.mean(0)))
        gain = [0.7 * x @ p - x @ v for x, p, v in zip(mine, farthest, own, strict=True)]
        assert found[row] == pytest.approx(float(matters @ gain / matters.sum()))


def test_clusters_are_those_of_k_means_by_loops() -> None:
    a = tokens(5)
    found = cluster_centres(a, 4)
    for row in range(len(a)):
        units = unit(a[row].numpy())
        centres = [units[(units @ units.mean(0)).argmax()]]
        while len(centres) < 4:
            centres.append(min(units, key=lambda x: max(x @ c for c in centres)))
        for _ in range(11):
            owner = [max(range(4), key=lambda k: x @ centres[k]) for x in units]
            sums = [sum(x for x, o in zip(units, owner, strict=True) if o == k) for k in range(4)]
            centres = [unit(total) if k in owner else centres[k] for k, total in enumerate(sums)]
        assert np.allclose(found[row].numpy(), np.stack(centres), atol=1e-9)
    assert cluster_centres(a[:, :2], 4).shape == (3, 2, 6)


def test_sharp_transport_is_the_best_assignment() -> None:
    cost = tokens(6, (4, 5, 5)).abs()
    plan = transport(cost, smoothness=0.01, rounds=3000)
    assert torch.allclose(plan.sum(1), torch.full((4, 5), 0.2, dtype=torch.float64), atol=1e-4)
    for row in range(4):
        exact = cost[row].numpy()[linear_sum_assignment(cost[row].numpy())].mean()
        assert float((plan[row] * cost[row]).sum()) == pytest.approx(exact, abs=0.02)


def test_matched_clusters_follow_the_gradient_of_the_entropic_cost() -> None:
    """Its optimum is smooth in the tokens, with the slope of the plan alone: the envelope theorem, by differences."""
    a, b, smoothness, step = tokens(7)[:1], tokens(8)[:1], 0.3, 1e-5
    theirs = cluster_centres(b, 3)

    def value(x: Tensor) -> Tensor:
        cosines = torch.einsum("bkd,bld->bkl", cluster_centres(x, 3), theirs)
        plan = transport(1 - cosines, smoothness, 2000)
        return (plan * cosines).sum() - smoothness * (plan * plan.log()).sum()

    x = a.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(matched(x, b, clusters=3, smoothness=smoothness).sum(), x)
    for token, place in ((0, 0), (5, 3), (11, 5)):
        moved = torch.zeros_like(a)
        moved[0, token, place] = step
        difference = float(value(a + moved) - value(a - moved)) / (2 * step)
        assert float(slope[0, token, place]) == pytest.approx(difference, abs=1e-4)


def test_alignment_is_one_at_the_target_and_less_elsewhere() -> None:
    a, b = tokens(9), tokens(10)
    assert torch.allclose(aligned(a, a, weight=0.2), torch.full((3,), 1.2, dtype=torch.float64), atol=0.02)
    assert (aligned(b, a) < aligned(a, a)).all()
    assert torch.allclose(aligned(a, b), pooled_cosine(a, b) + 0.2 * matched(a, b))
    alone = torch.cat([aligned(a[row : row + 1], b[row : row + 1]) for row in range(3)])
    assert torch.allclose(aligned(a, b), alone), "images do not see each other"


def test_crops_are_parts_that_follow_from_the_pixels() -> None:
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    flat = torch.stack([ramp + 0.01 * torch.rand(1, generator=torch.Generator().manual_seed(i)) for i in range(200)])
    found = crop(flat)
    width = found[:, 0, 32].diff(dim=1).median(dim=1).values * 63  # of the crop, in widths of the image
    assert 0.5**0.5 - 0.02 < width.min() < 0.75 < 0.9 < width.max() < 0.9**0.5 + 0.02
    left = found[:, 0, 32, 0]
    assert left.min() < 0.05
    assert left.std() > 0.03
    assert torch.equal(crop(flat[:7]), found[:7])
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(crop(x).sum(), x)
    assert 0.3 < (slope[0, 0] > 0).float().mean() < 1


@pytest.mark.parametrize("way", list(TO))
def test_an_answer_to_another_picture_is_reached_by_its_own_tokens_alone(way: str) -> None:
    toy, target = Toy(), outputs(1, 11)[0]
    goal = Match(toy, target, "cat.png", way=way)
    wanted = toy.text_of(toy.greedy(target.view(1, *toy.shape))[0].tolist())
    out = torch.cat([target[None], outputs(15, 12)])
    said = [toy.text_of(row) for row in toy.greedy(out.view(16, *toy.shape)).tolist()]
    seen = torch.cat([out, outputs(16, 13)], 1) if goal.cropped else out
    case = Case(torch.zeros(16, dtype=torch.long))
    assert goal.reached(seen, case).tolist() == [text == wanted for text in said]
    assert goal.reached(seen, case)[0]
    assert goal.cosine(seen, case).argmax() == 0
    seen.requires_grad_(True)
    (slope,) = torch.autograd.grad(goal.loss(seen, objective("ce"), case).sum(), seen)
    followed, other = slope.chunk(2, 1) if goal.cropped else (torch.zeros(1), slope)
    assert other.abs().sum() > 0
    assert not followed.any(), "of a cropped image attacks follow the crop"


def test_the_answer_to_a_picture_of_a_random_model_is_that_to_most_draws() -> None:
    toy, draws = Toy(), outputs(40, 11)
    said = [toy.text_of(row) for row in toy.greedy(draws.view(40, *toy.shape)).tolist()]
    first = next(row for row in range(40) if said[row] != said[0])
    usual = draws[[first, 0, 0]]
    goal = Match(toy, usual, "cat.png")
    assert toy.text_of(goal.ids.tolist()) == said[0]
    assert torch.allclose(goal.target[0].flatten(), usual.mean(0))
    with pytest.raises(UserError, match=r"different things of 'cat.png', the most frequent in 1 of 2 draws"):
        Match(toy, draws[[0, first]], "cat.png")


@pytest.mark.parametrize("way", ["tokens", "pooled", "prototypes"])
def test_ways_away_lower_their_own_cosine(way: str) -> None:
    toy, label = Toy(), torch.zeros(8, dtype=torch.long)
    clean, goal = outputs(8, 6), Unsay(Toy(), ("dog",), way=way)
    case = Case(label, None, goal.reference(clean, label))
    moved, shape = outputs(8, 7), (8, *toy.shape)
    loss, near = goal.loss(moved, objective("ce"), case), goal.cosine(moved, case)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pooled": pooled_cosine, "tokens": token_cosine}
    if way == "prototypes":
        assert torch.allclose(loss, anchored(moved.view(shape), clean.view(shape), toy.anchors()))
    else:
        assert torch.allclose(loss, -ways[way](moved.view(shape), clean.view(shape)))
    assert near is not None
    here = goal.cosine(clean, case)
    assert here is not None
    assert (near < here - 1e-3).all()


def test_goals_are_read_from_their_texts(tmp_path: Path) -> None:
    toy = Toy()
    known = Known("m", ("dog",), speech=toy, tokens_of=lambda name: _tokens_of(name, tmp_path))
    (tmp_path / "cat.png").touch()
    specs = ["match:cat.png", "match:foa:cat.png", "unsay:pooled", "unsay:prototypes", "unsay:features", "unsay"]
    assert [read_goals(text, known)[0].spec for text in specs] == specs
    for text, said in (
        ("match:fao:cat.png", "unknown way 'fao' to a picture: did you mean 'foa'"),
        ("match:dog.png", "no picture at 'dog.png'"),
        ("match:foa:", "names no picture"),
        ("unsay:prototype", "did you mean 'unsay:prototypes'"),
        ("match", "pass match:FILE.png or match:pooled:FILE.png"),
    ):
        with pytest.raises(UserError, match=said):
            read_goals(text, known)


def _tokens_of(name: str, folder: Path) -> Tensor:
    if not (folder / name).exists():
        raise UserError(f"no picture at '{name}' to aim at")
    return F.normalize(outputs(1, 3)[0].view(LENGTH, len(WORDS)), dim=1).flatten()
