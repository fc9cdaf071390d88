"""Prompt-tuning runs from start to end: a folder that is a model, taken up again, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import robustvlm as rv
from robustvlm.cli.app import typer_command
from robustvlm.commands.detect.scoring import negative_prompts
from robustvlm.commands.detect.words import oracle_titles, words_sentence
from robustvlm.commands.prompts import TUNE_PROMPTS, PromptSettings
from robustvlm.commands.prompts.work import without_taught
from robustvlm.data import DataSource, open_data
from robustvlm.data.specs import open_unlabelled
from robustvlm.defenses import SmoothedVLM, load_classifier
from robustvlm.defenses.prompts import Features
from robustvlm.detect import Supplies, head_of, make_scores
from robustvlm.errors import UserError
from robustvlm.models.saved import read_card
from robustvlm.runs.run import Run
from robustvlm.runs.settings import Observer
from robustvlm.stats import rate

NAMES = ["cat", "dog", "fox"]


class Counting(Observer):
    """Counts the images that are encoded."""

    def __init__(self) -> None:
        self.images, self.title = 0, ""

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        del total, done
        self.title = title

    def advance(self, count: int = 1, **shown: str) -> None:
        del shown
        self.images += count if self.title == "Encoding" else 0


@pytest.fixture
def photos(make_folder: Callable[..., Path]) -> Path:
    return make_folder()


@pytest.fixture
def prepare(photos: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(name: str = "run", **settings: Any) -> Run:
        few = {"model": "tiny", "data": f"imagefolder:{photos}", "shots": 4, "epochs": 2}
        place = {"out": tmp_path / "runs", "name": name}
        return Run(TUNE_PROMPTS, PromptSettings(**(few | place | settings)))

    return make


def test_a_run_is_a_model_with_the_tuned_embeddings(prepare: Callable[..., Run]) -> None:
    run = prepare()
    record = run.start().summary
    assert record.images == 12
    assert set(record.history[0]) == {"cross_entropy", "masked_cross_entropy", "energy_change", "loss"}
    spec, pixels = str(run.folder.path), torch.rand(2, 3, 64, 64, requires_grad=True)
    classifier = load_classifier(spec, NAMES, ["a {}"])
    texts = load_file(run.folder.path / "prompts.safetensors")["class_embeddings"]
    with torch.no_grad():
        torch.testing.assert_close(texts, run.work.learner())
    logits = classifier(pixels)
    expected = run.work.vlm.logit_scale * run.work.vlm.encode_image(pixels) @ texts.T
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


def test_classes_are_found_by_name_and_others_refused(prepare: Callable[..., Run]) -> None:
    run = prepare()
    run.start()
    spec, pixels = str(run.folder.path), torch.rand(1, 3, 64, 64)
    whole, part = load_classifier(spec, NAMES, ["{}"]), load_classifier(spec, ["Fox", "cat"], ["{}"])
    torch.testing.assert_close(part(pixels), whole(pixels)[:, [2, 0]])
    assert whole.fingerprint != part.fingerprint != load_classifier("tiny", NAMES, ["{}"]).fingerprint
    assert isinstance(load_classifier(f"{spec}+smooth:0.1:4", NAMES, ["{}"]).vlm, SmoothedVLM)
    with pytest.raises(UserError, match="were tuned for 3 classes, 'wolf' is none of them"):
        load_classifier(spec, ["cat", "wolf"], ["{}"])


def test_a_finished_run_is_taken_up_and_an_unfinished_one_made_again(prepare: Callable[..., Run]) -> None:
    record = prepare().start().summary
    path = prepare().folder.path
    before = load_file(path / "prompts.safetensors")
    counting = Counting()
    assert prepare().start(counting).summary == record
    assert counting.images == 0
    # Killed before the card was written: no model, and made again to the same bits.
    (path / "model.json").unlink()
    assert prepare().start(counting).summary == record
    assert counting.images == 12
    assert all(torch.equal(value, before[name]) for name, value in load_file(path / "prompts.safetensors").items())
    with pytest.raises(UserError, match=r"made with other settings \(seed: 0 -> 1\)"):
        prepare(seed=1).start()
    assert prepare(seed=1).start(fresh=True).summary != record


def test_without_the_energy_terms_it_is_coop(prepare: Callable[..., Run]) -> None:
    record = prepare(ebm=False).start().summary
    assert set(record.history[0]) == {"cross_entropy", "loss"}


def test_lapt_learns_words_beside_the_classes(
    prepare: Callable[..., Run], make_folder: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    others = make_folder(9, "others")
    for name in NAMES:
        (others / name).rename(others / {"cat": "music", "dog": "wolf", "fox": "tree"}[name])
    (tmp_path / "words.txt").write_text("\n".join(["sea", "winter", "engine", "music", "paper", "cat", "clock"]))
    asked = {"words": tmp_path / "words.txt", "val": f"imagefolder:{photos}", "ood": [f"far=imagefolder:{others}"]}
    run = prepare(lapt=True, **asked)
    # A class is no word outside the classes, and what an unknown set shows would tell what is measured.
    assert run.work.words == ("sea", "winter", "engine", "paper", "clock")
    record = run.start().summary
    assert set(record.history[0]) == {"cross_modal", "cross_distribution", "loss"}
    assert set(record.tuned.auroc) == {"far"}
    assert any(
        note.startswith("1 words that name what the unknown sets show were left out: music") for note in record.notes
    )
    with pytest.raises(UserError, match="ebm is of energy terms, which lapt has none of"):
        prepare(lapt=True, ebm=False)
    for name, value in (("lambda_ebm", 3.0), ("c", 7)):
        with pytest.raises(UserError, match=f"{name} is of energy terms, which lapt has none of"):
            prepare(lapt=True, **{name: value})
    spec, kept = str(run.folder.path), load_file(run.folder.path / "prompts.safetensors")
    classifier = load_classifier(spec, NAMES, ["a {}"])
    assert torch.equal(classifier.negative_embeddings, kept["negative_embeddings"])
    assert len(classifier.negative_words) == len(kept["negative_embeddings"]) == 1  # 15 % of the five
    assert not torch.equal(kept["negative_context"], kept["context"])
    supplies = Supplies(head_of(classifier), negatives=kept["negative_embeddings"])
    made, skipped = make_scores(["lapt"], supplies)
    assert made["lapt"].predict(kept["class_embeddings"]).shape == (3,)
    assert not skipped
    assert "tune-prompts --lapt" in make_scores(["lapt"], Supplies(head_of(classifier)))[1][0].reason
    # Words that name what is judged are left out when the model is judged, or make an oracle.
    (word,) = classifier.negative_words
    (others / "music").rename(others / word)
    far = [("far", open_unlabelled(f"imagefolder:{others}", NAMES))]
    with pytest.raises(UserError, match="every negative prompt of the model names a class of the unknown sets"):
        negative_prompts(classifier, far, oracle=False)
    assert torch.equal(negative_prompts(classifier, [], oracle=False).embeddings, classifier.negative_embeddings)


def test_detect_leaves_out_negative_prompts_that_name_what_is_judged_or_calls_them_an_oracle(
    prepare: Callable[..., Run], make_folder: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    words = "sea, winter, engine, paper, clock, bread, chair, train, river, cloud, stone, glass, lamp"
    (tmp_path / "words.txt").write_text(words.replace(", ", "\n"))
    folder = prepare(lapt=True, words=tmp_path / "words.txt").start().folder
    classifier = load_classifier(str(folder), NAMES, ["a {}"])
    named, other = classifier.negative_words  # 15 % of thirteen
    unknown = make_folder(9, "unknown")
    for old, new in zip(NAMES, (named, "wolf", "tree"), strict=True):
        (unknown / old).rename(unknown / new)

    def judged(name: str, **options: Any) -> Any:
        data = {"id": f"imagefolder:{photos}", "ood": [f"far=imagefolder:{unknown}"], "fit": "none"}
        asked = {"scores": "lapt,energy", "out": tmp_path / "judged", "name": name}
        return rv.detect(str(folder), **data, **asked, **options)

    plain, oracle = judged("plain"), judged("oracle", oracle_words=True)
    for run, used in ((plain, [other]), (oracle, [named, other])):
        negatives = run.summary.negatives
        assert (negatives.used, negatives.naming, negatives.oracle) == (len(used), {named: "far"}, run is oracle)
        # The score is that of the rows that were used and of no others.
        left = [row for row, word in enumerate(classifier.negative_words) if word in used]
        supplies = Supplies(head_of(classifier), negatives=classifier.negative_embeddings[left])
        mine = make_scores(["lapt"], supplies)[0]["lapt"]
        [path] = (run.folder / "features").glob("known-*.safetensors")
        with safe_open(path, "pt") as file:
            names, features = json.loads(file.metadata()["ids"]), file.get_tensor("features")
        rows = [row for row in pq.read_table(run.folder / "results.parquet").to_pylist() if row["set"] == "known"]
        stored = {row["image_id"]: row["lapt"] for row in rows}
        assert [stored[name] for name in names] == pytest.approx(mine.score(features).tolist(), abs=1e-5)
    assert oracle_titles(plain.summary) == []
    assert oracle_titles(oracle.summary) == [score.title for score in oracle.summary.scores if score.name == "lapt"]
    assert "Oracle: LAPT" in (words_sentence(oracle.summary) or "")
    assert "1 negative prompts that name classes of the unknown sets were left out" in (
        words_sentence(plain.summary) or ""
    )
    # Leaving rows out does not undo what the context of the classes has learnt from them.
    assert any("were learnt against 1 words" in check.message for check in plain.summary.checks)


def test_validation_and_unknown_images_are_measured(
    prepare: Callable[..., Run], make_folder: Callable[..., Path], photos: Path
) -> None:
    others = make_folder(9, "others")
    for name in ("dog", "fox"):
        (others / name).rename(others / f"no {name}")
    ood, cats = f"imagefolder:{others}", len(list((others / "cat").iterdir()))
    record = prepare(val=f"imagefolder:{photos}", ood=[f"other={ood}"]).start().summary
    assert record.notes[0] == "12 images of --val taught the prompts and were left out"
    assert f"{cats} images of 'other' are of known classes and were left out" in record.notes
    for found in (record.zero_shot, record.tuned):
        assert found.accuracy.total == 36 - 12
        value, low, high = found.auroc["other"]
        assert 0 <= low <= value <= high <= 1


def test_images_that_taught_are_no_validation(prepare: Callable[..., Run], photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="or a copy of it, taught the prompts: pass others, or fewer shots"):
        prepare(shots=0, val=f"imagefolder:{photos}").start()
    link = tmp_path / "link"
    link.symlink_to(photos)  # the same place under another name
    with pytest.raises(UserError, match="or a copy of it, taught the prompts: pass others, or fewer shots"):
        prepare(name="link", shots=0, val=f"imagefolder:{link}").start()
    (tmp_path / "copy").mkdir()
    for name in NAMES:
        copied = tmp_path / "copy" / name
        copied.mkdir()
        for number, path in enumerate(sorted((photos / name).iterdir())):
            (copied / f"other-{number}.png").write_bytes(path.read_bytes())
    record = prepare(name="copy", val=f"imagefolder:{tmp_path / 'copy'}").start().summary
    assert record.notes == ["12 images of --val look to the model like images that taught the prompts"]


def test_copies_of_drawings_that_taught_are_left_out() -> None:
    train, val = (open_data(f"emoji?split=train&styles=noto&copies={n}") for n in (1, 2))

    def found(source: DataSource, ids: list[str]) -> Features:
        count = len(ids)
        return Features(torch.eye(count), torch.zeros(count), tuple(ids), tuple(map(source.group, ids)))

    left, notes = without_taught(found(val, val.ids()), val, found(train, train.ids()[:3]), train)
    assert (len(left.ids), len(set(left.groups))) == (2 * (139 - 3), 139 - 3)
    assert notes == [
        "3 images of --val taught the prompts and were left out",
        "3 images of --val are copies of images that taught the prompts and were left out",
    ]


def test_copies_of_a_drawing_count_once_in_the_accuracy(prepare: Callable[..., Run]) -> None:
    work = prepare(data="emoji?split=train&styles=noto&copies=1").work
    count = len(work.source.class_names)
    labels = torch.arange(12) // 4  # four copies of each of three drawings
    texts = torch.eye(count)
    seen = Features(texts[labels], labels, tuple(map(str, range(12))), tuple(str(n // 4) for n in range(12)))
    assert work._measures(seen, {}, texts).accuracy == rate(12, 12, independent=3)


def test_names_of_classes_are_those_of_the_validation_images_too(
    prepare: Callable[..., Run], photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    files = [sorted((photos / name).iterdir()) for name in NAMES]
    for name, chosen in (("train", slice(0, 6)), ("val", slice(6, 9))):
        images = [(path.read_bytes(), label) for label, paths in enumerate(files) for path in paths[chosen]]
        pixels, labels = zip(*images, strict=True)
        pq.write_table(pa.table({"image": list(pixels), "label": list(labels)}), tmp_path / f"{name}.parquet")
    train, val = (f"parquet:{tmp_path / name}.parquet" for name in ("train", "val"))
    run = prepare(data=train, val=val, classes=tmp_path / "names.txt")
    assert run.start().summary.tuned.accuracy.total == 9


def test_mistakes_are_found_before_any_work(prepare: Callable[..., Run]) -> None:
    for wrong, message in (
        ({"shots": -1}, "shots must be at least 0, got -1"),
        ({"c": 0}, "c must be at least 1, got 0"),
        ({"context": 40}, "40 context vectors do not fit"),
        ({"context": 22}, r"22 context vectors do not fit .* pass context=\d+ or fewer"),
        ({"ood": ["emoji"]}, "pass val=DATA with known images too"),
        ({"words": Path("w.txt")}, "words are for lapt: pass both"),
        ({"lapt": True, "words": Path("w.txt")}, "no words file"),
        ({"val": "emoji"}, "has other classes than"),
        ({"model": "tiny+smooth:0.1", "epochs": 0}, "epochs must be at least 1"),
        ({"name": "../out"}, "the run name '../out' is not allowed"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(**wrong)


def test_classes_that_the_text_tower_takes_for_one_are_refused(prepare: Callable[..., Run], photos: Path) -> None:
    (photos / "dog").rename(photos / "CAT")
    with pytest.raises(UserError, match="'CAT' and 'cat' have the same embedding in 'tiny'"):
        prepare().start()


def test_a_damaged_folder_is_one_clear_line(prepare: Callable[..., Run]) -> None:
    run = prepare()
    run.start()
    path = run.folder.path
    card = json.loads((path / "model.json").read_text())
    card["settings"]["class_names"] = ["cat", "dog"]
    (path / "model.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="is damaged: its embeddings do not fit its classes"):
        load_classifier(str(path), ["cat", "dog"], ["{}"])
    (path / "prompts.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        load_classifier(str(path), ["cat", "dog"], ["{}"])


def test_the_command_prints_what_changed(photos: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(typer_command(TUNE_PROMPTS))
    data = [
        "--data",
        f"imagefolder:{photos}",
        "--val",
        f"imagefolder:{photos}",
        "--out",
        str(tmp_path),
        "--name",
        "r",
        "--shots",
        "4",
    ]
    result = CliRunner().invoke(app, ["tiny", *data, "--epochs", "1", "--no-ebm"], catch_exceptions=False)
    assert result.exit_code == 0
    said = " ".join(result.stdout.split())
    assert "Hand-written prompts" in said
    assert "note: 12 images of --val taught the prompts and were left out" in said
    card = read_card(tmp_path / "r")
    assert card is not None
    assert (card.kind, card.base, card.settings["class_names"]) == ("tune-prompts", "tiny", NAMES)


_OWN = """
import torch

class Own:
    image_size, logit_scale = 8, 10.0

    def encode_image(self, pixels):
        return pixels.mean((2, 3))

    def encode_text(self, texts):
        return torch.eye(3)[torch.arange(len(texts)) % 3]
"""


def test_an_own_encoder_without_token_embeddings_is_refused(
    prepare: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts_own.py").write_text(_OWN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"prompts can be tuned for open_clip models and .*; 'prompts_own:Own' is none"):
        prepare(model="prompts_own:Own")
