"""Predictions from Python: an answer belongs to its image, what a model does not answer is told, memory is bounded."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import robustvlm as rv
from robustvlm.attacks.tensors import image_ids
from robustvlm.certify import predict as decided
from robustvlm.commands.predict import PredictSettings
from robustvlm.commands.predict.work import Work
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed
from robustvlm.data.files import FileImages
from robustvlm.data.source import DataSource, Sample, Unreadable
from robustvlm.defenses.classifier import ZeroShot
from robustvlm.defenses.immunity import immunise_without_images
from robustvlm.defenses.immunity.state import card_settings, save_tensors
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.models import VLM, ZeroShotClassifier
from robustvlm.models.saved import Card, write_card

NAMES = ["apple", "dog", "bus"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        shape = (20 + 7 * number, 30, 3)
        Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


class Colours(VLM):
    """Features are the mean colour; memory runs out above `most` images, black images give NaN."""

    def __init__(self, most: int = 10_000, *, random: bool = False, coupled: bool = False) -> None:
        super().__init__(spec="colours", image_size=8, logit_scale=6.0)
        self.most, self.random, self.coupled = most, random, coupled
        self.batches: list[int] = []

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        self.batches.append(len(pixels))
        mean = pixels.mean(dim=(2, 3))
        if self.random:
            mean = mean + 0.3 * torch.rand_like(mean)
        if self.coupled:
            mean = mean + mean.mean(dim=0).flip(0)
        return torch.where(mean.sum(dim=1, keepdim=True) == 0, torch.nan, mean)

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(3)[: len(texts)]


def colours(**how: bool) -> ZeroShot:
    return ZeroShot(ZeroShotClassifier(Colours(**how), ["red", "green", "blue"], torch.eye(3)))  # type: ignore[arg-type]


def test_answers_are_those_of_the_classifier(photos: Path) -> None:
    model = rv.load_classifier("tiny", NAMES, device="cpu")
    found = rv.predict("tiny", photos, classes=NAMES, top=3, device="cpu")
    pixels = torch.stack([to_pixels(item.image, model.framing) for item in samples(photos)])
    answers = model.predict(pixels)
    assert found.classes == list(answers.names)
    assert found.images == [str(photos / f"{number}.png") for number in range(6)]
    torch.testing.assert_close(torch.tensor(found.confidence), answers.scores, rtol=1e-5, atol=0)
    for row in found:
        assert [value for _, value in row.top] == sorted((value for _, value in row.top), reverse=True)
        assert sum(value for _, value in row.top) == pytest.approx(1)
        assert row.top[0] == (row.class_name, row.confidence)
    again = rv.predict(model, photos, top=3)
    assert list(again) == list(found)
    assert found.to_arrow().column("class").to_pylist() == found.classes
    frame = pytest.importorskip("pandas") and found.to_pandas()
    assert frame["confidence"].tolist() == found.confidence


def samples(photos: Path) -> list[Sample]:
    return [item for item in FileImages([photos]).samples() if isinstance(item, Sample)]


@pytest.mark.parametrize("model", ["tiny+smooth:0.2:6", "tiny+smooth:0.2:6+reject:0.4"])
def test_an_answer_belongs_to_its_image(model: str, photos: Path) -> None:
    (photos / "copy.png").write_bytes((photos / "3.png").read_bytes())
    paths = sorted(photos.iterdir())
    state = torch.get_rng_state()
    found = {row.image: row for row in rv.predict(model, paths, classes=NAMES, top=3, device="cpu")}
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    other = rv.predict(model, paths[::-1], classes=NAMES, top=3, batch_size=2, device="cpu")
    assert {row.image: row for row in other} == found
    alone = rv.predict(model, paths[4], classes=NAMES, top=3, device="cpu")
    assert alone[0] == found[str(paths[4])]
    assert found[str(photos / "copy.png")].top == found[str(photos / "3.png")].top
    seeded = rv.predict(model, paths, classes=NAMES, top=3, seed=1, device="cpu")
    assert all(row.confidence != found[row.image].confidence for row in seeded)


@pytest.mark.parametrize("model", ["tiny", "tiny+reject:0.4"])
def test_batches_change_nothing_but_rounding(model: str, photos: Path) -> None:
    runs = [rv.predict(model, photos, classes=NAMES, batch_size=size, device="cpu") for size in (1, 4, 64)]
    for other in runs[1:]:
        assert other.classes == runs[0].classes
        assert other.confidence == pytest.approx(runs[0].confidence, rel=1e-5)


def test_abstention_is_the_test_of_the_certificate(photos: Path) -> None:
    spec = "tiny+smooth:0.1:64"
    model = rv.load_classifier(spec, NAMES, device="cpu")
    encoder, text = model.vlm, model.class_embeddings
    assert isinstance(encoder, SmoothedVLM)
    assert text is not None
    answered = {}
    for alpha in (1e-6, 0.01, 0.4):
        found = rv.predict(model, photos, alpha=alpha, seed=5)
        assert f"alpha {alpha:g}" in found.rule
        for row, item in zip(found, samples(photos), strict=True):
            pixels = to_pixels(item.image, model.framing)[None]
            torch.manual_seed(derive_seed(5, "predict", *image_ids(pixels)))
            draws = encoder.noisy_features(pixels, 64)
            label = decided(draws[0].double().numpy(), text.double().numpy(), alpha)
            assert row.class_name == (None if label is None else NAMES[label])
            assert (row.status == "abstained") == (label is None)
            mean = F.normalize(draws.mean(1), dim=-1) @ text.T
            shares = (encoder.logit_scale * mean).double().softmax(1)[0]
            assert row.top[0][1] == pytest.approx(float(shares.max()), rel=1e-5)
        answered[alpha] = {row.image for row in found if row.class_name}
        assert found.abstained == [row.class_name is None for row in found]
    # The draws are the same, so what is decided at a small error is decided at a larger one.
    assert answered[1e-6] <= answered[0.01] <= answered[0.4]
    assert len(answered[1e-6]) < len(answered[0.4])
    with pytest.raises(rv.UserError, match="does not abstain: leave out alpha"):
        rv.predict("tiny", photos, classes=NAMES, alpha=0.01, device="cpu")


def test_refusal_is_told_in_the_models_own_terms(photos: Path, tmp_path: Path) -> None:
    plain = rv.predict("tiny", photos, classes=NAMES, device="cpu")
    values = sorted(value for value in plain.confidence if value is not None)
    threshold = round((values[2] + values[3]) / 2, 6)
    found = rv.predict(f"tiny+reject:{threshold}", photos, classes=NAMES, device="cpu")
    assert sum(found.rejected) == 3
    for row, before in zip(found, plain, strict=True):
        assert row.threshold == threshold
        assert row.score == pytest.approx(before.confidence, rel=1e-5)
        assert row.score is not None
        assert (row.status == "rejected") == (row.score <= threshold)
        assert row.class_name == (before.class_name if row.status == "answered" else None)
        assert row.top[0][0] == before.class_name

    vlm = rv.load_model("tiny", device="cpu")
    made = immunise_without_images(vlm, NAMES, ["{}"], ["a noisy pattern", "guitar"])
    save_tensors(tmp_path, made)
    write_card(tmp_path, Card("immunize", base="tiny", base_fingerprint=vlm.fingerprint, settings=card_settings(made)))
    immune = rv.load_classifier(str(tmp_path), device="cpu")
    pixels = torch.stack([to_pixels(item.image, immune.framing) for item in samples(photos)])
    decisions = immune.decide(pixels)  # type: ignore[attr-defined]
    rows = rv.predict(str(tmp_path), photos, device="cpu")  # it knows its classes
    for row, decision in zip(rows, decisions, strict=True):
        assert (row.class_name, row.top[0][0]) == (decision.class_name, decision.nearest)
        assert row.score == pytest.approx(decision.score, abs=1e-6)
        assert row.threshold == pytest.approx(decision.threshold)


def test_chance_and_neighbours_are_noticed(photos: Path) -> None:
    random = rv.predict(colours(random=True), photos)
    assert "one draw of a random model" in random.rule
    assert list(rv.predict(colours(random=True), photos, batch_size=2)) == list(random)
    assert rv.predict(colours(random=True), photos, seed=2).confidence != random.confidence
    coupled = Work(PredictSettings(model="x", images=[photos]), colours(coupled=True))
    rows = [row for batch in coupled.batches() for row in batch]
    assert "depends on the other images" in coupled.remarks[0]
    assert rows == list(rv.predict(colours(coupled=True), photos, batch_size=3))


def test_little_memory_and_no_numbers_are_survived(photos: Path) -> None:
    Image.new("RGB", (9, 9)).save(photos / "black.png")
    (photos / "bad.png").write_text("x")
    whole = rv.predict(colours(), photos)
    model = colours(most=2)  # type: ignore[arg-type]
    small = rv.predict(model, photos)
    assert [row.status for row in small] == [row.status for row in whole]
    pairs = [(a, b) for a, b in zip(small.confidence, whole.confidence, strict=True) if b is not None]
    assert len(pairs) == 6
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-5)
    assert max(model.vlm.batches) == 2  # type: ignore[union-attr]
    by_name = {Path(row.image).name: row for row in whole}
    assert by_name["black.png"].status == "failed"
    assert by_name["black.png"].reason == "the model's output is NaN or infinite"
    assert by_name["bad.png"].reason == "not an image of a known format"
    assert whole.unreadable == [row.status in ("failed", "unreadable") for row in whole]
    assert sum(whole.unreadable) == 2


class Endless(DataSource):
    """More images than memory should hold; those in memory are counted."""

    def __init__(self, count: int) -> None:
        super().__init__("endless", ())
        self.count, self.given, self.alive, self.most = count, 0, 0, 0

    def _gone(self) -> None:
        self.alive -= 1

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for number in range(self.count):
            if keep(str(number)):
                image = Image.new("RGB", (8, 8), (number % 251, 7, 9))
                weakref.finalize(image, self._gone)
                self.given, self.alive = self.given + 1, self.alive + 1
                self.most = max(self.most, self.alive)
                yield Sample(str(number), image, -1)


@pytest.mark.parametrize("ahead", [0, 16])
def test_memory_does_not_grow_with_the_images(ahead: int) -> None:
    work = Work(PredictSettings(model="x", images=["none"], batch_size=8), colours())
    source = Endless(400)
    work.source, work.ahead = source, ahead
    seen = 0
    for batch in work.batches():
        assert [int(row.image) for row in batch] == list(range(seen, seen + 8))
        seen += len(batch)
        assert source.given - seen <= ahead + 1
    assert seen == work.counts.images == 400
    # Pixels wait for the model, as many as were asked for; pictures do not.
    assert source.most <= 2


def test_files_are_written_from_python_too(photos: Path, tmp_path: Path) -> None:
    found = rv.predict("tiny", photos, classes=NAMES, to=tmp_path / "out.json", device="cpu")
    whole = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [row["class"] for row in whole["predictions"]] == found.classes
    assert whole["rule"] == found.rule
    assert whole["classes"] == NAMES
    assert len(rv.predict("tiny", photos, classes=NAMES, limit=2, device="cpu")) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the images are paths or data=SPEC, and neither was given"),
        ({"images": ["a.png"], "data": "emoji"}, "both were given"),
        ({"images": ["a.png"]}, "'tiny' knows no classes of its own: pass classes=FILE"),
        ({"images": ["a.png"], "classes": NAMES}, "none of the 1 images could be read; the first, 'a.png': no such"),
        ({"images": ["."], "classes": NAMES}, "there is no image in '.'"),
        ({"data": "emoji", "alpha": 1.5}, "alpha must lie between 0 and 1, as 0.001, got 1.5"),
        ({"data": "emoji", "top": 0}, "top must be at least 1, got 0"),
        ({"data": "emoji", "format": "cvs"}, "unknown format 'cvs': did you mean 'csv'"),
        ({"data": "emoji", "format": "csv"}, "format is for a file: pass to=FILE"),
        ({"data": "emoji", "to": "a.txt"}, "a table is for the terminal"),
        ({"data": "emoji", "tpo": 3}, "there is no option 'tpo': did you mean 'to'|'top'"),
        ({"data": "emoji", "classes": ["one"]}, "at least 2 classes"),
    ],
)
def test_mistakes_name_arguments(
    options: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rv.UserError, match=said.replace("'.'", "'[.]'")) as caught:
        rv.predict("tiny", device="cpu", **options)  # type: ignore[arg-type]
    assert "--" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_loaded_classifier_takes_no_classes(photos: Path) -> None:
    with pytest.raises(rv.UserError, match="has its classes and prompts already"):
        rv.predict(colours(), photos, classes=NAMES)
    with pytest.raises(rv.UserError, match="device is for a spec; the classifier is on one already: move it with"):
        rv.predict(colours(), photos, device="cpu")
