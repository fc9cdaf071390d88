"""The comparison of certificates: its columns keep their order, and a stopped measurement goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import certify_radii
from robustvlm.errors import UserError


def features(n: int = 400, dim: int = 6) -> np.ndarray:
    rows = np.eye(dim)[0] * 3.0 + np.random.default_rng(0).standard_normal((n, dim))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def test_columns_are_ordered_as_the_theorems_say() -> None:
    rows = features()
    found = certify_radii.columns(rows, np.eye(6)[0], np.eye(6), 0.25)
    assert found["t4"] >= found["cone"] >= found["fcsb"] * 0.9
    assert found["paper_betting"] >= found["paper"] > 0.0
    assert (found["class_label"], found["vote_label"]) == (0, 0)
    samples = [found["decisions"][str(target)][1] for target in certify_radii.TARGETS]
    assert samples == sorted(samples)
    assert samples[0] < 100


def test_a_stopped_measurement_goes_on_and_prints_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "radii.jsonl"
    options = argparse.Namespace(
        model="tiny", data="emoji", limit=2, samples=60, sigma="0.1,0.2", precision="fp32", out=out
    )
    lines = list(certify_radii.measure(options, known=[]))
    assert len(lines) == 4
    out.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]) + '{"image": "torn')
    assert len(certify_radii._lines(out)) == 3
    again = list(certify_radii.measure(options, known=certify_radii._lines(out)))
    assert [line["r"] for line in again] == [lines[3]["r"]]
    for changed in ({"samples": 61}, {"precision": "bf16"}, {"model": "tiny-robust"}, {"data": "emoji?split=train"}):
        other = argparse.Namespace(**{**vars(options), **changed})
        with pytest.raises(UserError, match=r"was made with .* \(asked for: "):
            next(certify_radii.measure(other, known=lines))
    certify_radii.print_tables(lines)
    assert "vector NP: T4, betting" in capsys.readouterr().out
