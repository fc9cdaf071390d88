"""LAPT: the loss by hand and in closed cases, that the two contexts learn and nothing else, and that it repeats."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.lapt import NegativePrompts, farthest_words, mixing, mixing_loss
from robustvlm.defenses.prompts import PromptLearner, TuneSettings, tune
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.zero_shot import class_embeddings

CLASSES, WORDS = ("apple", "dog", "hot dog"), ("sea", "winter", "engine", "music", "paper")
VLM = load_model("tiny")


def both(seed: int = 0) -> NegativePrompts:
    known, others = (PromptLearner(VLM, names, length=3, start="a picture of", seed=seed) for names in (CLASSES, WORDS))
    return NegativePrompts(known, others)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_loss_by_hand() -> None:
    z, texts, fixed, a, b = drawn(4, 6), drawn(5, 6, seed=1), drawn(5, 6, seed=2), 0.3, 0.8
    labels, words = torch.tensor([0, 1, 1, 0]), torch.tensor([4, 2, 3, 2])
    told, shared = [], []
    for image, label, word in zip(z, labels.tolist(), words.tolist(), strict=True):
        for point, at in ((F.normalize(a * image + (1 - a) * fixed[label], dim=0), label), (fixed[word], word)):
            told.append(-(10 * texts @ point).log_softmax(0)[at])
        point = (10 * texts @ F.normalize(b * image + (1 - b) * fixed[word], dim=0)).log_softmax(0)
        shared.append(-b * point[label] - (1 - b) * point[word])
    terms = mixing_loss(z, labels, words, texts=texts, fixed=fixed, scale=10.0, shares=(a, b))
    assert float(terms["cross_modal"]) == pytest.approx(float(torch.stack(told).mean()), rel=1e-5)
    assert float(terms["cross_distribution"]) == pytest.approx(float(torch.stack(shared).mean()), rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(float(torch.stack(told).mean() + torch.stack(shared).mean()), rel=1e-5)


def test_unmixed_it_is_the_cross_entropy_of_images_and_words() -> None:
    z, texts, fixed = drawn(4, 6), drawn(5, 6, seed=1), drawn(5, 6, seed=2)
    labels, words = torch.tensor([0, 1, 1, 0]), torch.tensor([4, 2, 3, 2])
    terms = mixing_loss(z, labels, words, texts=texts, fixed=fixed, scale=10.0, shares=(1.0, 1.0))
    images = F.cross_entropy(10 * z @ texts.T, labels)
    assert torch.allclose(terms["cross_distribution"], images)
    assert torch.allclose(terms["cross_modal"], (images + F.cross_entropy(10 * fixed[words] @ texts.T, words)) / 2)


def test_the_contexts_learn_and_nothing_else() -> None:
    learner = both()
    before = {name: value.clone() for name, value in VLM.state_dict().items()}
    fixed = class_embeddings(VLM, [*CLASSES, *WORDS], ["a picture of {}."]).clone()
    kept, contexts = fixed.clone(), [part.detach().clone() for part in learner.parameters()]
    features, labels = drawn(8, 192), torch.arange(8) % 3
    terms = mixing(learner, fixed, scale=VLM.logit_scale, seed=0)
    settings = TuneSettings(epochs=2, batch_size=4, weight=None)
    history = tune(learner, features, labels, scale=VLM.logit_scale, settings=settings, terms_of=terms)
    assert set(history[0]) == {"cross_modal", "cross_distribution", "loss"}
    assert history[1]["loss"] < math.inf
    assert len(contexts) == 2
    for part, was in zip(learner.parameters(), contexts, strict=True):
        assert not torch.equal(part, was)
    assert torch.equal(fixed, kept)
    assert not fixed.requires_grad
    for name, value in VLM.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in VLM.parameters())


def test_each_context_moves_its_own_texts() -> None:
    learner = both()
    start = learner().detach()
    with torch.no_grad():
        learner.negatives.context.copy_(drawn(3, learner.negatives.context.shape[1]))
    moved = learner().detach()
    assert torch.equal(moved[:3], start[:3])
    assert not torch.allclose(moved[3:], start[3:], atol=1e-3)


def test_it_repeats_by_seed_and_step() -> None:
    fixed, z, labels = drawn(8, 192, seed=3), drawn(6, 192), torch.arange(6) % 3
    first, again, later, other = (
        mixing(both(), fixed, scale=20.0, seed=seed)(z, labels, step)["loss"]
        for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)


def test_the_farthest_words_are_taken_and_none_is_refused() -> None:
    texts = class_embeddings(VLM, CLASSES, ["{}"])
    found = farthest_words(VLM, WORDS, ["{}"], texts)
    nearest = (class_embeddings(VLM, WORDS, ["{}"]) @ texts.T).amax(dim=1)
    assert found.words == (WORDS[int(nearest.argmin())],)
    with pytest.raises(UserError, match="LAPT needs words outside the classes"):
        farthest_words(VLM, (), ["{}"], texts)
