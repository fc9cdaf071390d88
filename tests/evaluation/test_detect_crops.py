"""`detect --scores krnft`: a few images of each class are cropped once, kept, and learnt from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from detecting import DetectRun, lasting
from safetensors.torch import load_file

from robustvlm.commands.detect.cropping import CROPS, by_image, few_of_each, random_crops, require_all
from robustvlm.commands.detect.encoding import Answers, ChunkEncoder, Encoded, joined
from robustvlm.data import DataSource, Sample, open_data
from robustvlm.data.source import Unreadable
from robustvlm.defenses import load_classifier
from robustvlm.errors import UserError
from robustvlm.runs.settings import Observer


def test_crops_are_made_once_and_a_finished_run_is_repeated(
    detect_run: DetectRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = detect_run(name="crops", scores="neglabel,krnft").start()
    assert [score.name for score in run.summary.scores] == ["neglabel", "krnft"]
    kept = sorted((run.folder / "features").glob("crops-*.safetensors"))
    assert sum(len(load_file(path)["features"]) for path in kept) == 3 * 4 * CROPS  # three classes, four images of each
    # The same command from the kept crops, with nothing else of the results left.
    for name in ("summary.json", "results.parquet"):
        (run.folder / name).unlink()
    monkeypatch.setattr("robustvlm.commands.detect.cropping.crops", lambda *_: pytest.fail("made anew"))
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
        encoder = ChunkEncoder(answers, seed=seed, observer=Observer())
        return joined(list(encoder.chunks(source, only=frozenset(wanted), views=random_crops(seed, count))))

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


class Repeating(DataSource):
    """Names every image twice, and more images than anybody should read."""

    def __init__(self, inner: DataSource) -> None:
        super().__init__("repeating", inner.class_names, templates=inner.templates)
        self.inner, self.read = inner, 0

    def ids(self) -> None:
        return None

    def _stream(self, wanted: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for item in self.inner.samples(keep=wanted):
            for _ in range(2):
                self.read += 1
                yield item


def test_an_image_named_twice_counts_once_and_nothing_is_read_behind_the_last(detect_images: Path) -> None:
    inner = open_data(f"imagefolder:{detect_images}/fit")
    classifier = load_classifier("small_encoders:Encoder", inner.class_names, inner.templates)
    source, wanted = Repeating(inner), frozenset((inner.ids() or [])[:2])
    encoder = ChunkEncoder(Answers(classifier, batch_size=8), seed=0, observer=Observer())
    found = joined(list(encoder.chunks(source, only=wanted, views=random_crops(0, 4))))
    assert len(found.ids) == 8
    assert source.read == 3
    assert require_all(found, wanted, "here") is found
    with pytest.raises(UserError, match=r"1 images of 'here' could be read before and not again .* 'gone'"):
        require_all(found, wanted | {"gone"}, "here")


def test_few_of_each_are_the_same_whatever_else_is_there() -> None:
    names = [f"{k}" for k in range(20)]
    labels = torch.arange(20) % 3
    every = few_of_each(Encoded(names, labels, None, None), 2, seed=0)
    assert len(every) == 6
    turned = few_of_each(Encoded(names[::-1], labels.flip(0), None, None), 2, seed=0)
    assert every == turned
    assert every != few_of_each(Encoded(names, labels, None, None), 2, seed=1)
