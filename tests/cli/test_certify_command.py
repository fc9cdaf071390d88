"""`robustvlm certify` as a shell sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import MEAN
from PIL import Image

from robustvlm.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder and images in two classes, one of them of another size."""
    root = tmp_path_factory.mktemp("place")
    (root / "mean_colour.py").write_text(MEAN)
    for name, colour in (("red", (220, 40, 40)), ("blue", (40, 40, 220))):
        (root / "photos" / name).mkdir(parents=True)
        for number in range(2):
            side = 8 if number else 16
            Image.new("RGB", (side, side), colour).save(root / "photos" / name / f"{number}.png")
    return root


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process (starting a new one takes seconds); return standard output and error."""

    def certify(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.chdir(place)
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["robustvlm", "certify", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == code, out + err
        return out, err

    return certify


COMMON = ("mean_colour:Mean", "--data", "imagefolder:photos", "--samples", "256", "--sigma", "0.2", "--device", "cpu")


def test_a_run_from_command_to_tables_report_and_gate(place: Path, run: Run) -> None:
    shown, _ = run(*COMMON, "--name", "one", "--deployed", "400")
    for words in (
        "4 images, at most 256 samples each: up to 1,024 encoder passes",
        "radius at best",
        "At given radii (4 images, noise 0.2)",
        "this certificate",
        "paper's bound",
        "deployed mean",
        "Mean certified cosine",
        "wrong with probability at most 0.001",
        "at most 0.004 false certificates are to be expected",
        "Adds to the image any vector of Euclidean length (L₂) below the radius",
        "up to floating point",
        "2 of 4 images were resized first and rounded to 8 bits",
        "of infinitely many copies; within the radius in the column deployed_radius, the mean of 400 fresh copies",
        "First look at these images in this folder of runs",
    ):
        assert words in " ".join(shown.split()), words
    assert (place / "runs" / "one" / "report.html").stat().st_size > 10_000
    again, _ = run(*COMMON, "--name", "one", "--deployed", "400", "--json", "--fail-if", "certified<50%")
    summary = json.loads(again)
    assert summary["images"] == 4
    _, gate = run(*COMMON, "--name", "one", "--deployed", "400", "--fail-if", "mean_radius<100", code=1)
    assert "failed: mean_radius<100" in gate


def test_stopping_early_and_other_prompts_from_kept_features(place: Path, run: Run) -> None:
    early = json.loads(run(*COMMON, "--radius", "0.1", "--json")[0])
    assert early["samples"]["saved"] > 0.3
    assert early["at"][-1]["radius"] >= 0.1
    kept, _ = run(*COMMON, "--claim", "class", "--cache", "float32", "--name", "kept")
    assert "kept features take 0.0 MB" in kept
    (place / "other.txt").write_text("a red thing\na thing\n")
    shown, _ = run("--from-cache", "kept", "--classes", "other.txt", "--name", "other", "--device", "cpu")
    assert "up to 0 encoder passes" in shown
    assert "The prompts may have been chosen after looking" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "5"), "can certify any radius for no image, whatever the model"),
        (("--claim", "vots"), "did you mean 'vote'?"),
        (("--prompts", "adaptive"), "--prompts is for --from-cache"),
        (("--fail-if", "certfied<1"), "did you mean 'certified'"),
        (("--from-cache", "nothing-there"), "no run 'nothing-there'"),
    ],
)
def test_mistakes_end_in_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    common = [word for word in COMMON if word not in ("--samples", "256") or "--samples" not in arguments]
    _, error = run(*common, *arguments, code=2)
    assert message in error
    assert len(error.strip().splitlines()) == 1
