"""AdaNeg: what it remembers, what its score is by hand, and that judging changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detect_clouds import CLASSES, Clouds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustvlm.detect import AdaNeg, Head, NegLabel
from robustvlm.detect.metrics import all_metrics
from robustvlm.detect.words import mean_log_odds
from robustvlm.errors import UserError

AXES = torch.eye(4, dtype=torch.float64)
SMALL = AdaNeg(NegLabel(Head(AXES[:2], 5.0), AXES[2:]), length=3)


def unit(*values: float) -> Tensor:
    return F.normalize(torch.tensor([values], dtype=torch.float64), dim=1)


def by_hand(detector: AdaNeg, z: Tensor) -> float:
    """Return the score of one image as the paper writes it, one row at a time, in shares and not in logarithms."""
    assert detector.memory is not None
    proxies = []
    for row in detector.memory:
        members = [member for member in row if member.any()]
        weights = [math.exp(-detector.sharpness * (1 - float(member @ z))) for member in members]
        proxies.append(F.normalize(sum(w * m for w, m in zip(weights, members, strict=True)), dim=0))  # type: ignore[arg-type]
    head, known = detector.texts.head, len(detector.texts.head.class_embeddings)

    def share(rows: Tensor) -> float:
        values = (head.logit_scale * rows @ z).exp()
        return float(values[:known].sum() / values.sum())

    mixed = (share(torch.stack(proxies)) + detector.weight * share(detector.texts.texts)) / (1 + detector.weight)
    return math.log(mixed / (1 - mixed))


@pytest.mark.parametrize("sharpness", [0.0, 5.5])
@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_score_by_hand(sharpness: float, weight: float) -> None:
    stream = torch.cat([unit(0.1, 0, 1, 0.2), unit(0, 0.2, 0.9, 0), unit(1, 0.1, 0, 0), unit(0, 0, 0.2, 1)])
    empty = AdaNeg(SMALL.texts, length=4, sharpness=sharpness, weight=weight)
    taught = empty.remember(stream)
    assert taught.remembered == 4
    for z in (unit(0.3, 0.1, 0.6, 0.2), unit(1, 0, 0.4, 0), unit(0.1, 0.2, 0.3, 0.4)):
        assert float(taught.score(z)) == pytest.approx(by_hand(taught, z[0]), rel=1e-9)


def test_with_nothing_remembered_it_is_neglabel(clouds: Clouds) -> None:
    texts = NegLabel(clouds.head, clouds.words, n_groups=3)
    empty = AdaNeg(texts)
    for detector in (empty, empty.remember(clouds.unknown[:0])):
        assert detector.remembered == 0
        assert torch.allclose(detector.score(clouds.known), texts.score(clouds.known), atol=1e-10)


def test_sure_images_join_the_row_of_their_nearest_text_and_unsure_ones_none() -> None:
    stream = torch.cat([unit(1, 0.1, 0, 0), unit(0, 0.1, 0, 1), unit(1, 0, 1, 0)])
    found = SMALL.remember(stream).memory
    assert found is not None
    assert torch.equal(found[:, 0], AXES)
    assert torch.equal(found[0, 1], stream[0])
    assert torch.equal(found[3, 1], stream[1])
    assert not found[[1, 2], 1:].any()
    assert not found[:, 2].any()


def test_a_full_row_lets_the_least_sure_image_go_and_never_its_text() -> None:
    aside = [unit(0, 0, 1, x) for x in (0.5, 0.3, 0.4, 0.1)]
    found = SMALL.remember(torch.cat(aside)).memory
    assert found is not None
    assert torch.equal(found[2, 0], AXES[2])
    assert {tuple(row.tolist()) for row in found[2, 1:]} == {tuple(aside[i][0].tolist()) for i in (1, 3)}


def test_remembering_in_parts_is_remembering_at_once_and_judging_changes_nothing(clouds: Clouds) -> None:
    empty = AdaNeg(NegLabel(clouds.head, clouds.words))
    at_once = empty.remember(clouds.stream)
    parts = empty
    for part in clouds.stream.split(7):
        parts = parts.remember(part)
    assert at_once.remembered > 10
    before = at_once.score(clouds.unknown)
    assert torch.equal(parts.score(clouds.unknown), before)
    at_once.score(clouds.stream)
    assert torch.equal(at_once.score(clouds.unknown), before)
    assert torch.equal(
        torch.cat([at_once.score(row[None]) for row in clouds.unknown]).round(decimals=9), before.round(decimals=9)
    )
    assert empty.memory is None


def simulated(gap: float, seed: int = 0) -> tuple[NegLabel, Tensor, Tensor, Tensor]:
    """Return NegLabel on noisy texts, and images of known and unknown things and a stream of both, with known truth.

    Images and texts lie apart by `gap` along one direction, as those of CLIP do; words name half of the unknown things
    badly and none of the rest.
    """
    draws = torch.Generator().manual_seed(seed)
    dim, things = 64, 20

    def noise(rows: int, size: float) -> Tensor:
        return size / dim**0.5 * torch.randn(rows, dim, generator=draws, dtype=torch.float64)

    centres, apart = F.normalize(noise(2 * things, 1.0), dim=1), F.normalize(noise(1, 1.0), dim=1)

    def texts(rows: Tensor) -> Tensor:
        return F.normalize(rows + noise(len(rows), 1.5) - gap / 2 * apart, dim=1)

    def images(rows: Tensor, each: int) -> Tensor:
        return F.normalize(rows.repeat(each, 1) + noise(each * len(rows), 0.6) + gap / 2 * apart, dim=1)

    known, strange = centres[:things], centres[things:]
    words = torch.cat([F.normalize(strange[::2] + noise(things // 2, 1.2), dim=1), F.normalize(noise(60, 1.0), dim=1)])
    stream = torch.cat([images(known, 8), images(strange, 8)])
    order = torch.randperm(len(stream), generator=draws)
    return NegLabel(Head(texts(known), 40.0), texts(words)), images(known, 10), images(strange, 10), stream[order]


@pytest.mark.parametrize("seed", range(3))
def test_where_images_lie_apart_from_texts_the_stream_tells_more_than_the_words(seed: int) -> None:
    texts, known, strange, stream = simulated(2.0, seed)
    taught = AdaNeg(texts).remember(stream)
    found = [(one.score(known).numpy(), one.score(strange).numpy()) for one in (texts, taught)]
    before, after = (all_metrics(*scores).auroc[0] for scores in found)
    assert before > 0.8
    assert after > before + 0.01


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.02, 0.98), st.floats(0.05, 20.0)), min_size=1, max_size=5))
def test_mean_log_odds_are_those_of_the_weighted_mean(pairs: list[tuple[float, float]]) -> None:
    shares, weights = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in (0, 1))
    mean = float((shares * weights).sum() / weights.sum())
    found = mean_log_odds(shares.logit()[:, None], weights)
    assert float(found) == pytest.approx(math.log(mean / (1 - mean)), rel=1e-9, abs=1e-9)


def test_the_score_has_a_true_gradient(clouds: Clouds) -> None:
    taught = AdaNeg(NegLabel(clouds.head, clouds.words)).remember(clouds.stream)
    assert torch.autograd.gradcheck(taught.score, (clouds.unknown[:3].clone().requires_grad_(),))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 1}, "length at least 2, got 1"),
        ({"gap": 1.5}, "gap of AdaNeg must be in"),
        ({"middle": math.nan}, "middle of AdaNeg must be in"),
        ({"weight": 0.0}, "a weight above 0"),
        ({"sharpness": math.inf}, "a sharpness of at least 0"),
    ],
)
def test_bad_settings_are_said(options: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AdaNeg(SMALL.texts, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [torch.zeros(2, 3), torch.full((1, 4), math.nan), torch.zeros(4)])
def test_bad_streams_are_said(stream: Tensor) -> None:
    with pytest.raises(UserError, match="a stream is finite features"):
        SMALL.remember(stream)


def test_classes_are_the_first_rows(clouds: Clouds) -> None:
    taught = AdaNeg(NegLabel(clouds.head, clouds.words)).remember(clouds.known)
    assert taught.memory is not None
    assert torch.equal(taught.memory[:CLASSES, 0], clouds.head.class_embeddings)
