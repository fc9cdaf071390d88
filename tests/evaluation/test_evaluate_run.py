"""An evaluation as a run: rows, resumption, and numbers equal to other programs' formulas, written out anew."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

import robustvlm as rv
from robustvlm.commands.evaluate import looks
from robustvlm.commands.evaluate.looks import Looker
from robustvlm.commands.evaluate.measures import (
    macro_std,
    macro_std_draws,
    mean_per_class_recall,
    places,
    retrieval_places,
)
from robustvlm.commands.evaluate.record import ImageRow, measured, recalls, uneven
from robustvlm.core.framing import to_pixels
from robustvlm.data.labels import captions_of
from robustvlm.data.trees import Tree
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.stats import rate

CPU = {"device": "cpu"}


# Second implementations


def top_k(logits: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """As CLIP_benchmark and open_clip count it: the label is among the classes of the k largest logits."""
    return sum(int(label) in row.topk(k).indices.tolist() for row, label in zip(logits, labels, strict=True)) / len(
        logits
    )


def clip_benchmark(images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor, k: int) -> tuple[float, float]:
    """Text and image retrieval as CLIP_benchmark defines it: at least one positive pair among the k best."""
    scores = texts @ images.T
    of_image = [
        any(int(owner[text]) == image for text in column.topk(k).indices.tolist())
        for image, column in enumerate(scores.T)
    ]
    of_text = [int(owner[text]) in row.topk(k).indices.tolist() for text, row in enumerate(scores)]
    return float(np.mean(of_image)), float(np.mean(of_text))


def open_clip_ranks(scores: torch.Tensor) -> np.ndarray:
    """The place, from 0, of pair i in row i sorted in descending order: open_clip's ranks, one text an image."""
    order = np.argsort(-scores.numpy(), axis=1)
    return np.array([list(row).index(i) for i, row in enumerate(order)])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(5, 12), count=st.integers(1, 40))
def test_top_k_and_recall_are_those_of_others(seed: int, classes: int, count: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(count, classes, generator=random), torch.randint(classes, (count,), generator=random)
    place = places(logits, labels)
    for k in (1, 5):
        assert float((place <= k).float().mean()) == pytest.approx(top_k(logits, labels, k))
    right = (logits.argmax(1) == labels).tolist()
    # Theirs warns of predicted classes without images, which do not count.
    said = [int(p) if int(p) in labels.tolist() else int(labels[(labels != y).nonzero()[0, 0]]) if (labels != y).any()
            else -1 for p, y in zip(logits.argmax(1), labels, strict=True)]  # fmt: skip
    if -1 not in said:
        expected = balanced_accuracy_score(labels.tolist(), said)
        assert mean_per_class_recall(labels.tolist(), right) == pytest.approx(expected)


def test_places_of_equal_logits_follow_the_order_of_classes() -> None:
    assert places(torch.zeros(3, 4), torch.tensor([0, 2, 3])).tolist() == [1, 3, 4]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(10, 30), most=st.integers(1, 4))
def test_retrieval_is_that_of_others(seed: int, count: int, most: int) -> None:
    random = torch.Generator().manual_seed(seed)
    each = torch.randint(1, most + 1, (count,), generator=random)
    owner = torch.arange(count).repeat_interleave(each)
    images = torch.nn.functional.normalize(torch.randn(count, 6, generator=random), dim=1)
    noise = torch.randn(len(owner), 6, generator=random)
    texts = torch.nn.functional.normalize(images[owner] + 0.7 * noise, dim=1)
    found = recalls(*retrieval_places(images, texts, owner), owner)
    for k in (1, 5, 10):
        text, image = clip_benchmark(images, texts, owner, k)
        assert found.text[k].value == pytest.approx(text)
        assert found.image[k].value == pytest.approx(image)
    if most == 1:
        ranks = open_clip_ranks(images @ texts.T), open_clip_ranks(texts @ images.T)
        for k in (1, 5, 10):
            assert (found.text[k].value, found.image[k].value) == pytest.approx([(r < k).mean() for r in ranks])
        assert found.image[1] == rate(found.image[1].successes, count)


def test_ties_count_against_and_captions_of_an_image_are_no_independent_evidence() -> None:
    images = torch.eye(2)[[0, 0, 1]]
    of_images, of_texts = retrieval_places(images, images[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 2]))
    assert of_images.tolist() == [2, 2, 1]
    assert of_texts.tolist() == [2, 2, 1, 1]
    few, many = (
        recalls(torch.ones(50), torch.tensor([1, 9] * n), torch.arange(50).repeat_interleave(n // 25))
        for n in (25, 250)
    )
    assert (many.image[1].value, many.image[1].total) == (0.5, 500)
    # Ten captions an image tell no more than one.
    assert (many.image[1].low, many.image[1].high) == pytest.approx((few.image[1].low, few.image[1].high))
    # One image has half of all captions: they are worth 2 * 99 / 50 of 100 images, or 3.96.
    owner = torch.cat([torch.arange(100), torch.zeros(98, dtype=torch.int64)])
    uneven = recalls(torch.ones(100), torch.tensor([1, 9] * 99), owner).image[1]
    assert uneven == rate(99, 198, independent=198**2 / (99**2 + 99), each="image")
    twice = recalls(torch.ones(50), torch.ones(50), torch.arange(50), groups=[str(n // 2) for n in range(50)])
    assert twice.text[1] == rate(50, 50, independent=25)
    assert (twice.image[1].low, twice.image[1].high) == (twice.text[1].low, twice.text[1].high)


def alone(counts: np.ndarray) -> np.ndarray:
    """The groups of images that stand for themselves, of (images, right) of each subgroup."""
    return np.array([(part, 1, i < right) for part, (images, right) in enumerate(counts) for i in range(images)])


def test_macro_std_by_hand_by_chance_and_where_there_is_a_difference() -> None:
    # One class: weights 1/4 and 3/4, accuracies 1 and 1/3, of the class 1/2.
    assert macro_std({0: np.array([[2, 2], [6, 2]])}) == pytest.approx((0.25 * 0.25 + 0.75 / 36) ** 0.5)
    assert macro_std({0: np.array([[9, 9], [3, 3]])}) == 0
    assert macro_std({0: np.array([[5, 5], [5, 0]])}) == 0.5
    generator = np.random.default_rng(3)
    alike, over = [], 0
    for draw in range(60):  # subgroups that differ by chance alone
        counts = {k: np.stack([np.full(4, 12), generator.binomial(12, 0.7, 4)], 1) for k in range(8)}
        chance = macro_std_draws({k: alone(table) for k, table in counts.items()}, seed=draw, draws=200)[1]
        alike.append(macro_std(counts) - chance.mean())
        over += (chance >= macro_std(counts)).mean() <= 0.05
    assert abs(np.mean(alike)) < 0.005
    assert over <= 9  # three are expected


def test_a_spread_of_copies_is_held_against_the_chance_of_whole_drawings() -> None:
    generator = np.random.default_rng(5)
    for low, high in ((4, 5), (1, 5)):  # copies of a drawing: as many of each, and not
        over = 0
        for _ in range(60):
            facts = [
                (label, "abc"[drawing % 3], right, f"{label}/{drawing}")
                for label in range(8)
                for drawing in range(12)
                for right in [bool(generator.random() < 0.7)] * int(generator.integers(low, high))
            ]
            over += uneven(facts)["p_value"] < 0.05  # type: ignore[index]
        assert over <= 8  # three are expected; copies taken one by one make it nearly all
    alone = [(label, part, right, str(number)) for number, (label, part, right, _) in enumerate(facts)]
    groups, single = uneven(facts), uneven(alone)
    assert groups is not None
    assert single is not None
    assert groups["value"] == single["value"]
    assert groups["by_chance"] > single["by_chance"]
    assert groups["high"] - groups["low"] > single["high"] - single["low"]


def test_images_that_are_no_copies_are_drawn_as_they_were_before_there_were_groups() -> None:
    counts = {0: np.array([[7, 5], [3, 0], [9, 9]]), 1: np.array([[4, 4], [2, 2]])}
    found = macro_std_draws({label: alone(table) for label, table in counts.items()}, draws=40)
    assert [round(float(one.mean()), 6) for one in found] == [0.160863, 0.070903]


def test_measures_follow_from_rows() -> None:
    rows = [
        ImageRow(n, str(n), n % 6, "ab"[n % 2], prediction=n % 6 if n % 4 else 0, correct=bool(n % 4 or n % 6 == 0),
                 place=1 if n % 4 or n % 6 == 0 else 4 + n % 3, confidence=0.5 + n / 100)
        for n in range(24)
    ]  # fmt: skip
    found = measured(reversed(rows), None, "abcdef")
    assert found["accuracy"].successes == sum(bool(row.correct) for row in rows)
    assert found["top5"].successes == sum((row.place or 9) <= 5 for row in rows)
    assert found["unevenness"] == []  # every class is of one subgroup alone
    assert measured([ImageRow(0, "a", -1)], None, "abcdef")["images"] == 0


def test_copies_of_a_drawing_count_once_in_intervals() -> None:
    rows = [
        ImageRow(n, str(n), n % 3, "ab"[n // 30], n % 3, n % 5 > 0, 1, 0.5, accepted=n % 5 > 0, undecided=False)
        for n in range(60)
    ]
    alone, copies = (measured(rows, None, "abcde", group=group) for group in (str, lambda name: str(int(name) // 6)))
    assert (alone["worth"], copies["worth"]) == (60, 10)
    assert alone["accuracy"] == rate(48, 60)
    for name in ("accuracy", "top5", "rejected"):
        assert alone[name].value == copies[name].value
        assert copies[name].low < alone[name].low < alone[name].high < copies[name].high
    parts = zip(alone["unevenness"][0].parts, copies["unevenness"][0].parts, strict=True)
    assert all(many.accuracy.low < one.accuracy.low for one, many in parts)


def test_unevenness_over_subgroups_and_over_classes_takes_copies_as_one() -> None:
    rows = [
        ImageRow(n, f"{n // 4}/{n % 4}", n // 4 % 4, "ab"[n // 4 % 8 // 4], n // 4 % 4, n // 4 % 3 > 0, 1, 0.5)
        for n in range(240)
    ]
    trees = (Tree((("a", "x"), ("b", "x"), ("c", "y"), ("d", "y"))),)
    alone, copies = (measured(rows, trees, "abcd", group=group)["unevenness"]
                     for group in (str, lambda name: name.partition("/")[0]))  # fmt: skip
    assert [one.by for one in copies] == ["subgroups", "classes"]
    for one, many in zip(alone, copies, strict=True):
        assert one.value == many.value
        assert one.by_chance < 0.7 * many.by_chance


def test_refusals_and_withheld_answers_are_told_apart_only_where_all_rows_are() -> None:
    def row(n: int, accepted: bool, undecided: bool | None) -> ImageRow:
        return ImageRow(n, str(n), 0, "", 0, accepted, 1, 0.5, accepted, undecided)

    told = [row(0, True, False), row(1, False, True), row(2, False, False), row(3, False, True)]
    found = measured(told, None, "ab", abstains=True)
    assert (found["rejected"].successes, found["abstained"].successes) == (1, 2)
    older = [row(4, False, None), *told]  # a run that went on after the two were told apart
    found = measured(older, None, "ab", abstains=True)
    assert found["abstained"].successes == 4
    assert "rejected" not in found


# The run


def test_a_run_has_rows_and_a_report_and_is_read_back(tmp_path: Path) -> None:
    run = rv.evaluate("tiny", data="emoji?split=train&copies=1", limit=60, batch_size=16, out=tmp_path, **CPU)
    rows = run.rows.to_pylist()
    assert len({row["image_id"] for row in rows}) == run.images == 60
    assert sum(row["correct"] for row in rows) == run.accuracy.successes
    assert sum(row["place"] <= 5 for row in rows) == run.top5.successes
    assert {row["subgroup"] for row in rows} > {"noto", "fxemoji"}
    assert {row["prediction"] == row["label"] for row in rows if row["correct"]} == {True}
    text = run.report.read_text(encoding="utf-8")
    assert "Reliability" in text
    assert "guo2017" in text
    again = rv.open_run(run.folder)
    assert (again.summary, type(again)) == (run.summary, type(run))
    kept = (run.folder / "summary.json").stat().st_mtime_ns
    rv.evaluate("tiny", data="emoji?split=train&copies=1", limit=60, batch_size=16, out=tmp_path, **CPU)
    assert (run.folder / "summary.json").stat().st_mtime_ns == kept


class Killed(BaseException):
    pass


@pytest.mark.parametrize("spec", ["tiny+smooth:0.1:2", "tiny+reject:0.6"])
def test_a_run_that_was_killed_ends_as_a_straight_one(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"data": "emoji?copies=1", "limit": 30, "batch_size": 8, "out": tmp_path} | CPU
    straight = rv.evaluate(spec, name="straight", **asked)
    before, looked = looks.Looker._look, []

    def killed(self: looks.Looker, number: int, *rest: object) -> looks.Look:
        if number == 2 and not looked:
            looked.append(number)
            raise Killed
        return before(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(looks.Looker, "_look", killed)
    with pytest.raises(Killed):
        rv.evaluate(spec, name="killed", **asked)
    lines = (tmp_path / "killed" / "journal.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "batch" for line in lines) == 2
    again = rv.evaluate(spec, name="killed", **asked)
    assert again.rows.equals(straight.rows)
    changed = {"seconds": 0.0}
    assert again.summary.model_copy(update=changed) == straight.summary.model_copy(update=changed)


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Emoji with captions: of every other one two, of the last none."""
    source = rv.open_data("emoji?copies=1")
    # One of each class: of images that share a caption a tie decides, in the others' programs by chance.
    items = list({item.label: item for item in source.samples(limit=40)}.values())[:24]  # type: ignore[union-attr]
    names = source.class_names
    images, captions = [], []
    for number, item in enumerate(items):
        buffer = io.BytesIO()
        item.image.save(buffer, "PNG")  # type: ignore[union-attr]
        images.append(buffer.getvalue())
        name = names[item.label]  # type: ignore[union-attr]
        captions.append([f"an emoji of a {name}", f"the {name} emoji"][: 1 + number % 2])
    captions[-1] = []
    labels = [item.label for item in items]  # type: ignore[union-attr]
    parts = ["odd" if number % 2 else "even" for number in range(len(items))]
    path = tmp_path / "captioned.parquet"
    table = {"image": images, "captions": captions, "kind": parts, "number": labels}
    pq.write_table(pa.table(table), path)
    return path


def test_captions_alone_are_enough(captioned: Path, tmp_path: Path) -> None:
    asked = {"data": f"parquet:{captioned}?captions=captions&subgroup=kind", "batch_size": 7, "out": tmp_path} | CPU
    run = rv.evaluate("tiny", **asked)
    found = run.retrieval
    assert (run.images, run.accuracy.value, found.images, found.captions, found.without) == (0, None, 23, 34, 1)
    # By hand, in one piece.
    vlm = rv.load_model("tiny", device="cpu")
    table = pq.read_table(captioned).to_pylist()[:-1]
    pixels = torch.stack([to_pixels(Image.open(io.BytesIO(row["image"])).convert("RGB"), vlm.framing) for row in table])
    owner = torch.tensor([n for n, row in enumerate(table) for _ in row["captions"]])
    with torch.no_grad():
        images, texts = vlm.encode_image(pixels), vlm.encode_text([t for row in table for t in row["captions"]])
    for k in (1, 5, 10):
        assert (found.text[k].value, found.image[k].value) == pytest.approx(clip_benchmark(images, texts, owner, k))
    assert found.text[1].value > 0.5
    rows, captions = run.rows.to_pylist(), pq.read_table(run.folder / "captions.parquet").to_pylist()
    assert sum((row["caption_place"] or 99) <= 1 for row in rows) == found.text[1].successes
    assert [row["caption"] for row in captions][:1] == table[0]["captions"]
    assert sum(row["image_place"] <= 5 for row in captions) == found.image[5].successes
    assert "R@10" in run.report.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"at least 2 classes"):
        rv.attack("tiny", data=asked["data"], limit=2, out=tmp_path)


class _Blind(VLM):
    """An encoder whose texts are not numbers."""

    def __init__(self) -> None:
        super().__init__(spec="blind", image_size=8, logit_scale=1.0)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        return torch.full((len(texts), 3), float("nan"))


def test_texts_that_are_no_numbers_are_found_by_no_image(captioned: Path) -> None:
    source = rv.open_data(f"parquet:{captioned}?captions=captions")
    with pytest.raises(UserError, match=r"features with NaN or infinite values for 'an? .*emoji"):
        list(Looker(_Blind(), source, 4, 4).looks())
    nan = torch.full((2, 3), float("nan"))
    of_images, of_texts = retrieval_places(torch.eye(3)[:2], nan, torch.tensor([0, 1]))
    assert of_images.min() > 1
    assert of_texts.min() > 1


def test_long_captions_are_told_of(captioned: Path, tmp_path: Path) -> None:
    table = pq.read_table(captioned).to_pydict()
    table["captions"][0] = ["word " * 100]
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table(table), path)
    run = rv.evaluate("tiny", data=f"parquet:{path}?captions=captions", out=tmp_path, **CPU)
    assert run.retrieval.cut == 1
    assert "1 caption cut at what the text tower reads" in run.report.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [5, [{"raw": "a dog"}], [["a dog"]], {"caption": "a dog"}])
def test_a_caption_is_a_text(value: object) -> None:
    with pytest.raises(UserError, match="a caption must be a text or a list of texts, got"):
        captions_of(value)


def test_captions_and_classes_together(captioned: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(rv.open_data("emoji").class_names), encoding="utf-8")
    spec = f"parquet:{captioned}?label=number&captions=captions&subgroup=kind"
    run = rv.evaluate("tiny", data=spec, classes=names, out=tmp_path, **CPU)
    assert (run.images, run.retrieval.images) == (24, 23)
    plain = rv.evaluate("tiny", data=f"parquet:{captioned}?label=number", classes=names, out=tmp_path, **CPU)
    assert plain.accuracy == run.accuracy
    assert plain.retrieval is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("captions=caption", "no column 'caption'"),
        ("captions=number", "captions are texts or lists of texts"),
        ("captions=captions&subgroup=kinds", "did you mean 'kind'"),
    ],
)
def test_columns_that_are_not_there_are_named(captioned: Path, options: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rv.open_data(f"parquet:{captioned}?{options}")


def test_a_changed_tree_file_is_not_shown_as_the_run_of_the_earlier_one(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    tree = tmp_path / "tree.json"
    leaves = [{"name": "pet", "children": [{"name": "cat"}, {"name": "dog"}]}, {"name": "fox"}]
    options: dict[str, Any] = {"data": f"imagefolder:{make_folder(9)}", "tree": tree, "out": tmp_path, "name": "run"}
    tree.write_text(json.dumps({"name": "all", "children": leaves}))
    rv.evaluate("small_encoders:Encoder", **options, **CPU)
    tree.write_text(json.dumps({"name": "all", "children": [{"name": "beast", "children": leaves}]}))
    with pytest.raises(UserError, match="tree: other content of the same name"):
        rv.evaluate("small_encoders:Encoder", **options, **CPU)
