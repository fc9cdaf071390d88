"""Classifiers behind one interface: what they return, when they refuse, and why some do not fit."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import robustvlm as rv
from robustvlm.defenses import load_classifier
from robustvlm.defenses.classifier import ZeroShot, acceptance
from robustvlm.defenses.own import OwnClassifier
from robustvlm.errors import UserError
from robustvlm.models import load_model, zero_shot

NAMES, TEMPLATES = ["apple", "dog", "car"], ["a drawing of {}"]
OWN = """
import torch
from torch import nn

class Net(nn.Module):
    image_size, interpolation = 8, "bilinear"

    def __init__(self, outputs=3):
        super().__init__()
        self.layer = nn.Linear(3, outputs)

    def forward(self, pixels):
        assert pixels.shape[-1] == 8
        return self.layer(pixels.mean((2, 3)))

ready = Net()

class Refusing(Net):
    can_reject = True

    def __init__(self):
        super().__init__(4)

class Plain:
    image_size = 8

    def forward(self, pixels):
        return pixels.mean((2, 3))

class Wide(Net):
    def __init__(self):
        super().__init__(5)

class NotFinite(Plain):
    def forward(self, pixels):
        return super().forward(pixels) * float("nan")

class Broken(Plain):
    def forward(self, pixels):
        raise ValueError("no such layer")

class Texts(Plain):
    def forward(self, pixels):
        return ["cat", "dog"]

class Named(Plain):
    class_names = ("dog", "car", "apple")

class Judging(Named):
    can_reject = True

    def forward(self, pixels):
        return torch.cat([super().forward(pixels), pixels.mean((1, 2, 3))[:, None]], 1)

    def surrogate(self, pixels):
        return self.forward(pixels)

class NamedInText(Plain):
    class_names = "dog"

class NamedTooFew(Plain):
    class_names = ("dog", "apple", "car", "cat")

class NoSize:
    def forward(self, pixels):
        return pixels.mean((2, 3))

class OddSize(Plain):
    image_size = 8.5

class OddInterpolation(Plain):
    interpolation = "bicubi"

class Nothing:
    image_size = 8
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classifiers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_classifiers", raising=False)


def load(spec: str) -> torch.nn.Module:
    return load_classifier(spec, NAMES, TEMPLATES, cache=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6), st.floats(0.01, 0.99))
def test_an_image_is_accepted_exactly_when_the_softmax_passes_the_threshold(row: list[float], threshold: float) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    largest = logits.softmax(1).max().item()
    if abs(largest - threshold) > 1e-9:
        assert (acceptance(logits, threshold).item() > 0) == (largest > threshold)


def test_the_acceptance_score_has_a_gradient_where_the_softmax_is_saturated() -> None:
    logits = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    assert logits.softmax(1).max().item() == 1
    acceptance(logits, 0.5).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].item() == 1


def test_refusal_adds_a_column_and_leaves_the_logits_alone() -> None:
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, refusing = load("tiny"), load("tiny+reject:0.7")
    assert isinstance(plain, ZeroShot)
    logits, output = plain(pixels), refusing(pixels)
    assert torch.equal(output[:, :-1], logits)
    assert torch.equal(output[:, -1] > 0, logits.softmax(1).amax(1) > 0.7)
    assert torch.equal(logits, zero_shot(load_model("tiny"), NAMES, TEMPLATES, cache=False)(pixels))


def test_what_decides_the_answers_is_in_the_fingerprint() -> None:
    prints = {load(spec).fingerprint for spec in ("tiny", "tiny+reject:0.5", "tiny+reject:0.6", "tiny+smooth:0.1:2")}
    assert len(prints) == 4
    assert load("tiny").fingerprint == load_model("tiny").fingerprint
    torch.manual_seed(1)
    first = load("own_classifiers:Net").fingerprint
    torch.manual_seed(2)
    assert load("own_classifiers:Net").fingerprint != first  # other random weights
    assert load("own_classifiers:Plain").fingerprint == load("own_classifiers:Plain").fingerprint


def test_operators_come_in_order() -> None:
    assert load("tiny+smooth:0.1:2+reject:0.5").can_reject
    with pytest.raises(UserError, match=r"must be the last operator"):
        load("tiny+reject:0.5+smooth:0.1:2")
    with pytest.raises(UserError, match=r"must be the last operator"):
        load("tiny+reject:0.5+reject:0.6")


@pytest.mark.parametrize("text", ["", ":", ":0", ":1", ":nan", ":x", ":0.5:0.6", ":50%"])
def test_a_threshold_is_a_probability(text: str) -> None:
    with pytest.raises(UserError, match=r"0 < T < 1"):
        load(f"tiny+reject{text}")


def test_a_classifier_of_the_user_is_resized_for_and_taken_as_it_is() -> None:
    model = load("own_classifiers:Net")
    assert isinstance(model, OwnClassifier)
    assert (model.image_size, model.interpolation, model.can_reject, model.vlm) == (8, "bilinear", False, None)
    assert model(torch.rand(5, 3, 32, 32)).shape == (5, 3)
    assert not any(weight.requires_grad for weight in model.parameters())
    pixels = torch.rand(5, 3, 8, 8)
    assert torch.equal(load("own_classifiers:Plain")(pixels), pixels.mean((2, 3)))


def test_a_network_that_stands_ready_made_in_a_module_is_taken_and_left_alone() -> None:
    model = load("own_classifiers:ready")
    mine = sys.modules["own_classifiers"].ready
    pixels = torch.rand(5, 3, 8, 8)
    assert torch.allclose(model(pixels), mine(pixels))
    assert mine.training
    assert all(weight.requires_grad for weight in mine.parameters())


def test_a_classifier_of_the_user_may_refuse_by_itself() -> None:
    assert load("own_classifiers:Refusing").can_reject
    assert load("own_classifiers:Net+reject:0.5")(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    with pytest.raises(UserError, match=r"refuses images by itself"):
        load("own_classifiers:Refusing+reject:0.5")


def test_the_columns_of_a_classifier_that_names_its_classes_are_found_by_name() -> None:
    pixels = torch.rand(5, 3, 8, 8)
    means = pixels.mean((2, 3))
    model = load("own_classifiers:Named")
    assert isinstance(model, OwnClassifier)
    assert torch.equal(model(pixels), means[:, [2, 0, 1]])  # apple, dog, car
    in_order = load_classifier("own_classifiers:Named", ["dog", "car", "apple"], TEMPLATES)
    assert torch.equal(in_order(pixels), means)
    assert in_order.fingerprint != model.fingerprint
    assert torch.equal(load_classifier("own_classifiers:Named", ["Car", "dog"], TEMPLATES)(pixels), means[:, [1, 0]])
    assert (model.remarks, load("own_classifiers:Plain").remarks != ()) == ((), True)
    judging = load("own_classifiers:Judging")
    wanted = torch.cat([means[:, [2, 0, 1]], pixels.mean((1, 2, 3))[:, None]], 1)
    assert torch.equal(judging(pixels), wanted)
    assert torch.equal(judging.surrogate(pixels), wanted)  # type: ignore[operator]
    with pytest.raises(UserError, match="'own_classifiers:Named' does not know the class 'wolf' of the data; its 3"):
        load_classifier("own_classifiers:Named", ["dog", "wolf"], TEMPLATES)
    with pytest.raises(UserError, match="'Dog' and 'dog' of the data are one class of 'own_classifiers:Named'"):
        load_classifier("own_classifiers:Named", ["Dog", "dog", "car"], TEMPLATES)


def test_classes_and_data_in_another_order_give_one_answer() -> None:
    pixels = torch.rand(4, 3, 8, 8)
    alone, told = rv.load_classifier("own_classifiers:Named"), rv.load_classifier("own_classifiers:Named", NAMES)
    assert alone.predict(pixels).names == told.predict(pixels).names
    with pytest.raises(UserError, match="class_names must be a list of texts, one for each output, got 'dog'"):
        rv.load_classifier("own_classifiers:NamedInText")


FAULTS = {
    "NamedInText": "class_names must be a list of texts",
    "NamedTooFew": r"finite logits \[2, 4\] for 2 images and 4 class_names, got torch.float32 \[2, 3\]$",
    "Wide": r"finite logits \[2, 3\] .* got torch.float32 \[2, 5\]: pass data with the classes",
    "NotFinite": "got NaN or infinite values",
    "Broken": "it raised ValueError: no such layer",
    "Texts": "got a list",
    "NoSize": "'own_classifiers:NoSize' has no image_size: set it to the side",
    "OddSize": "got 8.5",
    "OddInterpolation": "did you mean 'bicubic'",
    "Nothing": "Nothing has no encode_image and cannot be called",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_classifier_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=FAULTS[name]):
        load(f"own_classifiers:{name}")


def test_the_score_is_a_difference_of_log_odds() -> None:
    logits: Tensor = torch.tensor([[1.0, 0.2, -0.3]], dtype=torch.float64)
    p = logits.softmax(1).max().item()
    wanted = math.log(p / (1 - p)) - math.log(0.3 / 0.7)
    assert acceptance(logits, 0.3).item() == pytest.approx(wanted, abs=1e-12)
