"""SDM and promised answers: closed forms, second implementations, and promises kept where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detect_clouds import CLASSES, Clouds
from torch import Tensor

from robustvlm.detect import MSP, SDM, Promise, promise
from robustvlm.errors import UserError


@pytest.fixture(scope="module")
def fitted(clouds: Clouds) -> SDM:
    return SDM(clouds.head).fit_features(clouds.fit, clouds.labels)


def by_hand(detector: SDM, fit: Tensor, labels: Tensor, z: Tensor) -> Tensor:
    """Return sdm(z) of one image as the paper writes it, with loops."""
    head = detector.head
    own = head.logits(fit).gather(1, labels[:, None]).flatten().tolist()
    classes = [(labels == label).nonzero().flatten().tolist() for label in labels.unique()]
    first = [i for rows in classes for i in sorted(rows, key=lambda i: -own[i])[::2]]
    support, kept = fit[first], labels[first]
    told = head.logits(support).argmax(1) == kept

    def met(x: Tensor) -> tuple[int, float]:
        said = int(head.logits(x[None]).argmax())
        order = (support - x).norm(dim=1).argsort().tolist()
        run = 0
        for i in order:
            if not (bool(told[i]) and int(kept[i]) == said):
                break
            run += 1
        return run, float((support - x).norm(dim=1).min())

    rest = [i for i in range(len(fit)) if i not in set(first)]
    distances = {
        k: [met(fit[i])[1] for i in rest if int(labels[i]) == k and met(fit[i])[0] > 0] for k in range(CLASSES)
    }
    run, nearest = met(z)
    said = int(head.logits(z[None]).argmax())
    share = {}
    for k, found in distances.items():
        knots, n = sorted(found), len(found)
        inside = float(np.interp(nearest, [0.0, *knots], [1 - i / (n + 1) for i in range(n + 1)]))
        share[k] = inside if nearest <= knots[-1] else math.exp(1 - nearest / knots[-1]) / (n + 1)
    d = min(share.values()) if detector.strict else share[said]
    return ((2.0 + run) ** (d * (head.logits(z[None]) - head.logits(z[None]).max()))).squeeze(0)


@pytest.mark.parametrize("strict", [False, True])
def test_sdm_by_hand(clouds: Clouds, strict: bool) -> None:
    detector = SDM(clouds.head, strict=strict).fit_features(clouds.fit, clouds.labels)
    for z in (*clouds.known[::17], *clouds.unknown[::23]):
        expected = by_hand(detector, clouds.fit, clouds.labels, z)
        found = detector.activations(z[None]).softmax(1).squeeze(0)
        assert torch.allclose(found, expected / expected.sum(), atol=1e-9)


def test_sdm_is_msp_where_similarity_and_distance_say_nothing(clouds: Clouds, fitted: SDM) -> None:
    class Plain(SDM):
        def neighbours(self, features: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
            del said
            return torch.full((len(features),), math.e - 2, dtype=features.dtype), torch.zeros(len(features)).to(
                features
            )

    plain = Plain(
        clouds.head, support=fitted.support, agrees=fitted.agrees, farther=fitted.farther, calibrated=fitted.calibrated
    )
    assert torch.allclose(plain.score(clouds.known), MSP(clouds.head).score(clouds.known), atol=1e-9)


def test_far_images_and_those_among_other_classes_are_less_sure(clouds: Clouds, fitted: SDM) -> None:
    far = F.normalize(-clouds.head.class_embeddings.sum(0, keepdim=True), dim=1)
    said = fitted.head.logits(far).argmax(1)
    assert 0 < float(fitted.nearness(fitted.neighbours(far, said)[1], said)) < 0.05
    assert float(fitted.score(far)) < float(fitted.score(clouds.known).median()) - 3
    wrong = (fitted.head.logits(clouds.known).argmax(1) + 1) % CLASSES
    assert fitted.neighbours(clouds.known, wrong)[0].double().mean() < 0.5


def test_sdm_refuses_what_it_cannot_learn_from(clouds: Clouds) -> None:
    with pytest.raises(UserError, match="at least 2 images of a class"):
        SDM(clouds.head).fit_features(clouds.fit[:1], clouds.labels[:1])
    with pytest.raises(UserError, match=f"the head has {CLASSES} classes"):
        SDM(clouds.head).fit_features(clouds.fit, clouds.labels + 1)


def drawn(draws: np.random.Generator, count: int, shape: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, predictions of two classes and hits; how often a score is right is known (`truly`)."""
    scores, said = draws.random(count), draws.integers(0, 2, count)
    return scores, said, draws.random(count) < rightness(scores, shape)


def rightness(scores: np.ndarray, shape: str) -> np.ndarray:
    if shape == "rising":
        return 0.5 + 0.5 * scores
    return np.where((scores > 0.8) | (scores < 0.5), 0.98, 0.7)  # good, bad, and good again


def truly(threshold: float, shape: str) -> float:
    grid = np.linspace(max(threshold, 0.0), 1, 4001)
    return float(rightness(grid, shape).mean())


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("shape", ["rising", "in between"])
def test_promises_are_kept_as_often_as_they_say(shape: str, looks: bool) -> None:
    """80 draws of 1,200 images at 90 %: promises are broken no more often than a 1 in 1,000 test of a tenth allows."""
    draws, broken, given = np.random.default_rng(0), 0, 0
    for _ in range(80):
        others = drawn(draws, 200, shape)[:2] if looks else None
        images = drawn(draws, 600 if looks else 1200, shape)
        found = promise(*images, level=0.9, confidence=0.9, looks=others).thresholds[0]
        given += found < math.inf
        broken += found < math.inf and truly(found, shape) < 0.9
    assert given >= 30
    assert broken <= 17  # the 0.999 quantile of 80 draws at 0.1


def test_a_class_that_cannot_be_promised_is_never_answered_and_the_others_are() -> None:
    draws = np.random.default_rng(1)
    scores, said = draws.random(4000), draws.integers(0, 3, 4000)
    right = draws.random(4000) < np.where(said == 2, 0.5, 0.99)
    found = promise(scores, said, right, level=0.9, classes=3)
    assert found.thresholds[2] == math.inf
    assert max(found.thresholds[:2]) < 0.3
    answered = found.answered(scores, said)
    assert not answered[said == 2].any()
    assert right[answered].mean() > 0.95


def test_few_images_promise_nothing_and_more_lower_the_threshold() -> None:
    least = math.ceil(math.log(0.05 / 4) / math.log(0.9))  # all right, and still no test can be rejected
    rows = np.linspace(1, 0, 2 * least - 1)
    assert promise(rows, np.zeros(len(rows)), np.ones(len(rows)), level=0.9).thresholds == (math.inf,)
    rows = np.linspace(1, 0, 400)
    assert promise(rows, np.zeros(400), np.ones(400), level=0.9).thresholds[0] < 0.01


def test_equal_scores_are_answered_together() -> None:
    scores = np.repeat([3.0, 2.0, 1.0], 200)
    right = np.repeat([True, True, False], 200)
    found = promise(scores, np.zeros(600), right, level=0.9)
    assert found.thresholds == (2.0,)
    assert found.answered(scores, np.zeros(600, dtype=int)).sum() == 400


def test_bad_promises_are_said() -> None:
    with pytest.raises(UserError, match=r"between 0 and 1, got 1 and 0\.95"):
        promise([1.0], [0], [True], level=1.0)
    with pytest.raises(UserError, match="of the same images"):
        promise([math.nan], [0], [True], level=0.9)
    with pytest.raises(UserError, match="of the same images"):
        promise([1.0, 2.0], [0], [True], level=0.9)
    assert Promise(0.9, 0.95, (math.inf,)).answered([1e9], [0]).tolist() == [False]


def test_an_infinite_score_is_no_answer_where_nothing_was_promised() -> None:
    told = Promise(0.9, 0.95, (0.5, math.inf)).answered([math.inf, math.inf], [0, 1])
    assert told.tolist() == [True, False]
