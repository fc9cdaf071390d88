"""The two stages' losses against closed forms and a second implementation; where gradients go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustvlm.attacks import ThreatModel
from robustvlm.defenses.finetune import InnerAttack
from robustvlm.defenses.purify import NoiseLevels
from robustvlm.defenses.purify.parts import Mapper, MapperShape
from robustvlm.defenses.purify.train import (
    MapperTask,
    MapperWeights,
    PurifierTask,
    PurifierWeights,
    mapper_terms,
    purifier_terms,
    scores,
    weighted,
)
from robustvlm.defenses.purify.unet import Purifier, PurifierShape
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.stats import Mean
from robustvlm.training import Draws


class Linear(VLM):
    """A linear encoder of 4-pixel images."""

    def __init__(self) -> None:
        super().__init__(spec="linear", image_size=4, logit_scale=10.0)
        torch.manual_seed(3)
        self.layer = nn.Linear(48, 6)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.layer(pixels.flatten(1))

    def _text_features(self, texts: list[str]) -> Tensor:
        return torch.eye(6)[: len(texts)]


def unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=1)


def test_terms_of_stage_one_agree_with_a_second_implementation() -> None:
    rng = np.random.default_rng(0)
    estimate, clean = rng.random((2, 5, 3, 4, 4))
    sigma, features, targets = rng.uniform(0.1, 1, 5), rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    found = purifier_terms(*map(torch.tensor, (estimate, clean, sigma, features, targets)))
    squares = ((estimate - clean) ** 2).reshape(5, -1).mean(1)
    cosine = (features * targets).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(targets, axis=1)
    assert found["pixel"].item() == pytest.approx(squares.mean(), rel=1e-5)
    assert found["diffusion"].item() == pytest.approx((squares * (1 / sigma**2 + 1 / 0.25**2)).mean(), rel=1e-5)
    assert found["feature"].item() == pytest.approx(1 - cosine.mean(), rel=1e-5)


def test_terms_of_stage_two_agree_with_a_second_implementation() -> None:
    rng = np.random.default_rng(1)
    mapped, clean = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 9, 4)))
    found = mapper_terms(torch.tensor(mapped), torch.tensor(clean))
    statistics = ((mapped.mean(0) - clean.mean(0)) ** 2).sum() + ((mapped.std(0) - clean.std(0)) ** 2).sum()
    assert found["similarity"].item() == pytest.approx(1 - (mapped * clean).sum(1).mean(), rel=1e-5)
    assert found["statistics"].item() == pytest.approx(statistics, rel=1e-4)


def test_statistics_object_to_features_that_are_all_alike() -> None:
    clean = unit(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    alike = unit(clean.mean(dim=0, keepdim=True)).expand(64, 8).requires_grad_()
    terms = mapper_terms(alike, clean)
    assert terms["statistics"].item() > 0.5
    terms["statistics"].backward()
    assert alike.grad is not None
    assert alike.grad.isfinite().all()


def test_the_loss_is_the_weighted_sum_of_the_terms() -> None:
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(5.0)}
    assert weighted(terms, {"a": 3.0, "b": 0.1}) == {"loss": torch.tensor(6.5), **terms}


def test_gradients_reach_the_purifier_and_nothing_else() -> None:
    encoder, purifier = Linear(), Purifier(PurifierShape(widths=(8,), embedding=8))
    task = PurifierTask(purifier, encoder, NoiseLevels((0.25,)), PurifierWeights(), torch.rand(2, 3, 4, 4))
    pixels = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    terms = task.losses(pixels, torch.full((6,), -1), 0, Draws(0, 0, [str(i) for i in range(6)]))
    terms["feature"].backward()
    assert purifier.head.weight.grad is not None
    assert purifier.head.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert terms["loss"].item() == pytest.approx(
        sum(terms[k].item() for k in ("diffusion", "feature", "pixel")), rel=1e-5
    )


def _attacked(steps: int, eps: float = 0.1, text: float = 2.0) -> PurifierTask:
    torch.manual_seed(0)
    encoder, purifier = Linear(), Purifier(PurifierShape(widths=(8,), embedding=8))
    attack = InnerAttack(threat=ThreatModel("Linf", eps), steps=steps) if steps else None
    weights, held_out = PurifierWeights(text=text), torch.rand(2, 3, 4, 4)
    return PurifierTask(
        purifier, encoder, NoiseLevels((0.1,)), weights, held_out, texts=torch.eye(6)[:3], attack=attack
    )


def _terms(task: PurifierTask) -> dict[str, float]:
    pixels = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    terms = task.losses(pixels, torch.full((6,), -1), 0, Draws(0, 0, [str(i) for i in range(6)]))
    return {name: term.item() for name, term in terms.items()}


def test_the_term_of_the_texts_agrees_with_a_second_implementation() -> None:
    task = _attacked(steps=0)
    features, clean = (unit(torch.randn(5, 6, generator=torch.Generator().manual_seed(i))) for i in (0, 1))
    logits = [10 * z.double().numpy()[:, :3] for z in (clean, features)]
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in logits)
    expected = (p * np.log(p / q)).sum(1)
    assert task._texts_apart(features, clean).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert "text" not in _terms(_attacked(steps=0, text=0.0))
    found = _terms(task)
    assert found["loss"] == pytest.approx(
        sum(found[k] for k in ("diffusion", "feature", "pixel")) + 2 * found["text"], rel=1e-5
    )


def test_the_attack_raises_what_the_purifier_is_to_keep_down() -> None:
    without, one, more = (_terms(_attacked(steps)) for steps in (0, 1, 5))
    gaps = [found["feature"] + 2 * found["text"] for found in (without, one, more)]
    assert gaps[0] < gaps[1] < gaps[2]
    nearly = _terms(_attacked(steps=5, eps=1e-7))
    assert nearly == pytest.approx(without, rel=1e-3), "an attack without room changes nothing"


@pytest.mark.parametrize("task", [_attacked(steps=2), None])
def test_stage_one_does_not_depend_on_how_the_batch_is_cut(task: PurifierTask | None) -> None:
    encoder, purifier = Linear(), Purifier(PurifierShape(widths=(8,), embedding=8))
    task = task or PurifierTask(purifier, encoder, NoiseLevels((0.1, 0.5)), PurifierWeights(), torch.rand(2, 3, 4, 4))
    pixels, ids = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)), list("abcd")
    labels = torch.zeros(4, dtype=torch.int64)
    whole = task.losses(pixels, labels, 3, Draws(0, 3, ids))["loss"]
    parts = [task.losses(pixels[i : i + 2], labels[:2], 3, Draws(0, 3, ids[i : i + 2]))["loss"] for i in (0, 2)]
    assert whole.item() == pytest.approx((parts[0] + parts[1]).item() / 2, rel=1e-5)
    assert whole.item() != task.losses(pixels, labels, 4, Draws(0, 4, ids))["loss"].item()


def test_stage_two_trains_the_mapper_towards_clean_features() -> None:
    torch.manual_seed(0)
    encoder, mapper = Linear(), Mapper(MapperShape(dim=6, embedding=8))
    levels = NoiseLevels((0.5,))
    held_out = torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    task = MapperTask(mapper, encoder, encoder, levels, MapperWeights(), held_out)
    optimizer = torch.optim.Adam(mapper.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    before = task.validate()["score at 0.5"]
    for step in range(150):
        pixels = torch.rand(32, 3, 4, 4, generator=generator)
        optimizer.zero_grad()
        terms = task.losses(pixels, torch.zeros(32), step, Draws(0, step, [str(i) for i in range(32)]))
        terms["loss"].backward()
        optimizer.step()
    after = task.validate()["score at 0.5"]
    assert after.low > before.high  # type: ignore[union-attr, operator]
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_score_is_that_of_the_definition() -> None:
    encoder, pixels = Linear(), torch.rand(70, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = scores(encoder, pixels, NoiseLevels((1e-6, 0.5)), draws=40)
    assert found["score at 1e-06"].value == pytest.approx(1, abs=1e-5)  # type: ignore[union-attr]
    with torch.no_grad():
        noise = torch.randn(200, 70, 3, 4, 4, generator=torch.Generator().manual_seed(9))
        features = torch.stack([encoder.encode_image(pixels + 0.5 * e) for e in noise])
        expected = (0.5 * (1 + (features * encoder.encode_image(pixels)).sum(-1))).mean().item()
    assert found["score at 0.5"].value == pytest.approx(expected, abs=0.01)  # type: ignore[union-attr]


def test_copies_count_once_in_the_interval_of_a_score() -> None:
    pixels = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0)
    alone, once = (scores(Linear(), pixels, NoiseLevels((0.5,)), worth=worth)["score at 0.5"] for worth in (None, 5.0))
    assert isinstance(alone, Mean)
    assert isinstance(once, Mean)
    assert alone.value == once.value
    assert once.high - once.low > 2 * (alone.high - alone.low)  # type: ignore[operator]


def test_half_of_the_levels_are_those_given_and_all_are_in_range() -> None:
    levels = NoiseLevels.of([0.5, 0.12, 0.5])
    assert levels.given == (0.12, 0.5)
    drawn = levels.at(torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)))
    assert drawn.min() >= 0.06
    assert drawn.max() <= 0.5
    exact = (drawn == torch.tensor(0.12)).double().mean() + (drawn == torch.tensor(0.5)).double().mean()
    assert exact.item() == pytest.approx(0.5, abs=0.03)
    between = drawn[(drawn != torch.tensor(0.12)) & (drawn != torch.tensor(0.5))].log()
    middle = 0.5 * (math.log(0.06) + math.log(0.5))
    assert between.mean().item() == pytest.approx(middle, abs=0.03)


@pytest.mark.parametrize(
    ("given", "words"),
    [((), "pass --sigma"), ((0.0,), "above 0"), ((0.2, 11.0), "got 11"), ((math.nan,), "nan")],
)
def test_levels_that_make_no_sense_are_refused(given: tuple[float, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        NoiseLevels.of(given)
