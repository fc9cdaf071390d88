"""KR-NFT: NegLabel before it has learnt, score and loss by hand, what learns and what stays, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detect_clouds import CLASSES, DIM, Clouds
from torch import Tensor

from robustvlm.detect import KRNFT, Head, NegLabel, make_scores
from robustvlm.detect.base import NotFitted
from robustvlm.detect.krnft import TextMap, split_crops
from robustvlm.detect.metrics import all_metrics
from robustvlm.errors import UserError


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shared(clouds: Clouds) -> Tensor:
    """Return the direction of a thing that all images share, nearer to a class than to any word."""
    return F.normalize(F.normalize(drawn(DIM, seed=5), dim=0) + 0.8 * clouds.head.class_embeddings[0], dim=0)


def cropped(clouds: Clouds, count: int = 8) -> Tensor:
    """Return crops [N, C, D] of some images to learn from: half still show the class, half what all images share."""
    some = clouds.fit[::5, None]
    still = some + 0.05 * drawn(len(some), count, DIM, seed=6)
    gone = shared(clouds) + 0.1 * drawn(len(some), count, DIM, seed=7)
    where = torch.arange(count) % 2 == 0
    return F.normalize(torch.where(where[None, :, None], still, gone), dim=2)


def some_map(hidden: int) -> TextMap:
    """Return a map that is nowhere the identity."""
    parts = TextMap.identity(DIM, hidden=hidden, seed=3).parts
    return TextMap(*(part.double() + 0.2 * drawn(*part.shape, seed=k) for k, part in enumerate(parts)))


def mapped(at: TextMap, texts: NegLabel, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return class and negative texts mapped for one image [D], text by text as the paper writes it."""
    factors = []
    for kind in range(4):
        hidden = (at.inner[kind] @ image + at.inner_bias[kind]).relu()
        factors.append(at.base[kind] + at.outer[kind] @ hidden + at.outer_bias[kind])
    known = [F.normalize(factors[0] * text + factors[2], dim=0) for text in texts.head.class_embeddings]
    others = [F.normalize(factors[1] * text + factors[3], dim=0) for text in texts.negatives]
    return torch.stack(known), torch.stack(others)


# ---- closed cases


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("hidden", [0, 6])
def test_before_it_learns_it_is_neglabel_in_groups(clouds: Clouds, groups: int, hidden: int) -> None:
    texts = NegLabel(clouds.head, clouds.words, n_groups=groups)
    fitted = KRNFT(texts, epochs=0, hidden=hidden).fit_crops(cropped(clouds), clouds.labels[::5])
    for part in (clouds.known, clouds.unknown):
        assert torch.allclose(fitted.predict(part), texts.predict(part), rtol=0, atol=1e-12)
        assert torch.allclose(fitted.logits(part), clouds.head.logits(part), rtol=0, atol=1e-12)


@pytest.mark.parametrize("hidden", [0, 6])
def test_score_by_hand(clouds: Clouds, hidden: int) -> None:
    texts = NegLabel(clouds.head, clouds.words, n_groups=4)
    fitted = KRNFT(texts, map=some_map(hidden))
    for image in clouds.unknown[:5]:
        known, others = mapped(some_map(hidden), texts, image)
        shares = []
        for group in range(4):
            logits = texts.head.logit_scale * torch.cat([known, others[group::4]]) @ image
            shares.append(float(logits.softmax(0)[:CLASSES].sum()))
        mean = sum(shares) / 4
        assert float(fitted.score(image[None])) == pytest.approx(math.log(mean / (1 - mean)), rel=1e-9)


def test_loss_by_hand(clouds: Clouds) -> None:
    """Cross-entropies over classes and each group together, one image, crop and group at a time."""
    texts, at = NegLabel(clouds.head, clouds.words, n_groups=3), some_map(6)
    crops, labels = cropped(clouds)[:4], clouds.labels[::5][:4]
    near, far, kept = [], [], []
    for image, label in zip(crops, labels.tolist(), strict=True):
        order = (image @ clouds.head.class_embeddings[label]).argsort(descending=True)
        best = image[order[0]]
        known, others = mapped(at, texts, best)
        every = torch.cat([clouds.head.class_embeddings, clouds.words])
        kept.append(F.cosine_similarity(torch.cat([known, others]), every).mean())
        for group in range(3):
            both = texts.head.logit_scale * torch.cat([known, others[group::3]])
            near += [F.cross_entropy((both @ crop)[None], torch.tensor([label])) for crop in image[order[:2]]]
            far += [(both @ crop).softmax(0)[:CLASSES].sum().log() for crop in image[order[-2:]]]
    expected = torch.stack(near).mean() + 0.3 * torch.stack(far).mean() + 10 * (1 - torch.stack(kept).mean())
    terms = KRNFT(texts, negative_weight=0.3).terms(crops, labels, at)
    assert float(terms["loss"]) == pytest.approx(float(expected), rel=1e-9)
    assert float(terms["far"]) == pytest.approx(float(torch.stack(far).mean()), rel=1e-9)


def test_the_nearest_quarter_of_the_crops_is_near_and_the_farthest_far() -> None:
    crops = torch.eye(8)[None]
    text = torch.arange(8.0)[None]
    near, far = split_crops(crops, text)
    assert near[0].argmax(dim=1).tolist() == [7, 6]
    assert far[0].argmax(dim=1).tolist() == [1, 0]
    one, none = split_crops(crops[:, :1], text)
    assert torch.equal(one, crops[:, :1])
    assert none.shape == (1, 0, 8)
    for count in range(2, 12):  # never the same crop on both sides
        near, far = split_crops(F.normalize(drawn(1, count, 5), dim=2), drawn(1, 5, seed=1))
        assert near.shape[1] == far.shape[1] == max(1, count // 4)
        assert not (near[:, :, None] == far[:, None]).all(dim=3).any()


# ---- what learns


def test_the_gradient_reaches_the_map_and_nothing_else(clouds: Clouds) -> None:
    head = Head(clouds.head.class_embeddings.clone(), 20.0)
    texts = NegLabel(head, clouds.words.clone())
    crops = cropped(clouds)
    before = [part.clone() for part in (head.class_embeddings, texts.negatives, crops)]
    state = torch.random.get_rng_state()
    with torch.no_grad():  # as a caller may have it
        fitted = KRNFT(texts, epochs=2).fit_crops(crops, clouds.labels[::5])
    assert torch.equal(torch.random.get_rng_state(), state)
    for part, was in zip((head.class_embeddings, texts.negatives, crops), before, strict=True):
        assert torch.equal(part, was)
        assert part.grad is None
        assert not part.requires_grad
    assert fitted.map is not None
    for part, start in zip(fitted.map.parts, TextMap.identity(DIM, hidden=64, seed=0).parts, strict=True):
        assert not torch.equal(part, start.double())
        assert not part.requires_grad
    assert fitted.texts is texts


def test_far_crops_teach_what_is_unknown(clouds: Clouds) -> None:
    """Of a thing that is in the background of all images the share falls, of the classes it does not."""
    texts = NegLabel(clouds.head, clouds.words)
    strange = F.normalize(shared(clouds) + 0.1 * drawn(60, DIM, seed=9), dim=1)
    fitted = KRNFT(texts, lr=0.01, epochs=20, negative_weight=0.3).fit_crops(cropped(clouds), clouds.labels[::5])
    without = replace(fitted, negative_weight=0.0).fit_crops(cropped(clouds), clouds.labels[::5])
    area = {
        name: all_metrics(score.predict(clouds.known).numpy(), score.predict(strange).numpy()).auroc[0]
        for name, score in (("texts", texts), ("both", fitted), ("near alone", without))
    }
    assert area["both"] > max(area["near alone"], area["texts"]) + 0.02, area
    assert (fitted.logits(clouds.known).argmax(1) == torch.arange(CLASSES).repeat(12)).double().mean() > 0.95


def test_knowledge_keeps_the_texts_where_they_were(clouds: Clouds) -> None:
    texts, crops, labels = NegLabel(clouds.head, clouds.words), cropped(clouds), clouds.labels[::5]
    lost = []
    for weight in (0.0, 1000.0):
        fitted = KRNFT(texts, knowledge_weight=weight, lr=0.003, epochs=5).fit_crops(crops, labels)
        assert fitted.map is not None
        lost.append(float(fitted.terms(crops, labels, fitted.map)["kept"]))
    assert lost[0] > 2 * lost[1]


def test_it_repeats_by_seed(clouds: Clouds) -> None:
    texts = NegLabel(clouds.head, clouds.words)
    first, again, other = (
        KRNFT(texts, seed=seed, epochs=2).fit(clouds.fit[::5], clouds.labels[::5]).predict(clouds.known)
        for seed in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_image_s_score_is_its_own_and_has_a_slope(clouds: Clouds) -> None:
    fitted = KRNFT(NegLabel(clouds.head, clouds.words), epochs=2).fit(clouds.fit[::5], clouds.labels[::5])
    together = fitted.predict(clouds.unknown)
    alone = torch.cat([fitted.predict(row[None]) for row in clouds.unknown])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    z = clouds.unknown[:3].clone().requires_grad_()
    fitted.score(z).sum().backward()
    assert z.grad is not None
    assert torch.autograd.gradcheck(fitted.score, (clouds.unknown[:2].clone().requires_grad_(),))


def test_the_catalogue_learns_from_crops_where_there_are_any(clouds: Clouds) -> None:
    some = replace(clouds.supplies, features=clouds.fit[::5], labels=clouds.labels[::5])
    whole, _ = make_scores(["krnft"], some)
    crops, _ = make_scores(["krnft"], replace(some, crops=(cropped(clouds), clouds.labels[::5])))
    by_hand = KRNFT(crops["krnft"].texts).fit_crops(cropped(clouds), clouds.labels[::5])  # type: ignore[attr-defined]
    assert torch.equal(crops["krnft"].predict(clouds.known), by_hand.predict(clouds.known))
    assert not torch.equal(whole["krnft"].predict(clouds.known), by_hand.predict(clouds.known))


# ---- errors


def test_it_wants_labels_and_what_fits(clouds: Clouds) -> None:
    empty = KRNFT(NegLabel(clouds.head, clouds.words))
    with pytest.raises(NotFitted, match=r"call fit\(features, labels\)"):
        empty.score(clouds.known)
    with pytest.raises(UserError, match=r"labels are missing: pass fit\(features, labels\)"):
        empty.fit(clouds.fit)
    with pytest.raises(UserError, match="labels go up to 7, and the head has 5 classes"):
        empty.fit(clouds.fit, torch.full_like(clouds.labels, 7))
    with pytest.raises(UserError, match="labels below 0"):
        empty.fit(clouds.fit, clouds.labels - 1)
    with pytest.raises(UserError, match=r"crops of images are features \[N, at least 1, D\]"):
        empty.fit_crops(clouds.fit, clouds.labels)
    with pytest.raises(UserError, match="crops have 3 dimensions, the class embeddings 16"):
        empty.fit_crops(torch.rand(2, 4, 3), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="NaN or infinite"):
        empty.fit_crops(torch.full((2, 4, DIM), math.nan), torch.tensor([0, 1]))
    with pytest.raises(UserError, match=r"the loss of KR-NFT is .* pass a smaller lr"):
        replace(empty, lr=1e200, epochs=5).fit(clouds.fit, clouds.labels)
    made, skipped = make_scores(["krnft"], replace(clouds.supplies, features=None, labels=None))
    assert not made
    assert "pass --fit DATA" in skipped[0].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs of KR-NFT must be at least 0, got -1"),
        ({"hidden": -1}, "hidden of KR-NFT must be at least 0"),
        ({"batch_size": 0}, "batch_size of KR-NFT must be at least 1"),
        ({"negative_weight": math.nan}, "negative_weight of KR-NFT must be at least 0"),
        ({"knowledge_weight": -1.0}, "knowledge_weight of KR-NFT must be at least 0"),
        ({"lr": 0.0}, "lr of KR-NFT must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(clouds: Clouds, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KRNFT(NegLabel(clouds.head, clouds.words), **options)  # type: ignore[arg-type]
