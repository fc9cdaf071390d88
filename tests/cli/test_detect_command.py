"""`robustvlm detect` as a shell sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import MEAN
from PIL import Image

import robustvlm as rv
from robustvlm.cli.main import main

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, images of two known classes, and unknown ones."""
    root = tmp_path_factory.mktemp("place")
    (root / "mean_colours.py").write_text(MEAN)
    (root / "words.txt").write_text("green\n")
    for folder, name, colour in (("photos", "red", (220, 40, 40)), ("photos", "blue", (40, 40, 220)),
                                 ("others", "green", (60, 200, 60))):  # fmt: skip
        (root / folder / name).mkdir(parents=True)
        for number in range(4):
            tint = tuple(channel + 3 * number for channel in colour)
            Image.new("RGB", (8, 8), tint).save(root / folder / name / f"{number}.png")
    return root


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process (starting a new one takes seconds); return standard output and error."""

    def detect(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.chdir(place)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["robustvlm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == code, out + err
        return out, err

    return detect


COMMON = ("detect", "mean_colours:Mean", "--id", "imagefolder:photos", "--ood", "green=imagefolder:others",
          "--words", "words.txt", "--draws", "100", "--device", "cpu")  # fmt: skip


def test_a_run_from_command_to_table_and_report(place: Path, run: Run) -> None:
    shown, _ = run(*COMMON, "--name", "one")
    for words in (
        "Known (8 images) against unknown (4 green)",
        "green AUROC",
        "Scores that were not used",
        "has the highest AUROC",
        "bootstrap intervals are too short",
        "Report:  runs/one/report.html",
    ):
        assert words in shown, words
    report = (place / "runs" / "one" / "report.html").read_text()
    assert "Scores that were not used" in report
    again, _ = run("report", "runs/one", "--json")
    assert json.loads(again)["runs"][0]["summary"]["known"]["images"] == 8


def test_json_goes_to_standard_output_alone(run: Run) -> None:
    shown, said = run(*COMMON, "--scores", "msp,energy", "--name", "two", "--json")
    summary = json.loads(shown)
    assert [score["name"] for score in summary["scores"]] == ["msp", "energy"]
    assert "Scoring" in said


def test_conditions_decide_the_exit_code(run: Run) -> None:
    named = (*COMMON, "--scores", "msp,energy", "--name", "gate")
    run(*named, "--fail-if", "auroc:msp@green<0", "--fail-if", "fpr95>100%")
    shown, said = run(
        *named, "--json", "--fail-if", "auroc:msp@green>=0", "--fail-if", "aupr_in<0", "--fail-if", "fpr95.high>=0%",
        code=1,
    )  # fmt: skip
    assert said.splitlines()[-1] == "failed: auroc:msp@green>=0, fpr95.high>=0%"
    assert json.loads(shown)["scores"]


def test_from_python_it_is_the_same_run(place: Path, run: Run) -> None:
    given = {"id": "imagefolder:photos", "ood": "green=imagefolder:others", "words": "words.txt", "draws": 100}
    run(*COMMON, "--scores", "msp")
    before = sorted((place / "runs").iterdir())
    found = rv.detect("mean_colours:Mean", **given, device="cpu", scores="msp")
    assert sorted((place / "runs").iterdir()) == before
    assert found.folder.resolve() in before
    assert found.summary.scores[0].name == "msp"
    assert found.rows.num_rows == 12
    assert rv.detect.KNN(k=2).k == 2
    with pytest.raises(rv.UserError, match="there is no option 'score': did you mean 'scores'"):
        rv.detect("mean_colours:Mean", score="msp")


def test_mistakes_end_in_one_line_and_code_2(run: Run) -> None:
    for arguments, words in (
        (("detect", "--id", "imagefolder:photos"), "pass --ood DATA"),
        ((*COMMON, "--scores", "entropy"), "unknown score 'entropy'"),
        ((*COMMON, "--name", "../out"), "run name"),
        ((*COMMON, "--fit", "imagefolder:others"), "other classes"),
        ((*COMMON, "--under-attack", "--eps", "no"), "is no number"),
        ((*COMMON, "--fail-if", "acuracy<0.5"), "there are auroc, fpr95"),
        ((*COMMON, "--fail-if", "auroc:entropy<0.5"), "the run has msp, mcm"),
        ((*COMMON, "--fail-if", "auroc@near<0.5"), "the run has green"),
    ):
        _, said = run(*arguments, code=2)
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        assert words in said
