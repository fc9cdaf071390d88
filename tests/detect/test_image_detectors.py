"""Scores of images and of features agree, however the images come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robustvlm.data import open_data
from robustvlm.defenses import load_classifier
from robustvlm.detect import KNN, MCM, MSP, SCORES, Head, Supplies, head_of
from robustvlm.detect.base import FittedDetector, NotFitted
from robustvlm.errors import UserError
from robustvlm.models import VLM


class Plain(VLM):
    """An encoder of eight pixels, cheap and deterministic."""

    def __init__(self) -> None:
        super().__init__(spec="plain", image_size=4, logit_scale=10.0)
        self.register_buffer("weight", torch.randn(48, 8, generator=torch.Generator().manual_seed(3)))

    def _image_features(self, pixels: Tensor) -> Tensor:
        return (pixels - 0.5).flatten(1) @ self.weight

    def _text_features(self, texts: list[str]) -> Tensor:
        return torch.eye(8)[: len(texts)]


MODEL = Plain()
HEAD = Head(torch.eye(8)[:3], 10.0)
X, Y = torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(60) % 3
NEW = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(2))
WORDS = nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(4)), dim=1)


@pytest.mark.parametrize("name", list(SCORES))
def test_scores_of_images_are_those_of_their_features(name: str) -> None:
    with torch.no_grad():
        features, new = MODEL.encode_image(X), MODEL.encode_image(NEW)
    supplies = Supplies(HEAD, features=features, labels=Y, words=WORDS, stream=features, negatives=WORDS)
    made = SCORES[name].make(supplies)
    if isinstance(made, FittedDetector):
        of_features = made.fit(features, Y)
        of_images = made.fit(X, Y, model=MODEL)
        of_batches = made.fit(DataLoader(TensorDataset(X, Y), batch_size=7), model=MODEL)
        assert torch.allclose(of_batches.predict(NEW), of_images.predict(NEW), atol=1e-5)
    else:
        of_features, of_images = made, made.on(MODEL)
    wanted = of_features.predict(new)
    assert torch.equal(wanted, of_features.score(new))
    assert torch.allclose(of_images.predict(NEW), wanted, atol=1e-5)
    assert torch.allclose(of_images.predict(new), wanted, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(of_images(NEW), wanted, atol=1e-5)


def test_higher_is_more_in_distribution() -> None:
    knn = KNN(k=1).fit(X, Y, model=MODEL)
    assert float(knn.predict(X).min()) > float(knn.predict(1 - X).median())


def test_the_encoder_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 6)).train()
    knn = KNN(k=2).fit(X, Y, model=model)
    assert torch.equal(knn.predict(NEW), knn.predict(NEW))
    assert model.training
    assert model[1].training
    assert model[2].weight.requires_grad


def test_a_source_is_read_as_the_model_takes_images_and_a_classifier_brings_its_encoder() -> None:
    data = open_data("emoji?split=test&copies=1")
    classifier = load_classifier("tiny", data.class_names, data.templates)
    images, labels, ids = data.tensors(classifier.framing)
    assert ids == data.ids()
    assert classifier.vlm is not None
    by_source = KNN(k=3).fit(data, model=classifier)
    by_tensors = KNN(k=3).fit(images, labels, model=classifier.vlm)
    assert torch.equal(by_source.predict(images[:4]), by_tensors.predict(images[:4]))
    head = head_of(classifier)
    assert torch.equal(head.class_embeddings, classifier.class_embeddings)
    assert MSP(head).on(classifier).predict(images[:4]).shape == (4,)


def test_mistakes_are_one_line() -> None:
    for act, said in (
        (lambda: KNN().predict(torch.eye(2)), r"call fit\(features, labels\) first"),
        (lambda: KNN(k=1).fit(X, Y), r"pass model="),
        (lambda: KNN(k=1).fit(torch.eye(2)), "labels are missing"),
        (lambda: KNN(k=1).fit([], model=MODEL), "no image to learn from"),
        (lambda: MCM(HEAD).predict(X), r"take on\(model\)"),
        (lambda: MCM(HEAD).on(MODEL).fit(X, Y), "learns nothing"),
        (lambda: KNN(k=1).fit(open_data("emoji")), "pass model="),
    ):
        with pytest.raises(UserError, match=said):
            act()
    assert issubclass(NotFitted, UserError)
