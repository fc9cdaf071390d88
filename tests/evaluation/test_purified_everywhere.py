"""The commands on purified and built models: purify, build, then certify, attack and evaluate what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from robustvlm.certify.threats import Noise, find_threat
from robustvlm.cli.main import app
from robustvlm.cli.terminal import Ended
from robustvlm.commands.certify.encoder import behind
from robustvlm.core.probe import probe_pixels
from robustvlm.defenses import SmoothedVLM, load_pipeline
from robustvlm.defenses.zoo.base import read_defence
from robustvlm.defenses.zoo.wrap import DefendedVLM
from robustvlm.errors import UserError

ENCODER = "small_encoders:Encoder"


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def pipeline(make_folder: Callable[..., Path], out: Path) -> tuple[Path, str]:
    """A pipeline on disk and the spec of its data; made once."""
    data = f"imagefolder:{make_folder(name='all')}"
    few = ("--steps", 4, "--mapper-steps", 4, "--batch-size", 8, "--val-limit", 3, "--sigma", 0.25)
    if not (out / "whole").exists():
        said = command("purify", ENCODER, "--data", data, *few, "--out", out, "--name", "pure")
        assert "Gaussian robustness score" in said
        said = command(
            "build",
            "--encoder",
            ENCODER,
            "--purify",
            out / "pure",
            "--smooth",
            "0.25:4",
            "--out",
            out,
            "--name",
            "whole",
        )
        assert "smoothing 0.25:4" in " ".join(said.split())
    return out / "whole", data


def test_certify_takes_the_noise_of_the_pipeline(pipeline: tuple[Path, str], out: Path) -> None:
    model, data = pipeline
    shared = ("--data", data, "--limit", 3, "--samples", 100, "--lanes", 50, "--out", out, "--json")
    whole = json.loads(command("certify", model, *shared))
    parts = json.loads(command("certify", out / "pure", "--sigma", 0.25, *shared))
    assert whole["mean_radius"] == pytest.approx(parts["mean_radius"], rel=0.2)  # each behind noise of its own
    manifests = [json.loads(path.read_text()) for path in out.glob("certify-*/manifest.json")]
    assert {manifest["config"]["sigma"] for manifest in manifests} == {0.25}
    smoothed, behind = load_pipeline(str(model)), load_pipeline(str(out / "pure")).at_noise(0.25)
    assert isinstance(smoothed, SmoothedVLM)
    noisy = torch.from_numpy(probe_pixels(smoothed.image_size))
    assert torch.equal(smoothed.encode_noisy(noisy), behind.encode_image(noisy)), "the same function of noisy images"
    with pytest.raises(Ended, match=r"smoothed with noise of 0.25, and sigma says 0.5"):
        command("certify", model, "--sigma", 0.5, *shared)
    with pytest.raises(Ended, match="smoothed twice"):
        command("certify", f"{model}+smooth:0.25", *shared)
    with pytest.raises(Ended, match=r"a part of .* is smoothed"):
        command("certify", f"{model}+bits:3", *shared)


@pytest.mark.parametrize("spec", ["tiny+smooth:0.02:8", "tiny+smooth:0.02:64:0.001"])
def test_what_a_folder_is_smoothed_with_is_what_it_is_certified_under(spec: str) -> None:
    """A saved model on a smoothed one does not say so in its spec."""
    vlm, l2 = load_pipeline(spec), find_threat("l2")
    assert behind(vlm, Noise(l2, 0.02)) is vlm
    with pytest.raises(UserError, match=r"smoothed with noise of 0\.02.* under 0\.25 would be about another model"):
        behind(vlm, Noise(l2, 0.25))
    with pytest.raises(UserError, match=r"a part of .* is smoothed"):
        behind(DefendedVLM(vlm, read_defence("bits", ("3",))), Noise(l2, 0.02))


def test_attack_goes_through_the_whole_pipeline(pipeline: tuple[Path, str], out: Path) -> None:
    model, data = pipeline
    goal = ("--goal", "feature", "--min-cos", 0.9, "--eps", "8/255", "--attack", "pgd:steps=3")
    effort = ("--eot", 2, "--draws", 3, "--checks", "none", "--limit", 4)
    summary = json.loads(command("attack", model, "--data", data, *goal, *effort, "--out", out, "--json"))
    assert summary["images"]["evaluated"] == 4
    assert summary["cost"]["backward_passes"] > 0


def test_evaluate_takes_it(pipeline: tuple[Path, str], out: Path) -> None:
    model, data = pipeline
    assert "whole" in command("evaluate", model, "--data", data, "--limit", 6, "--out", out)


def test_detect_takes_a_whole_pipeline_with_a_head(
    make_folder: Callable[..., Path], pipeline: tuple[Path, str], out: Path
) -> None:
    _, data = pipeline
    words = out / "antibodies.txt"
    words.write_text("cat: lynx\ndog: wolf\nfox: jackal\n")
    few = ("--antibodies", words, "--band", "-0.99,0.99", "--min-images", 3, "--steps", 10, "--held-out", 0.4)
    noise = ("--sigma", 0.25)
    command("immunize", out / "pure", "--data", data, *few, *noise, "--out", out, "--name", "immune")
    parts = ("--purify", out / "pure", "--smooth", "0.25:4", "--immunize", out / "immune")
    said = " ".join(command("build", "--encoder", ENCODER, *parts, "--out", out, "--name", "head").split())
    assert "Warning" not in said
    assert "adapter" in said
    strange = make_folder(12, "strange")
    for number, folder in enumerate(sorted(strange.iterdir())):
        folder.rename(strange / f"thing {'abc'[number]}")
    unknown = f"imagefolder:{strange}"
    asked = ("--id", data, "--ood", unknown, "--scores", "mcm,energy", "--draws", 100, "--fit", "none")
    summary = json.loads(command("detect", out / "head", *asked, "--out", out, "--json"))
    assert summary["scores"][0]["name"] == "own"  # that of the head, on the mean behind the noise
    assert {"mcm", "energy"} <= {row["name"] for row in summary["scores"]}
    manifest = json.loads((next(out.glob("detect-*")) / "manifest.json").read_text())
    assert manifest["model"]["fingerprint"]
