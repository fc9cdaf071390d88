"""The immunised classifier and its folder: what it says, in which order of classes, with gradients, and bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from robustvlm.certify import OpensetRule
from robustvlm.commands.detect.encoding import Answers
from robustvlm.commands.detect.scoring import make_panel, own_sdis
from robustvlm.defenses import load_classifier, load_pipeline, smooth
from robustvlm.defenses.immunity import AdaptedVLM, ImmunisedClassifier, Immunity, immunise_without_images
from robustvlm.defenses.immunity.antibodies import Antibodies, AntibodyText
from robustvlm.defenses.immunity.saved import ImmunisedModel
from robustvlm.defenses.immunity.state import Adapter, card_settings, save_tensors
from robustvlm.defenses.pipeline import saved_model
from robustvlm.detect import SDIS, MaxLogit, NegLabel, head_of
from robustvlm.detect.base import confidence
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.saved import Card, write_card
from robustvlm.models.zero_shot import class_embeddings

NAMES = ("apple", "dog", "fish_bowl")


def unit(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def immunity(dim: int = 192, *, per_class: int = 1, antibodies: int = 2) -> Immunity:
    adapter = Adapter(dim, 4, seed=5)
    torch.nn.init.normal_(adapter.outer.weight, std=0.3, generator=torch.Generator().manual_seed(6))
    texts = tuple(AntibodyText(f"thing {i}", "dog") for i in range(antibodies))
    return Immunity(
        NAMES,
        unit(3 * per_class, dim, 1).view(3, per_class, dim),
        Antibodies(texts, unit(antibodies, dim, 2) if antibodies else torch.zeros(0, dim)),
        0.5,
        torch.tensor([0.01, 0.02, -0.05]),
        adapter.eval().requires_grad_(False),
        {0.25: torch.tensor([0.0, 0.001, -0.002])},
    )


def saved(folder: Path, made: Immunity, base: str = "tiny") -> Path:
    folder.mkdir(parents=True)
    save_tensors(folder, made)
    write_card(folder, Card("immunize", base, load_model(base).fingerprint, card_settings(made)))
    return folder


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize("antibodies", [0, 2])
@pytest.mark.parametrize("floor", [None, 0.01])
def test_output_is_the_score_less_the_threshold_of_the_predicted_class(
    per_class: int, antibodies: int, floor: float | None
) -> None:
    made = replace(immunity(per_class=per_class, antibodies=antibodies), floor=floor)
    encoder = AdaptedVLM(load_model("tiny"), made.adapter)
    classifier = ImmunisedClassifier(encoder, made)
    output = classifier(images())
    for row, z in zip(output, encoder.encode_image(images()), strict=True):
        cosines = [max(float(mu @ z) for mu in of) for of in made.prototypes]
        against = max((float(a @ z) for a in made.antibodies.embeddings), default=0.0)
        against = against if floor is None else max(0.0, against - floor)
        k = int(np.argmax(cosines))
        assert row[:-1].tolist() == pytest.approx([encoder.logit_scale * c for c in cosines], abs=1e-4)
        assert float(row[-1]) == pytest.approx(cosines[k] - 0.5 * against - float(made.thresholds[k]), abs=1e-5)


def test_decisions_name_a_class_or_reject() -> None:
    made = immunity()
    low = replace(made, thresholds=torch.full((3,), -2.0))
    high = replace(made, thresholds=torch.full((3,), 2.0))
    encoder = AdaptedVLM(load_model("tiny"), made.adapter)
    for found, name in ((low, True), (high, False)):
        for decision in ImmunisedClassifier(encoder, found).decide(images()):
            assert (decision.class_name is not None) == name
            assert decision.nearest in NAMES
            assert (decision.score > decision.threshold) == name


def test_gradients_reach_the_pixels_and_agree_with_differences() -> None:
    made = immunity()
    classifier = ImmunisedClassifier(AdaptedVLM(load_model("tiny"), made.adapter), made).double()
    pixels = images(1).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(classifier(pixels)[0, -1], pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-8 * direction  # small, so that no unit of the encoder switches in between
    with torch.no_grad():
        slope = (classifier(pixels + step)[0, -1] - classifier(pixels - step)[0, -1]) / 2e-8
    assert gradient.abs().max() > 0
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_a_hinge_is_never_taken_for_s_dis(tmp_path: Path) -> None:
    made = replace(immunity(), floor=0.02)
    assert "weight" not in card_settings(made)  # which is all that readers of S_DIS look for
    assert "hinge" not in card_settings(immunity())
    folder = saved(tmp_path / "run", made)
    loaded = saved_model(str(folder))
    assert isinstance(loaded, ImmunisedModel)
    assert (loaded.immunity.weight, loaded.immunity.floor) == (0.5, 0.02)
    rule = loaded.openset_rule(NAMES, 0.25)
    own = own_sdis(load_classifier(str(folder), NAMES, ["{}"]))
    assert own is not None
    z = 0.7 * unit(20, 192, 4)
    assert own.score(z).tolist() == pytest.approx([rule.score(row) for row in z.double().numpy()], abs=1e-6)
    assert own.score(z).tolist() != pytest.approx(
        SDIS(made.prototypes[:, 0], made.antibodies.embeddings).score(z).tolist()
    )


@pytest.mark.parametrize("floor", [None, 0.02])
def test_folder_gives_back_the_same_bits(tmp_path: Path, floor: float | None) -> None:
    made = replace(immunity(), floor=floor)
    folder = saved(tmp_path / "run", made)
    loaded = load_classifier(str(folder), NAMES, ["{}"])
    direct = ImmunisedClassifier(AdaptedVLM(load_model("tiny"), made.adapter), made)
    assert torch.equal(loaded(images()), direct(images()))
    assert loaded.can_reject
    assert loaded.spec == str(folder)
    again = saved(tmp_path / "again", made)
    assert (folder / "immunity.safetensors").read_bytes() == (again / "immunity.safetensors").read_bytes()
    texts = saved_model(str(folder)).immunity.antibodies.texts  # type: ignore[union-attr]
    assert texts == made.antibodies.texts


def test_classes_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", immunity())
    ours = load_classifier(str(folder), NAMES, ["{}"])(images())
    theirs = load_classifier(str(folder), ("Fish Bowl", "apple", "dog"), ["{}"])(images())
    assert torch.equal(theirs[:, [1, 2, 0, 3]], ours)


def test_other_classes_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", immunity())
    with pytest.raises(UserError, match="'cat' is none of them"):
        load_classifier(str(folder), ("apple", "dog", "cat"), ["{}"])
    with pytest.raises(UserError, match="the data lack 'dog'"):
        load_classifier(str(folder), ("apple", "fish bowl"), ["{}"])


def test_smoothing_goes_between_adapter_and_head(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", immunity())
    vlm = load_pipeline(f"{folder}+smooth:0.25:8")
    assert isinstance(vlm.base, AdaptedVLM)  # type: ignore[attr-defined]
    told, untold = (load_classifier(f"{folder}+smooth:{sigma}:8", NAMES, ["{}"]) for sigma in ("0.25", "0.5"))
    assert told.thresholds.tolist() == pytest.approx([0.0, 0.001, -0.002])  # type: ignore[union-attr]
    assert untold.thresholds.tolist() == pytest.approx([0.01, 0.02, -0.05])  # type: ignore[union-attr]
    torch.manual_seed(0)
    output = told(images(1))[0]
    torch.manual_seed(0)
    mean = vlm.mean_feature(images(1), 8)  # type: ignore[attr-defined]
    assert torch.allclose(output, told.head(mean)[0])  # type: ignore[union-attr]
    assert float(mean.norm()) < 0.999  # not scaled: what certificates are about


def test_known_features_give_the_bits_of_the_answer_and_smoothed_models_draw_afresh(tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "run", immunity()))
    classifier = load_classifier(folder, NAMES, ["{}"], device="cpu")
    assert classifier.vlm is not None
    with torch.no_grad():
        found = classifier.from_features(classifier.vlm.encode_image(images()))
        assert found is not None
        assert torch.equal(found, classifier(images()))
        smoothed = load_classifier(f"{folder}+smooth:0.25:4", NAMES, ["{}"], device="cpu")
        assert smoothed.vlm is not None
        assert smoothed.from_features(smoothed.vlm.encode_image(images())) is None
        refusing = load_classifier("tiny+reject:0.5", NAMES, ["{}"], device="cpu")
        assert refusing.from_features(images()) is None


@pytest.mark.parametrize("operators", ["", "+smooth:0.25:4"])
def test_detect_encodes_an_image_once_unless_the_answer_is_random(
    tmp_path: Path, operators: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(saved(tmp_path / "run", immunity()))
    classifier = load_classifier(folder + operators, NAMES, ["{}"], device="cpu")
    answers = Answers(classifier, batch_size=1)  # of one image nothing is to be tried out
    seen: list[int] = []
    encoder = type(load_model("tiny"))
    inner = encoder._image_features
    monkeypatch.setattr(encoder, "_image_features", lambda self, x: seen.append(len(x)) or inner(self, x))
    features, output = answers(images(2))
    assert features is not None
    assert output is not None
    assert output.shape == (2, 4)
    copies = 4 if operators else 1
    assert sum(seen) == 2 * copies * (2 if operators else 1)


@pytest.mark.parametrize("floor", [None, 0.02])
def test_certificates_get_the_rule_that_is_deployed(tmp_path: Path, floor: float | None) -> None:
    made = replace(immunity(per_class=2), floor=floor)
    model = saved_model(str(saved(tmp_path / "run", made)))
    assert model is not None
    assert model.refuses
    rule = model.openset_rule(NAMES[::-1], 0.25)
    assert isinstance(rule, OpensetRule)
    classifier = ImmunisedClassifier(smooth(AdaptedVLM(load_model("tiny"), made.adapter), 0.25, 8), made)
    for z in 0.7 * unit(20, 192, 4):  # a mean is shorter than 1, and judged as it is
        output = classifier.head(z[None])[0]
        assert rule.margin(z.double().numpy()) == pytest.approx(float(output[-1]), abs=1e-5)
        assert NAMES[::-1][rule.predicted(z.double().numpy())] == NAMES[int(output[:-1].argmax())]
    assert model.openset_rule(NAMES, 0.25).thresholds.tolist() == pytest.approx([0.0, 0.001, -0.002])
    with pytest.raises(
        UserError, match=r"no thresholds for noise of 0.5 \(only for 0.25\).*immunize \.\.\. --sigma 0.5"
    ):
        model.openset_rule(NAMES, 0.5)  # there the deployed model judges the mean at unit length
    assert model.openset_rule(NAMES, 0.5, 0.3).thresholds.tolist() == [0.3] * 3
    with pytest.raises(UserError, match="need one"):
        model.class_vectors(NAMES)
    single = saved_model(str(saved(tmp_path / "single", immunity())))
    assert torch.equal(single.class_vectors(NAMES), immunity().prototypes[:, 0])  # type: ignore[union-attr]


def test_without_images_the_nearest_text_decides() -> None:
    vlm = load_model("tiny")
    made = immunise_without_images(vlm, ["apple", "dog"], ["{}"], ["bus", "guitar"])
    classifier = ImmunisedClassifier(vlm, made)
    both = vlm.encode_text(["apple", "dog", "bus", "guitar"])
    assert (classifier.head(both)[:, -1] > 0).tolist() == [True, True, False, False]
    with pytest.raises(UserError, match="nothing tells the unknown"):
        immunise_without_images(vlm, ["apple", "dog"], ["{}"], [])


def test_damaged_folders_and_parts_that_do_not_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", immunity())
    file = folder / "immunity.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_pipeline(str(folder))
    file.unlink()
    with pytest.raises(UserError, match="no checkpoint file"):
        load_pipeline(str(folder))
    other = saved(tmp_path / "other", immunity())
    save_tensors(other, replace(immunity(antibodies=1)))  # the card names two
    with pytest.raises(UserError, match="no immunised model that can be read"):
        load_pipeline(str(other))
    with pytest.raises(UserError, match="do not fit"):
        replace(immunity(), thresholds=torch.zeros(2))
    with pytest.raises(UserError, match="finite"):
        replace(immunity(), thresholds=torch.full((3,), torch.nan))


@pytest.mark.parametrize("per_class", [1, 3])
def test_scores_of_logits_are_of_the_model_that_answers_and_words_meet_class_texts(per_class: int) -> None:
    made = immunity(per_class=per_class)
    encoder = AdaptedVLM(load_model("tiny"), made.adapter)
    classifier = ImmunisedClassifier(encoder, made)
    panel = make_panel(classifier, ["a {}"], ["msp", "max-logit", "neglabel", "s-dis"], None, unit(40, 192, 7))
    z = encoder.encode_image(images(8))
    logits = classifier(images(8))[:, :-1]
    torch.testing.assert_close(panel.head.logits(z), logits)
    torch.testing.assert_close(MaxLogit(head_of(classifier)).score(z), logits.amax(dim=1))
    torch.testing.assert_close(panel.detectors["msp"].score(z), confidence(logits))
    texts = class_embeddings(encoder, NAMES, ["a {}"])
    words, sdis = panel.detectors["neglabel"], panel.detectors["s-dis"]
    assert isinstance(words, NegLabel)
    assert isinstance(sdis, SDIS)
    torch.testing.assert_close(words.head.class_embeddings, texts)
    torch.testing.assert_close(sdis.prototypes, texts)
