"""An image looked up in a gallery of images: certified, audited, and never in a gallery that holds itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import robustvlm as rv
from robustvlm.certify.claims.recall import RECALL, RecallRadius
from robustvlm.commands.certify.audit import Effort, audit_folder
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.commands.certify.gallery import open_gallery
from robustvlm.commands.certify.work import _without_gallery
from robustvlm.core.framing import to_pixels
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_pipeline
from robustvlm.errors import UserError

FEW = {"claim": "recall", "sigma": 0.02, "samples": 80, "alpha": 0.05, "limit": 2, "device": "cpu"}


def feed(certifier: RecallRadius, rows: np.ndarray) -> RecallRadius:
    used = 0
    while (wanted := certifier.request()) is not None:
        certifier.take(rows[used : used + wanted.sure])
        used += wanted.sure
    return certifier


def test_any_entry_of_the_image_s_class_may_be_certified() -> None:
    """The nearest is of another class; of the two of its own, the nearer one is certified, and beats all but one."""
    rows = np.tile([[0.8, 0.6, 0.0, 0.0], [0.7, 0.714142842854285, 0.0, 0.0]], (300, 1))
    asked = {"text": np.eye(4), "k": 2, "sigma": 0.25, "alpha": 0.001, "n": 600, "n_pilot": 100}
    own = feed(RecallRadius(**asked, own=7, entries=(3, 7, -1, 7)), rows).finding()
    assert own.prediction == 1
    assert own.radius > 0.0
    none = feed(RecallRadius(**asked, own=9, entries=(3, 7, -1, 7)), rows).finding()
    assert none.prediction == 0
    unknown = feed(RecallRadius(**asked, own=-1, entries=(3, 7, -1, 7)), rows).finding()
    assert unknown.prediction == 0  # images of no known class have no entries of theirs
    keys = {RecallRadius(**asked, own=7, entries=entries).key for entries in (None, (3, 7, -1, 7), (7, 7, -1, 7))}
    assert len(keys) == 3


def folder_of_images(place: Path, count: int = 6) -> Path:
    """A folder a class, with a picture of it in each; the last class is none of the bundled ones."""
    source = open_data("emoji")
    for number, item in enumerate(source.samples(limit=count)):
        assert isinstance(item, Sample)
        name = source.class_names[item.label] if number < count - 1 else "thing of no class"
        (place / name).mkdir(parents=True, exist_ok=True)
        item.image.save(place / name / f"{number}.png")
    return place


def test_a_gallery_is_of_the_model_s_own_features(tmp_path: Path) -> None:
    place, source, vlm = folder_of_images(tmp_path / "pictures"), open_data("emoji"), load_pipeline("tiny")
    config = CertifyConfig.model_construct(gallery=f"imagefolder:{place}", limit=2)
    found = open_gallery(config, vlm, source)
    assert found is not None
    assert (len(found.names), found.left_out, found.copies) == (4, 2, 0)  # two are certified, under another name
    assert "2 images that are certified themselves are left out" in " ".join(found.words)
    pixels = to_pixels(Image.open(place / found.names[0]).convert("RGB"), vlm.framing)[None]
    assert np.abs(found.vectors[0] - vlm.encode_image(pixels)[0].double().numpy()).max() < 1e-5
    smoothed = load_pipeline("tiny+smooth:0.02:4")
    none = CertifyConfig.model_construct(gallery=f"imagefolder:{place}", limit=None)
    with pytest.raises(UserError, match="holds only images that are certified"):
        open_gallery(none, vlm, source)
    means = [open_gallery(config, smoothed, source) for _ in range(2)]
    assert means[0] is not None
    assert means[1] is not None
    assert means[0].copies == 4
    assert np.array_equal(means[0].vectors, means[1].vectors)
    assert means[0].digest != found.digest


def test_an_image_of_no_known_class_is_a_wrong_answer_to_one_of_a_known_class() -> None:
    """A gallery may hold images of other classes (-1): where one is the nearest, the image does not go uncounted."""
    assert [RECALL.correct(1, place) for place in (1, 0, -1)] == [True, False, False]
    assert RECALL.correct(-1, 0) is None


@pytest.mark.slow
def test_certificates_from_kept_features_name_classes_and_no_entries_of_the_gallery(tmp_path: Path) -> None:
    place = folder_of_images(tmp_path / "pictures")
    few = FEW | {"samples": 40, "limit": 1, "out": tmp_path}
    kept = rv.certify("tiny", gallery=f"imagefolder:{place}", top=3, cache="float32", name="kept", **few)
    assert kept.entry_names != kept.class_names
    again = rv.certify(from_cache="kept", claim="recall", prompts="independent", out=tmp_path)
    assert again.entry_names == again.class_names == kept.class_names


def test_kept_features_are_of_data_without_the_gallery() -> None:
    assert _without_gallery({"spec": "emoji", "gallery": {"names": ["a"]}}) == {"spec": "emoji"}


@pytest.mark.slow
def test_a_run_names_gallery_images_and_can_be_audited(tmp_path: Path) -> None:
    place = folder_of_images(tmp_path / "pictures")
    run = rv.certify("tiny", gallery=f"imagefolder:{place}", top=3, out=tmp_path, **FEW)
    gallery = run.manifest["data"]["gallery"]
    names = run.entry_names
    assert names == gallery["names"]
    assert gallery["copies"] == 0
    assert any("features without noise" in note for note in run.manifest["plan"]["notes"])
    for row in run.rows.to_pylist():
        told = json.loads(row["certificate"])
        assert told["label_name"] == names[row["prediction"]]
        assert told["n_classes"] == len(names)
        assert "gallery images" in told["rule"]
    assert not audit_folder(run.folder, effort=Effort(starts=1, steps=1), limit=1).broken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"claim": "class", "gallery": "emoji"}, "gallery is for claim=recall"),
        ({"gallery": "emoji", "limit": None}, "holds only images that are certified"),
    ],
)
def test_galleries_that_cannot_be_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        rv.certify("tiny", out=tmp_path, **(FEW | options))


def test_a_gallery_without_a_known_class_is_refused(tmp_path: Path) -> None:
    """No entry could be one of an image's class: every certificate would be wrong, or about nothing that was asked."""
    place = tmp_path / "others" / "thing of no class"
    place.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(place / "a.png")
    with pytest.raises(UserError, match=r"no image of the gallery .* is of a class of 'emoji"):
        rv.certify("tiny", data="emoji", gallery=f"imagefolder:{tmp_path / 'others'}", out=tmp_path / "runs", **FEW)
