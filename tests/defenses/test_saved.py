"""Folders made by this program as model specs: cards, bases that move with them, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import robustvlm
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.commands.certify.materials import vectors_of_classes
from robustvlm.commands.certify.setup import describe_head
from robustvlm.defenses import load_classifier, load_pipeline, pipeline
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.pipeline import SavedModel, saved_model
from robustvlm.errors import UserError
from robustvlm.models import VLM, load_model
from robustvlm.models.saved import CARD_NAME, Card, read_card, write_card


class Shifted(VLM):
    """The base with a constant added to its features."""

    def __init__(self, base: VLM, shift: float) -> None:
        super().__init__(spec=f"{base.spec}+shift", image_size=base.image_size, logit_scale=base.logit_scale)
        self.base, self.shift = base, shift

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.base.encode_image(pixels) + self.shift

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        return self.base.encode_text(texts)

    def _identity(self) -> tuple[str, ...]:
        return (repr(self.shift),)


class ShiftedModel(SavedModel):
    def encoder(self, device: torch.device) -> VLM:
        return Shifted(self.base(device), self.card.settings["shift"])


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shifted_kind", sys.modules[__name__])
    monkeypatch.setitem(pipeline.KINDS, "shifted", "shifted_kind:ShiftedModel")


def make(folder: Path, base: str = "tiny", shift: float = 0.01) -> Path:
    folder.mkdir(parents=True)
    write_card(folder, Card("shifted", base, load_pipeline(base).fingerprint, {"shift": shift}))
    return folder


@pytest.mark.usefixtures("shifted")
def test_a_saved_folder_is_a_model_of_every_loader_and_takes_operators(tmp_path: Path) -> None:
    folder = make(tmp_path / "one")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, ours = load_pipeline("tiny"), load_pipeline(str(folder))
    assert ours.spec == str(folder)
    torch.testing.assert_close(ours.encode_image(pixels), torch.nn.functional.normalize(plain(pixels) + 0.01, dim=-1))
    assert load_pipeline(f"{folder}+smooth:0.1:4").spec == f"{folder}+smooth:0.1:4"
    classifier = load_classifier(f"{folder}+reject:0.5", ["cat", "dog"], ["{}"], cache=False)
    assert classifier(pixels).shape == (2, 3)


@pytest.mark.usefixtures("shifted")
def test_a_tree_of_runs_can_be_moved(tmp_path: Path) -> None:
    first = make(tmp_path / "runs" / "one")
    second = make(tmp_path / "runs" / "two", base=f"{first}+smooth:0.1:4")
    before = load_pipeline(str(second)).fingerprint
    (tmp_path / "runs").rename(tmp_path / "moved")
    card = read_card(tmp_path / "moved" / "two")
    assert card is not None
    assert card.base is not None
    assert card.base.endswith("+smooth:0.1:4")
    assert load_pipeline(str(tmp_path / "moved" / "two")).fingerprint == before


@pytest.mark.usefixtures("shifted")
def test_a_changed_or_lost_base_is_refused(tmp_path: Path) -> None:
    first = make(tmp_path / "one")
    second = make(tmp_path / "two", base=str(first))
    shutil.rmtree(first)
    make(tmp_path / "one", shift=0.5)
    with pytest.raises(UserError, match="no longer the one"):
        load_pipeline(str(second))
    shutil.rmtree(first)
    with pytest.raises(UserError, match="no model folder"):
        load_pipeline(str(second))


@pytest.mark.usefixtures("shifted")
def test_models_that_stand_on_each_other_are_refused(tmp_path: Path) -> None:
    first = make(tmp_path / "one")
    second = make(tmp_path / "two", base=str(first))
    write_card(first, Card("shifted", str(second), None, {"shift": 0.1}))
    with pytest.raises(UserError, match="stands on itself"):
        load_pipeline(str(second))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not the card"),
        ("[]", "not the card"),
        ('{"format": 1, "kind": 3, "settings": {}}', "not the card"),
        ('{"format": 1, "kind": "a", "settings": {}, "base": {"path": "x"}}', "not the card"),
        ('{"format": 99, "kind": "purify", "settings": {}}', "format 99"),
        ('{"format": 1, "kind": "purifi", "settings": {}}', "did you mean 'purify'"),
    ],
)
def test_broken_cards_are_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / CARD_NAME).write_text(content)
    with pytest.raises(UserError, match=says):
        saved_model(str(tmp_path))


def test_a_card_keeps_what_it_was_given(tmp_path: Path) -> None:
    card = Card("purify", "tiny+smooth:0.25", "ab", {"sigma": [0.1], "name": "ü<b>"})
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card
    assert "relative" not in json.loads((tmp_path / CARD_NAME).read_text())["base"]
    assert read_card(tmp_path / "nothing") is None


@pytest.mark.usefixtures("shifted")
def test_the_door_takes_such_a_folder_too(tmp_path: Path) -> None:
    folder = make(tmp_path / "one")
    (folder / "manifest.json").write_text('{"kind": "purify"}')  # as a finished run has it
    opened = robustvlm.load_model(str(folder), device="cpu")
    assert isinstance(opened, Shifted)
    assert opened.fingerprint == load_pipeline(str(folder)).fingerprint
    with pytest.raises(UserError, match=r"stands on another model: open it with robustvlm\.load_model"):
        load_model(str(folder))
    (folder / CARD_NAME).unlink()
    for load in (robustvlm.load_model, load_model):
        with pytest.raises(UserError, match="has not ended"):
            load(str(folder))


RUNS = Path(__file__).parents[1] / "pins" / "before"


@pytest.mark.parametrize("kind", pipeline.KINDS)
def test_certificates_are_about_the_vectors_that_the_classifier_answers_by(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RUNS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names, templates = ("blue", "red"), ("a {}.", "the {}")
    names = ("blue", "green", "red") if kind == "immunize" else names
    answering = load_classifier(kind, names, templates).class_embeddings
    assert answering is not None
    config = cast(CertifyConfig, SimpleNamespace(model=kind, claim="class"))
    certified = vectors_of_classes(config, load_pipeline(kind), names, templates)
    assert certified is not None
    np.testing.assert_allclose(certified, answering.reshape(len(names), -1).double().numpy(), atol=1e-6)
    own_head = kind in ("immunize", "tune-prompts")
    assert ("head" in describe_head(config, names)) == own_head
    if kind == "tune-prompts":  # which has no open-set rule of its own
        config = cast(CertifyConfig, SimpleNamespace(model=kind, claim="openset", sigma=0.1, tau=None))
        again = vectors_of_classes(config, load_pipeline(kind), names, templates)
        np.testing.assert_array_equal(again, certified)
        assert "head" in describe_head(config, names)


class OwnHead(ShiftedModel):
    def classifier(self, *args: Any, **options: Any) -> Classifier:
        return super().classifier(*args, **options)


@pytest.mark.usefixtures("shifted")
def test_a_head_that_names_no_class_vectors_is_not_certified_by_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pipeline.KINDS, "shifted", "shifted_kind:OwnHead")
    config = cast(CertifyConfig, SimpleNamespace(model=str(make(tmp_path / "own")), claim="class"))
    with pytest.raises(UserError, match="a head of its own, and names no class vectors to certify"):
        vectors_of_classes(config, load_model("tiny"), ("cat", "dog"), ("{}",))
