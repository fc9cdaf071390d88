"""`detect --stream`: what came in before is remembered, what is judged is not; runs without it stay as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from detecting import DetectRun
from PIL import Image

from robustvlm.commands.detect.summary import DetectSummary
from robustvlm.errors import UserError


def messages(summary: DetectSummary, level: str) -> str:
    return " | ".join(check.message for check in summary.checks if check.level == level)


def turned(source: Path, target: Path) -> Path:
    """Return a folder with the images of another, upside down."""
    for path in sorted(source.rglob("*.png")):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(place)
    return target


def test_a_stream_is_remembered_and_changes_adaneg_alone(
    detect_run: DetectRun, detect_images: Path, tmp_path: Path
) -> None:
    stream = turned(detect_images, tmp_path / "stream")
    run = detect_run(name="with", scores="neglabel,adaneg", stream=f"imagefolder:{stream}/near").start()
    summary = run.summary
    assert [score.name for score in summary.scores] == ["neglabel", "adaneg"]
    assert "AdaNeg remembers" in messages(summary, "note") + messages(summary, "warning")
    assert "stream" in run.manifest["config"]
    assert "stream" in run.manifest["data"]
    without = detect_run(name="without", scores="neglabel,adaneg").start()
    assert "--stream" in without.summary.skipped["adaneg"]
    assert "stream" not in without.manifest["config"]
    assert "stream" not in without.manifest["data"]
    assert [score.on for score in without.summary.scores] == [
        score.on for score in summary.scores if score.name == "neglabel"
    ]


def test_images_that_are_judged_are_no_stream(detect_run: DetectRun, detect_images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images of stream are judged in 'near' \(the first, '.*'\)"):
        detect_run(scores="adaneg", stream=f"imagefolder:{detect_images}/near").start()
    copied = tmp_path / "copied"
    shutil.copytree(detect_images / "far", copied)
    summary = detect_run(name="again", scores="adaneg", stream=f"imagefolder:{copied}").start().summary
    assert "images of the set 'far' look to the model like some of --stream" in messages(summary, "warning")
    # Programs know a check by what stands before a comma, whatever the sets are called.
    assert "copies of the stream, in far" in [check.name for check in summary.checks]


def test_a_stream_that_nobody_remembers_is_said(detect_run: DetectRun, detect_images: Path, tmp_path: Path) -> None:
    stream = turned(detect_images / "far", tmp_path / "stream")
    summary = detect_run(scores="energy", stream=f"imagefolder:{stream}").start().summary
    assert "read for nothing" in messages(summary, "warning")
