"""`detect --scores krnft`: a few images of each class are cropped once, kept, and learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detecting import DetectRun, lasting
from safetensors.torch import load_file

from robustvlm.commands.detect.cropping import CROPS, by_image, encode_crops, few_of_each
from robustvlm.commands.detect.encoding import Answers, Encoded
from robustvlm.data import open_data
from robustvlm.defenses import load_classifier
from robustvlm.errors import UserError


def test_crops_are_made_once_and_a_finished_run_is_repeated(
    detect_run: DetectRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = detect_run(name="crops", scores="neglabel,krnft").start()
    assert [score.name for score in run.summary.scores] == ["neglabel", "krnft"]
    kept = run.folder / "features" / "crops.safetensors"
    assert load_file(kept)["features"].shape[0] == 3 * 4 * CROPS  # three classes, four images of each
    # The same command from the kept crops, with nothing else of the results left.
    for name in ("summary.json", "results.parquet"):
        (run.folder / name).unlink()
    monkeypatch.setattr("robustvlm.commands.detect.cropping.encode_crops", lambda *_, **__: pytest.fail("made anew"))
    again = detect_run(name="crops", scores="neglabel,krnft").start()
    assert lasting(again.summary) == lasting(run.summary)


def test_without_images_it_is_skipped_and_alone_refused(detect_run: DetectRun) -> None:
    summary = detect_run(scores="neglabel,krnft", fit=None).start().summary
    assert "pass --fit DATA" in summary.skipped["krnft"]
    with pytest.raises(UserError, match="none of the scores can be used; the first, 'krnft': it learns from images"):
        detect_run(name="alone", scores="krnft", fit=None).start()


def test_crops_depend_on_seed_and_image_alone(detect_images: Path) -> None:
    source = open_data(f"imagefolder:{detect_images}/fit")
    classifier = load_classifier("small_encoders:Encoder", source.class_names, source.templates)
    answers, names = Answers(classifier, batch_size=8), (source.ids() or [])[:3]

    def made(wanted: list[str], seed: int = 0, count: int = 4) -> Encoded:
        return encode_crops(answers, source, frozenset(wanted), seed=seed, count=count)

    three, one = made(names), made(names[1:2])
    assert three.ids == [name for name in names for _ in range(4)]
    crops, labels = by_image(three, 4)
    assert crops.shape[:2] == (3, 4)
    assert one.features is not None
    assert torch.allclose(crops[1], one.features, rtol=0, atol=1e-6)
    assert labels[1] == one.labels[0]
    other = made(names[1:2], seed=1)
    assert other.features is not None
    assert not torch.equal(one.features, other.features)
    assert not made([]).ids


def test_few_of_each_are_the_same_whatever_else_is_there() -> None:
    names = [f"{k}" for k in range(20)]
    labels = torch.arange(20) % 3
    every = few_of_each(Encoded(names, labels, None, None), 2, seed=0)
    assert len(every) == 6
    turned = few_of_each(Encoded(names[::-1], labels.flip(0), None, None), 2, seed=0)
    assert every == turned
    assert every != few_of_each(Encoded(names, labels, None, None), 2, seed=1)
