"""`robustvlm predict` in a shell: the numbers of `evaluate` and `attack`, clean output, exit codes, 80 columns."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from command_line import Call
from PIL import Image

import robustvlm as rv
from robustvlm.defenses.immunity import immunise_without_images
from robustvlm.defenses.immunity.state import card_settings, save_tensors
from robustvlm.models.saved import Card, write_card

pytestmark = pytest.mark.usefixtures("own_place")
FEW = ["--limit", "16", "--device", "cpu"]
ATTACK = [
    "--attack",
    "pgd:steps=1",
    "--eps",
    "0.000001",
    "--checks",
    "none",
    "--eot",
    "1",
    "--draws",
    "1",
    "--name",
    "run",
]


def immunised(folder: Path) -> None:
    vlm, source = rv.load_model("tiny", device="cpu"), rv.open_data("emoji")
    made = immunise_without_images(vlm, list(source.class_names), source.templates, ["a cloud", "a stone", "a blur"])
    folder.mkdir()
    save_tensors(folder, made)
    write_card(folder, Card("immunize", base="tiny", base_fingerprint=vlm.fingerprint, settings=card_settings(made)))


@pytest.mark.parametrize("model", ["tiny", "tiny+reject:0.5", "tiny+smooth:1e-6:2", "immune"])
def test_numbers_are_those_of_evaluate_and_attack(model: str, call: Call) -> None:
    if model == "immune":
        immunised(Path("immune"))
    predicted = call("predict", model, "--data", "emoji", "--format", "json", *FEW)
    assert predicted.code == 0
    rows = json.loads(predicted.out)["predictions"]
    source = rv.open_data("emoji")
    place = {name: label for label, name in enumerate(source.class_names)}
    answers = {row["image"]: -1 if row["class"] is None else place[row["class"]] for row in rows}
    assert {row["status"] for row in rows} <= {"answered", "rejected"}

    evaluated = json.loads(call("evaluate", model, "--data", "emoji", "--json", *FEW).out)
    labels = {item.id: item.label for item in source.samples(limit=16)}  # type: ignore[union-attr]
    assert labels.keys() == answers.keys()
    assert sum(answers[name] == label for name, label in labels.items()) == evaluated["accuracy"]["successes"]
    rejected = sum(answer == -1 for answer in answers.values())
    assert rejected == (evaluated["rejected"] or {"successes": 0})["successes"]

    assert call("attack", model, "--data", "emoji", *ATTACK, *FEW).code == 0
    seen = pq.read_table("runs/run/results.parquet").to_pylist()
    assert {row["image_id"]: row["clean_prediction"] for row in seen} == answers


def test_clear_answers_under_noise_are_those_that_an_attack_finds(call: Call) -> None:
    model = "tiny+smooth:0.03:8"
    rows = json.loads(call("predict", model, "--data", "emoji", "--top", "2", "--format", "json", *FEW).out)
    clear = {
        row["image"]: row["class"]
        for row in rows["predictions"]
        if row["top"][0]["probability"] > row["top"][1]["probability"] + 0.5
    }
    assert len(clear) >= 4
    assert call("attack", model, "--data", "emoji", *ATTACK, *FEW).code == 0
    names = rv.open_data("emoji").class_names
    seen = {
        row["image_id"]: names[row["clean_prediction"]]
        for row in pq.read_table("runs/run/results.parquet").to_pylist()
        if row["image_id"] in clear
    }
    assert seen == clear


@pytest.fixture
def photos() -> Path:
    folder = Path("photos")
    folder.mkdir()
    for number, colour in enumerate(((200, 30, 40), (30, 60, 180), (20, 20, 20))):
        Image.new("RGB", (12, 9), colour).save(folder / f"{number}.png")
    (folder / "broken.png").write_text("x")
    Path("names").write_text("red\nblue\nblack\n")
    return folder


def test_a_machine_reads_rows_and_a_person_the_words(call: Call, photos: Path) -> None:
    del photos
    found = call("predict", "tiny", "photos", "--classes", "names", "--format", "csv", "--device", "cpu")
    assert found.code == 0
    rows = list(csv.DictReader(io.StringIO(found.out)))
    assert [row["image"] for row in rows] == [f"photos/{name}.png" for name in ("0", "1", "2", "broken")]
    assert rows[3]["status"] == "unreadable"
    assert rows[3]["reason"] == "not an image of a known format"
    assert "4 images: 3 answered, 1 unreadable." in found.err
    assert "Rule: the class with the largest logit." in found.err
    for form in ("json", "jsonl", "csv", "parquet"):
        ended = call("predict", "tiny", "photos", "--classes", "names", "--to", f"out.{form}", "--device", "cpu")
        assert ended.code == 0
        assert ended.out.rstrip().endswith(f"Predictions: out.{form}")
    assert Path("out.csv").read_text(encoding="utf-8") == found.out
    lines = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["class"] or "" for row in lines] == [row["class"] for row in rows]
    assert pq.read_table("out.parquet").to_pylist() == lines
    assert [
        row | {"rule": lines[0]["rule"]} for row in json.loads(Path("out.json").read_text())["predictions"]
    ] == lines
    assert not Path("runs").exists()


def test_exit_codes(call: Call, photos: Path) -> None:
    options = ["--classes", "names", "--device", "cpu"]
    strict = call("predict", "tiny", "photos", *options, "--strict", "--to", "out.csv")
    assert strict.code == 2
    assert "error: 1 of 4 images could not be read; the first, 'photos/broken.png': not an image" in strict.err
    assert len(Path("out.csv").read_text().splitlines()) == 5  # all was written
    none = call("predict", "tiny", str(photos / "broken.png"), *options, "--format", "csv")
    assert none.code == 2
    assert "none of the 1 images could be read" in none.err
    assert none.out.count("\n") == 2
    (photos / "broken.png").unlink()
    assert call("predict", "tiny", "photos", *options, "--strict").code == 0
    Path("nothing").mkdir()
    empty = call("predict", "tiny", "nothing", *options, "--to", "new.csv")
    assert empty.code == 2
    assert "there is no image in 'nothing'" in empty.err
    assert not Path("new.csv").exists()
    assert "pass --classes FILE" in call("predict", "tiny", "photos").err
    assert "pass --data emoji" in call("predict", "tiny", "emoji", *options).err
    assert "leave out --alpha" in call("predict", "tiny", "photos", *options, "--alpha", "0.01").err


def test_paths_come_from_standard_input(call: Call, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.fsencode("\n".join(str(photos / f"{number}.png") for number in (2, 0)))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(listed)))
    found = call("predict", "tiny", "-", "--classes", "names", "--format", "jsonl", "--to", "-", "--device", "cpu")
    assert [json.loads(line)["image"] for line in found.out.splitlines()] == ["photos/2.png", "photos/0.png"]


@pytest.mark.parametrize("model", ["tiny", "tiny+reject:0.5"])
def test_the_table_fits_80_columns(model: str, call: Call, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (photos / "0.png").rename(photos / os.fsdecode(b"\x1b[2J=\xff" + b"long " * 20 + b".png"))
    found = call("predict", model, "photos", "--classes", "names", "--top", "3", "--device", "cpu")
    assert found.code == 0
    assert max(map(len, found.out.splitlines())) <= 80
    assert "\x1b" not in found.out
    assert "4 images: " in found.out
    assert "unreadable" in found.out


def test_abstention_and_its_rule_are_said(call: Call, photos: Path) -> None:
    del photos
    options = ["--classes", "names", "--device", "cpu"]
    found = call("predict", "tiny+smooth:0.5:4", "photos", *options, "--alpha", "1e-6")
    assert "4 images: 0 answered, 3 abstained, 1 unreadable." in found.out
    assert "Rule: the class that 4 noisy copies (sigma 0.5) decide at alpha 1e-06, else abstain." in found.out
    assert "more draws" in found.out
    plain = call("predict", "tiny+smooth:0.5:4", "photos", *options)
    assert "for the mean of 4 noisy copies (sigma 0.5), significant or not." in plain.out
