"""`robustvlm finetune`, `soup`, `export` and `report` as a shell sees them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small import OWN, clip_folder, pictures

from robustvlm.cli.main import main


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the program in this process and return exit code, standard output and standard error."""
    before = sys.argv
    sys.argv = ["robustvlm", *words]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    written = capsys.readouterr()
    return int(ended.value.code or 0), written.out, written.err


def test_from_training_to_soup_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = str(clip_folder(tmp_path / "base")), pictures(tmp_path / "pictures", each=6)
    val = pictures(tmp_path / "val", each=4)
    common = ["--data", data, "--val", val, "--out", str(tmp_path), "--device", "cpu", "--val-steps", "2"]
    train = ["finetune", base, "--steps", "3", "--batch-size", "6", "--lr", "1e-3", *common]
    code, out, _ = call(capsys, *train, "--name", "a", "--method", "tecoa")
    assert code == 0
    assert "3 steps to go: " in out
    assert "encoder passes, about" in out
    assert "Robust accuracy went from" in out
    code, out, err = call(capsys, *train, "--name", "b", "--method", "fare", "--ema", "0.9", "--json")
    assert code == 0
    assert json.loads(out)["method"] == "fare"
    assert "Fine-tuning" in err
    code, out, _ = call(capsys, "report", str(tmp_path / "a"), "--json")
    assert json.loads(out)["runs"][0]["summary"]["steps"] == 3
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    code, out, _ = call(capsys, "soup", *runs, "--out", str(tmp_path), "--name", "c", "--val", val, "--device", "cpu")
    assert code == 0
    assert "clean accuracy" in out
    code, out, _ = call(capsys, "export", str(tmp_path / "c"), str(tmp_path / "d"), "--half")
    assert code == 0
    sizes = [(tmp_path / name / "open_clip_model.safetensors").stat().st_size for name in ("c", "d")]
    assert sizes[1] < 0.6 * sizes[0]
    assert call(capsys, "evaluate", str(tmp_path / "d"), "--data", data, "--out", str(tmp_path), "--json")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune", OWN, "--eps", "1/255,2/255"], "--eps takes one number"),
        (["finetune", OWN, "--steps", "3", "--epochs", "1"], "either in steps or in epochs"),
        (["finetune", OWN, "--method", "tecoa", "--option", "depth=1"], "has no option 'depth'"),
        (["finetune", OWN, "--resume", "--method", "tecoa", "--name", "none"], "there is no run to resume"),
        (["soup", OWN], "at least 2 models, got 1"),
        (["export", "nothing", "out"], "unknown model 'nothing'"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    place = [] if words[0] == "export" else ["--out", str(tmp_path)]
    code, _, err = call(capsys, *words, *place)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
