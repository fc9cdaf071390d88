"""Attack runs on bad images, odd models and damaged streams: named, counted, and never passed off as a result."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attacking import CURVE, Attacking, outcomes, prepared, rows, run_in_pieces, table
from PIL import Image

from robustvlm.commands.attack.record import load_run, verdict
from robustvlm.commands.attack.report import attack_report, write_report
from robustvlm.commands.attack.summary import Summary, parse_condition
from robustvlm.commands.evaluate.beside import _attacked as beside_rows
from robustvlm.errors import UserError
from robustvlm.report.methods import methods_of
from robustvlm.report.sections import Measure
from robustvlm.report.words import DASH
from robustvlm.runs.records import read_drawn
from robustvlm.runs.run import manifest_of
from robustvlm.runs.settings import Observer

Photos = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawing of reports, no calls of git, and a cache of the test's own."""
    monkeypatch.setattr(
        "robustvlm.commands.attack.work.write_report", lambda folder: (folder / "report.html").write_text("report")
    )
    monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: None)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))


def check(summary: Summary, name: str) -> tuple[str, str]:
    found = next(item for item in summary.checks if item.name == name)
    return found.level, found.message


def first_files(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.png"))


class AtStage(Observer):
    """Does something when the attack after the clean pass begins."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        del total, done
        if title != "clean":
            self.act()


# Images


@pytest.mark.parametrize("lanes", [1, 8])
def test_corrupt_images_are_recorded_skipped_and_counted(make_folder: Photos, lanes: int) -> None:
    photos = make_folder(20)
    files = first_files(photos)
    damaged = {files[0]: b"", files[1]: b"no image", files[9]: files[9].read_bytes()[:60]}
    for path, content in damaged.items():
        path.write_bytes(content)
    run = prepared(photos, lanes=lanes)
    summary = run.run()
    assert (summary.images.evaluated, summary.images.unreadable) == (17, 3)
    names = [path.relative_to(photos).as_posix() for path in damaged]
    assert [image.id for image in summary.unreadable] == names
    assert summary.unreadable[0].reason == "empty file"
    assert not {row["image_id"] for row in rows(run)} & set(names)
    assert len(rows(run)) == 17


@pytest.mark.equality
def test_corrupt_images_change_no_other_image_and_survive_a_resume(make_folder: Photos) -> None:
    whole = prepared(make_folder(20, "whole"))
    whole.run()
    photos = make_folder(20, "damaged")
    gone = first_files(photos)[5]
    gone.write_bytes(b"")
    run = run_in_pieces(lambda: prepared(photos, name="damaged"), [4, 11])
    name = gone.relative_to(photos).as_posix()
    assert outcomes(run) == [outcome for outcome in outcomes(whole) if outcome[0] != name]
    assert [image.id for image in run.run().unreadable] == [name]


def test_what_was_left_aside_stands_in_manifest_and_checks(make_folder: Photos) -> None:
    photos = make_folder(6)
    (photos / "__MACOSX").mkdir()
    (photos / "dog" / "notes.txt").write_text("no image")
    run = prepared(photos)
    said = "left aside: '.txt', '__MACOSX'"
    assert run.manifest["remarks"] == [said]
    assert check(run.run(), "data and class names") == ("note", said + ".")


def test_a_folder_of_nothing_but_corrupt_images_says_so(make_folder: Photos) -> None:
    photos = make_folder(6)
    for path in first_files(photos):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of its 6 images can be read \(the first, .*not an image"):
        prepared(photos).run()


def test_an_image_lost_between_clean_pass_and_attack_is_failed_not_robust_and_not_fooled(make_folder: Photos) -> None:
    photos = make_folder(20)
    whole = prepared(photos, name="whole")
    whole.run()
    right = [row["image_id"] for row in rows(whole) if row["outcome"] != "clean_wrong"][:2]
    run = prepared(photos, name="lossy")
    summary = run.run(AtStage(lambda: [(photos / name).write_bytes(b"") for name in right]))
    failed = [row for row in rows(run) if row["outcome"] == "failed"]
    assert [row["image_id"] for row in failed] == right
    assert all(row["adversarial_prediction"] == -2 and row["passes"] == 0 for row in failed)
    assert summary.per_eps[0].undecided == 2
    assert summary.per_eps[0].attack_success_rate.total == summary.images.clean_correct - 2
    level, message = check(summary, f"lost image, number {failed[0]['index']}")
    assert level == "warning"
    assert right[0] in message
    assert "empty file" in message
    assert check(summary, "failed images")[0] == "fault"
    kept = [outcome for outcome in outcomes(whole) if outcome[0] not in right]
    assert [outcome for outcome in outcomes(run) if outcome[0] not in right] == kept


# Models


def test_a_model_that_gives_nan_for_some_images_is_named_and_those_images_are_not_right(make_folder: Photos) -> None:
    photos = make_folder(20)
    for path in first_files(photos)[:3]:
        image = Image.open(path)
        image.putpixel((0, 0), (255, 0, 0))
        image.save(path)
    summary = prepared(photos, "NaNOnMarked").run()
    assert check(summary, "finite output")[0] == "fault"
    assert check(summary, "failed images")[0] == "fault"
    run = prepared(photos, "NaNOnMarked")
    broken = [row for row in rows(run) if row["clean_prediction"] == -2]
    assert len(broken) == 3
    assert {row["outcome"] for row in broken} == {"clean_wrong"}


def test_output_that_breaks_only_under_attack_is_undecided(make_folder: Photos) -> None:
    photos = make_folder(20)
    summary = prepared(photos, "NaNOffGrid").run()
    (at,) = summary.per_eps
    assert at.undecided == summary.images.clean_correct > 5
    assert (at.fooled, at.robust) == (0, 0)
    assert at.robust_accuracy.value == 0
    assert at.attack_success_rate.value is None
    assert check(summary, "failed images")[0] == "fault"
    assert json.loads((prepared(photos, "NaNOffGrid").folder.summary_path).read_text())["per_eps"][0]["undecided"] > 5


def test_a_model_that_mixes_its_batch_is_refused_but_may_run_on_one_lane(make_folder: Photos) -> None:
    photos = make_folder(20)
    with pytest.raises(UserError, match=r"'small_encoders:Coupled' .* depends on the other images .* use lanes=1"):
        prepared(photos, "Coupled", name="wide").run()
    narrow = prepared(photos, "Coupled", name="narrow", lanes=1)
    narrow.run()
    plain = prepared(photos, "Encoder", name="plain", lanes=1)
    plain.run()
    assert outcomes(narrow) == outcomes(plain)


def test_a_random_model_is_judged_by_many_draws_or_warned_of(make_folder: Photos) -> None:
    photos = make_folder(8)
    level, message = check(prepared(photos, "Random").run(), "repeatable output")
    assert level == "note"
    assert "averaged over 10 draws" in message
    assert "21 fresh draws" in message
    assert "101 more" in message
    assert said_of(photos, "run").endswith("fresh draws, and then in that of 101 more.")
    summary = prepared(photos, "Random", name="one-draw", eot=1, draws=1).run()
    level, message = check(summary, "repeatable output")
    assert level == "warning"
    assert "lucky draw" in message
    assert check(summary, "independent images")[0] == "note"
    assert said_of(photos, "one-draw") == "One draw decides on a success."


def said_of(photos: Path, name: str) -> str:
    """Return what the methods paragraph of a run says of how a success was judged."""
    folder = photos.parent / "runs" / name
    made = methods_of(manifest_of(folder), drawn=read_drawn(folder / "summary.json"))
    return next(part for part in made.text.split("  ")[0].replace(". ", ".\n").splitlines() if "success" in part)


def test_one_lucky_majority_of_a_random_model_is_no_success(
    make_folder: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_folder(20)
    asked: dict[str, Any] = {"eot": 1, "eps": "0.001/255", "attack": "pgd:steps=60"}
    held = prepared(photos, "Coin", name="held", **asked).run()
    assert held.images.clean_correct > 5
    assert held.per_eps[0].fooled == 0, "no point of the ball is wrong in most of its draws"
    monkeypatch.setattr("robustvlm.attacks.probe.UPHOLDING_DRAWS", 0)
    assert prepared(photos, "Coin", name="lucky", **asked).run().per_eps[0].fooled > 0


def test_too_little_memory_halves_the_lanes_and_changes_nothing(make_folder: Photos) -> None:
    photos = make_folder(20)
    small, plain = prepared(photos, "SmallMemory", name="small"), prepared(photos, name="plain", lanes=4)
    summary = small.run()
    plain.run()
    assert table(small).equals(table(plain))
    assert check(summary, "lanes") == ("note", "Memory did not suffice for more than 4 lanes.")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Detached", r"encode_image of 'small_encoders:Detached' has no gradient, which gradient attacks need"),
        (
            "Failing",
            r"'small_encoders:Failing' failed on a batch of 8 images in fp32: ValueError: expected two images of",
        ),
    ],
)
def test_a_model_that_cannot_be_attacked_is_named(make_folder: Photos, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(make_folder(12), model).run()


# Streams


def shard(
    path: Path, pictures: list[tuple[Image.Image, str]], keys: list[str] | None = None, cut: int | None = None
) -> None:
    """Write pictures with their class names as a tar shard that ends in the middle of picture `cut`."""
    buffer, end = io.BytesIO(), None
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, (image, label) in enumerate(pictures):
            end = tar.offset + 600 if number == cut else end
            data = io.BytesIO()
            image.save(data, "PNG")
            key = keys[number] if keys else f"{number:03d}"
            for name, content in ((f"{key}.png", data.getvalue()), (f"{key}.txt", label.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path.write_bytes(buffer.getvalue()[:end])


@pytest.fixture
def shards(tmp_path: Path, labelled_pictures: list[tuple[Image.Image, str]]) -> Path:
    """Two shards: the first ends in the middle of a picture, the second has one key twice."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "classnames.txt").write_text("cat\ndog\nfox\n")
    shard(folder / "a.tar", labelled_pictures[:14], cut=9)
    second = labelled_pictures[14:26]
    # The members of one key in two places: the later one is a sample of the same name.
    shard(folder / "b.tar", second, [f"{n:03d}" for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 4)])
    return folder


def streamed(shards: Path, name: str = "run", **settings: object) -> Attacking:
    return prepared(shards, data=f"wds:{shards}", name=name, **settings)


def test_a_budget_spent_in_a_stream_of_unknown_length_leaves_every_rate_open(shards: Path) -> None:
    whole = streamed(shards, name="whole", lanes=4).run()
    assert whole.cost.passes is not None
    budget = f"{whole.cost.passes.questions + 8}passes"
    cut = streamed(shards, lanes=4)
    summary = cut.run(budget=budget)
    seen = summary.images.evaluated
    assert 0 < seen < whole.images.evaluated
    assert summary.images.uncounted
    assert summary.unfinished is not None
    assert "in the clean pass, with " in summary.unfinished
    assert summary.unfinished.endswith(" of an unknown number of images classified")
    assert verdict(summary).count("no rate of the data is known") == 1
    for text in ("clean_accuracy<0", "robust_accuracy<0", "asr>1"):
        assert parse_condition(text).holds(summary)
    assert write_report(cut.folder.path).exists()
    assert [shown for _, shown, _ in beside_rows(load_run(cut.folder.path))] == [Measure(DASH)]
    found = attack_report(load_run(cut.folder.path))
    assert found.cards == []
    assert "levels" not in {section.key for section in found.sections}
    limited = streamed(shards, name="limited", lanes=4, limit=1000).run(budget=budget)
    assert limited.images.waiting > 0  # at most so many
    assert not limited.images.uncounted
    again = cut.run()
    assert (again.unfinished, again.images.uncounted) == (None, False)
    assert again.clean_accuracy == whole.clean_accuracy


def test_a_budget_spent_after_a_whole_stream_was_classified_counts_its_images(shards: Path) -> None:
    for settings in ({}, {"limit": 1000}):
        run = streamed(shards, name=f"run{len(settings)}", lanes=4, **settings)
        run.estimate()
        summary = run.run(budget="1pass")
        assert summary.unfinished is not None
        assert (summary.images.waiting, summary.images.uncounted) == (0, False)


def test_a_damaged_stream_is_read_as_far_as_it_goes(shards: Path) -> None:
    run = streamed(shards, **CURVE)
    summary = run.run()
    ids = [row["image_id"] for row in rows(run)][: summary.images.evaluated]
    assert len(set(ids)) == len(ids) == summary.images.evaluated
    assert {name.split("/")[-1] for name in ids if "/" in name} >= {"000", "004", "010"}
    reasons = [image.reason for image in summary.unreadable]
    assert any("damaged shard" in reason for reason in reasons)
    assert any("same key twice" in reason for reason in reasons)
    assert len(rows(run)) == summary.images.evaluated * 6
    assert not [row for row in rows(run) if row["outcome"] == "failed"]


@pytest.mark.equality
def test_a_damaged_stream_resumes_to_the_same_rows(shards: Path) -> None:
    straight = streamed(shards, "straight", **CURVE)
    summary = straight.run()
    for name, pieces in {"once": [0], "twice": [3, 9], "often": [17, 2, 30]}.items():
        again = run_in_pieces(partial(streamed, shards, name, **CURVE), pieces)
        assert table(again).equals(table(straight)), f"interrupted after {pieces}"
        assert again.run().unreadable == summary.unreadable


def test_a_limit_on_a_stream_takes_the_first(shards: Path) -> None:
    run = streamed(shards, limit=5)
    assert run.run().images.evaluated == 5
    assert [row["image_id"].split("/")[-1] for row in rows(run)] == [f"{n:03d}" for n in range(5)]


def test_images_that_vanish_from_a_stream_are_failed_not_skipped(
    shards: Path, labelled_pictures: list[tuple[Image.Image, str]]
) -> None:
    whole = streamed(shards, "whole")
    whole.run()
    run = streamed(shards, "shrunk")
    summary = run.run(AtStage(lambda: shard(shards / "b.tar", labelled_pictures[14:17])))
    before = {row["image_id"]: row["outcome"] for row in rows(whole)}
    changed = {row["image_id"] for row in rows(run) if row["outcome"] != before[row["image_id"]]}
    assert changed == {name for name, outcome in before.items() if outcome != "clean_wrong"} & {
        f"{'/'.join(name.split('/')[:-1])}/{n:03d}" for name in before if name.startswith("b") for n in range(3, 11)
    }
    assert {row["outcome"] for row in rows(run) if row["image_id"] in changed} == {"failed"}
    assert summary.per_eps[0].undecided == len(changed) > 3
