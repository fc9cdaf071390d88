"""Corrupted images in runs of `evaluate` and `detect`: rows, numbers made of them anew, resumption, refusals."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from detecting import DetectRun, Interrupt, lasting

import robustvlm as rv
from robustvlm.commands.detect.view import read_run, write_report
from robustvlm.commands.evaluate import looks
from robustvlm.commands.evaluate.beside import evenness, table, write_beside
from robustvlm.commands.evaluate.corrupted import Answer, blocks, measured
from robustvlm.commands.evaluate.measures import macro_std
from robustvlm.commands.evaluate.record import ImageRow
from robustvlm.commands.evaluate.view import spread_cells
from robustvlm.commands.index import batch_of
from robustvlm.core.framing import to_pixels
from robustvlm.data.corruptions import parse_corruptions, weights_of
from robustvlm.data.splits import group_of
from robustvlm.defenses import load_classifier
from robustvlm.errors import UserError
from robustvlm.report import sections as doc
from robustvlm.report.words import DASH, RANGE, as_rate, interval, percent
from robustvlm.stats import rate

CPU = {"device": "cpu"}


class Killed(BaseException):
    pass


def test_an_evaluation_asks_about_every_corrupted_image(tmp_path: Path) -> None:
    asked = {"data": "emoji?copies=1", "limit": 20, "batch_size": 8, "out": tmp_path} | CPU
    run = rv.evaluate("tiny+reject:0.6", corrupt="contrast:2,contrast:4,fog:3", **asked)
    plain = rv.evaluate("tiny+reject:0.6", **asked)
    found, rows = run.corruptions, pq.read_table(run.folder / "corrupted.parquet").to_pylist()
    assert run.summary.model_copy(update={"corruptions": None, "seconds": 0}) == plain.summary.model_copy(
        update={"seconds": 0}
    )
    assert run.rows.equals(plain.rows)
    assert run.name != plain.name
    assert "corrupt" not in plain.manifest["config"]
    # By hand, in one piece.
    source = rv.open_data("emoji?copies=1")
    classifier = load_classifier("tiny+reject:0.6", source.class_names, source.templates, device="cpu")
    samples = list(source.samples(limit=20))
    pixels = [to_pixels(one.image, classifier.framing) for one in samples]  # type: ignore[union-attr]
    labels = torch.tensor([one.label for one in samples])  # type: ignore[union-attr]
    corruptions = parse_corruptions("contrast:2,contrast:4,fog:3")
    right, refused = [], []
    for one, at in zip(corruptions, found.found, strict=True):
        changed = torch.stack([one(image, sample.id) for image, sample in zip(pixels, samples, strict=True)])
        with torch.no_grad():
            output = classifier(changed)
        accepted = output[:, -1] > 0
        right.append((output[:, :-1].argmax(1) == labels) & accepted)
        refused.append(~accepted)
        mine = [row for row in rows if (row["corruption"], row["severity"]) == (one.name, one.severity)]
        assert {row["image_id"]: row["correct"] for row in mine} == dict(
            zip([sample.id for sample in samples], right[-1].tolist(), strict=True)
        )
        assert (at.name, at.severity, at.accuracy.successes) == (one.name, one.severity, int(right[-1].sum()))
        assert at.rejected is not None
        assert at.rejected.successes == int(refused[-1].sum())
    weights = torch.tensor(weights_of(corruptions))
    for value, each in ((found.accuracy, right), (found.rejected, refused)):
        assert value.value == pytest.approx(float((weights @ torch.stack(each).float()).mean()), abs=1e-6)
        assert 0 <= value.low <= value.value <= value.high <= 1
    shown = next(blocks(found, run.accuracy, run.rejected)).rows
    assert [(cell.value, cell.low) for row in shown[1:-1] for cell in row[1:-1] if cell != DASH] == [
        (one.accuracy.value, one.accuracy.low) for one in found.found
    ]
    page = run.report.read_text(encoding="utf-8")
    assert "Right under common corruptions" in page
    assert "Student's t over images" in page.replace("&#39;", "'")
    assert "Refused under common corruptions" in page


def test_a_killed_evaluation_ends_as_a_straight_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"data": "emoji?copies=1", "limit": 20, "batch_size": 8, "corrupt": "snow:2,fog", "out": tmp_path} | CPU
    monkeypatch.setattr("robustvlm.commands.evaluate.work.write_report", lambda folder: folder)
    straight = rv.evaluate("tiny+smooth:0.1:2", name="straight", **asked)
    before, killed = looks.Looker._corrupted, []

    def once(self: looks.Looker, number: int, *rest: object) -> object:
        if number == 1 and not killed:
            killed.append(number)
            raise Killed
        return before(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(looks.Looker, "_corrupted", once)
    with pytest.raises(Killed):
        rv.evaluate("tiny+smooth:0.1:2", name="killed", **asked)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "killed" / "journal.jsonl").read_text().splitlines()]
    assert kinds.count("corrupted") == kinds.count("batch") == 1
    # The corrupted answers of a batch whose rows are lost are made again, and count once.
    with (tmp_path / "killed" / "journal.jsonl").open("a", encoding="utf-8") as journal:
        lines = (tmp_path / "straight" / "journal.jsonl").read_text().splitlines()
        journal.write([line for line in lines if '"corrupted"' in line][1] + "\n")
    again = rv.evaluate("tiny+smooth:0.1:2", name="killed", **asked)
    assert again.summary.model_copy(update={"seconds": 0}) == straight.summary.model_copy(update={"seconds": 0})
    tables = [pq.read_table(run.folder / "corrupted.parquet") for run in (again, straight)]
    assert tables[0].equals(tables[1])
    assert len(tables[0]) == 6 * 20


def test_without_spread_the_mean_has_the_interval_of_a_share() -> None:
    few = [ImageRow(place, str(place), 0, correct=True) for place in range(8)]
    all_kinds = {one.text: dict.fromkeys(range(8), Answer(0, 0.9)) for one in parse_corruptions("all")}
    found = measured(few, all_kinds, 64)
    assert found is not None
    assert (found.accuracy.value, found.accuracy.low, found.accuracy.high) == (1, rate(8, 8).low, 1)
    # One kind at one severity is a share like any other.
    mixed = {"fog:3": {place: Answer(place % 4 // 3, 0.9) for place in range(8)}}
    found = measured(few, mixed, 64)
    assert found is not None
    assert as_rate(found.accuracy) == found.found[0].accuracy == rate(6, 8)
    # Of one image that is right under one of two nothing is known.
    found = measured(few[:1], {"fog:3": {0: Answer(0, 0.9)}, "snow:3": {0: Answer(1, 0.9)}}, 64)
    assert found is not None
    assert (found.accuracy.low, found.accuracy.high) == (None, None)
    assert interval(as_rate(found.accuracy)) == f"0{RANGE}100%"


def test_corrupted_rows_are_sealed_and_go_with_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustvlm.commands.evaluate.work.write_report", lambda folder: folder)
    asked = {"data": "emoji?copies=1", "limit": 2, "name": "run", "out": tmp_path} | CPU
    rv.evaluate("tiny", corrupt="contrast:2", **asked)
    rows = tmp_path / "run" / "corrupted.parquet"
    whole = rows.read_bytes()
    rows.write_bytes(b"others")
    with pytest.raises(UserError, match=r"'corrupted\.parquet'"):
        rv.open_run(tmp_path / "run")
    rows.write_bytes(whole)
    rv.evaluate("tiny", resume=False, **asked)
    assert not rows.exists()


def test_corruptions_are_checked_before_any_work(tmp_path: Path) -> None:
    for start in (rv.evaluate, rv.detect):
        with pytest.raises(UserError, match="did you mean 'fog'"):
            start("tiny", corrupt="fogs", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_detect_says_whose_corrupted_images_are_refused(detect_run: DetectRun) -> None:
    options = {"scores": "energy,mahalanobis", "corrupt": "impulse_noise:5,contrast"}
    run = detect_run(**options)
    record = run.start()
    found, plain = record.summary.corrupted, detect_run(name="plain", scores="energy,mahalanobis").start()
    assert plain.summary.corrupted is None
    assert record.summary.scores[0].on == plain.summary.scores[0].on
    assert found.images == 18
    rows = pq.read_table(run.folder.path / "corrupted.parquet").to_pylist()
    assert [row["set"] for row in rows[::18]] == ["impulse-noise:5", *(f"contrast:{level}" for level in range(1, 6))]
    weights = np.repeat(weights_of(parse_corruptions("impulse-noise:5,contrast")), 18)
    right = np.array([row["label"] == row["prediction"] for row in rows])
    for score in found.scores:
        threshold = next(one.threshold for one in record.summary.scores if one.name == score.name)
        refused = np.array([row[score.name] <= threshold for row in rows])
        assert score.clean.value <= 0.06
        assert score.refused.value == pytest.approx((weights * refused).sum() / 18)
        for share, chosen in ((score.of_right, right), (score.of_wrong, ~right)):
            expected = (weights * (refused & chosen)).sum() / (weights * chosen).sum() if chosen.any() else None
            assert share == (None if expected is None else pytest.approx(expected))
    page = write_report(run.folder.path).read_text(encoding="utf-8")
    assert "Corrupted known images, refused" in page
    assert read_run(run.folder.path).summary == record.summary


def test_detect_goes_on_under_corruptions(detect_run: DetectRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustvlm.commands.detect.encoding.CHUNK", 4)
    options = {"scores": "energy", "fit": None, "corrupt": "snow:1,fog:2"}
    straight = detect_run(name="straight", batch_size=4, **options).start().summary
    with pytest.raises(KeyboardInterrupt):
        detect_run(batch_size=4, **options).start(Interrupt(18 + 10 + 9 + 25))
    assert lasting(detect_run(batch_size=4, **options).start().summary) == lasting(straight)


def counting_each(run: Any) -> Any:
    """Return an attack run as it was before intervals counted copies once."""
    (at,), images = run.summary.per_eps, run.summary.images.model_copy(update={"worth": None})
    of_each = rate(at.robust_accuracy.successes, at.robust_accuracy.total)
    points = [at.model_copy(update={"robust_accuracy": of_each})]
    return replace(run, summary=run.summary.model_copy(update={"images": images, "per_eps": points}))


def on_data(run: Any, facts: dict[str, object]) -> Any:
    return replace(run, manifest=run.manifest | {"data": run.manifest["data"] | facts})


def test_clean_corrupted_and_attacked_stand_in_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"data": "emoji?split=train&copies=1", "limit": 40, "out": tmp_path} | CPU
    for kind in ("evaluate", "attack"):
        monkeypatch.setattr(f"robustvlm.commands.{kind}.work.write_report", lambda folder: folder)
    run = rv.evaluate("tiny", corrupt="contrast:5", **few)
    attack = rv.attack("tiny", attack="pgd:steps=2", eps="1/255,2/255", checks="none", **few)
    page = write_beside([run.folder, attack.folder], tmp_path / "all.html").read_text(encoding="utf-8")
    rows = [
        (line[0] if isinstance(line, tuple) else line, *rest)
        for line, *rest in table(run, [rv.open_run(attack.folder)]).rows  # type: ignore[list-item]
    ]
    assert [row[-1] for row in rows] == ["40"] * 4
    found = [row[1].text for row in rows]  # type: ignore[union-attr]
    rates = [run.accuracy, run.corruptions.found[0].accuracy, *(at.robust_accuracy for at in attack.summary.per_eps)]
    assert found == [percent(rate.value) for rate in rates]
    assert "attacked, L∞ 2/255" in page
    spread, verdicts = next(evenness(run, [rv.open_run(attack.folder)])), attack.verdicts()  # type: ignore[list-item]
    assert [row[-1] for row in spread.rows] == ["40"] * 3
    robust = {image.image_id: verdicts.after(image, 1) == "robust" for image in verdicts.images}
    cells: dict[int, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in run.rows.to_pylist():
        cells[row["label"]][row["subgroup"]].append(robust[row["image_id"]])
    counts = {
        label: np.array([[len(hits), sum(hits)] for hits in parts.values()])
        for label, parts in cells.items()
        if len(parts) > 1
    }
    assert spread.rows[2][1].text == percent(macro_std(counts))  # type: ignore[union-attr]
    told = batch_of([run.folder, attack.folder])
    assert told.comparison is not None
    assert "The runs saw different images" not in page
    assert table(run, [rv.open_run(attack.folder)]) == told.comparison.sections[0].blocks[0]  # type: ignore[list-item]
    there = rv.open_run(attack.folder)
    elsewhere = {"spec": "parquet:photos?subgroup=style", "fingerprint": "ab", "content": "cd", "images": 40}
    attacked = on_data(there, elsewhere | {"spec": "parquet:photos", "fingerprint": "ef"})
    assert table(on_data(run, elsewhere), [attacked]).caption == table(run, [there]).caption  # type: ignore[list-item]
    assert list(evenness(on_data(run, elsewhere), [attacked])) == [spread]
    changed = on_data(there, elsewhere | {"content": "other"})
    assert "different images" in str(table(on_data(run, elsewhere), [changed]).caption)
    (said,) = evenness(on_data(run, elsewhere), [changed])
    assert isinstance(said, doc.Text)
    assert "other images or labels were attacked" in str(said.line)
    assert group_of("emoji?copies=1")("emoji/noto/a/3") == group_of("emoji")("emoji/noto/a/2") == "emoji/noto/a"
    fewer = rv.evaluate("tiny", **few | {"limit": 3})
    assert "The runs saw different images" in str(table(fewer, [rv.open_run(attack.folder)]).caption)  # type: ignore[list-item]
    templates = tmp_path / "templates.txt"
    templates.write_text("a {} thing\n", encoding="utf-8")
    asked_otherwise = rv.evaluate("tiny", templates=templates, **few | {"limit": 3})
    with pytest.raises(UserError, match="other prompt templates"):
        write_beside([asked_otherwise.folder, attack.folder])
    other = rv.evaluate("tiny-robust", **few)
    with pytest.raises(UserError, match="attacked another model than"):
        write_beside([other.folder, attack.folder])
    with pytest.raises(UserError, match=r"evaluate.*attack"):
        write_beside([run.folder, other.folder])


def test_attacked_rows_count_copies_of_a_drawing_once_as_the_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"data": "emoji?split=train&copies=20", "limit": 100, "out": tmp_path} | CPU
    for kind in ("evaluate", "attack"):
        monkeypatch.setattr(f"robustvlm.commands.{kind}.work.write_report", lambda folder: folder)
    run = rv.evaluate("tiny", **few)
    attack = rv.open_run(rv.attack("tiny", attack="pgd:steps=1", eps="0.1/255", checks="none", **few).folder)
    assert run.worth is not None
    assert run.worth < 90
    shown = table(run, [attack])  # type: ignore[list-item]
    clean, attacked = (row[1] for row in shown.rows)
    robust = attack.summary.per_eps[0].robust_accuracy  # type: ignore[union-attr]
    expected = doc.Measure.of(rate(robust.successes, robust.total, independent=run.worth))
    assert (clean, attacked) == (doc.Measure.of(run.accuracy), expected)
    assert attacked == doc.Measure.of(robust)
    before = counting_each(attack)
    assert table(run, [before]).rows == shown.rows
    assert doc.Measure.of(before.summary.per_eps[0].robust_accuracy) != attacked
    spread = next(evenness(run, [attack]))  # type: ignore[list-item]
    (of_run,) = (one for one in run.unevenness if one.by == "subgroups")
    assert spread.rows[0][1:4] == spread_cells(  # type: ignore[union-attr]
        of_run.value, of_run.low, of_run.high, of_run.by_chance, of_run.p_value
    )
    untold = on_data(before, {"spec": "mine:source"})
    assert "one by one" in str(table(run, [untold]).caption)
    assert "one by one" not in str(shown.caption)
    told = table(run, [on_data(attack, {"spec": "mine:source"})])  # type: ignore[list-item]
    assert told.rows[1] == shown.rows[1]
    assert "one by one" not in str(told.caption)
