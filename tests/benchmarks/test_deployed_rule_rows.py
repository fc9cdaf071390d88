"""Kept rows of the deployed rule's benchmark are not mixed with those of other settings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks import deployed_rule
from robustvlm.errors import UserError


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "deployed.jsonl"
    settings = {"samples": 40, "n0": 4, "alpha": 0.01, "fractions": "0.5", "steps": 1, "eot": 1, "answers": 1}
    options = {"model": "tiny", "data": "emoji", "limit": 1, "sigma": "0.02", "out": out, **settings}
    deployed_rule.measure(argparse.Namespace(**options))
    deployed_rule.measure(argparse.Namespace(**options))
    (row,) = map(json.loads, out.read_text().splitlines())  # made once
    others = {**dict.fromkeys(("samples", "n0", "steps", "eot", "answers"), 44), "alpha": 0.02, "fractions": "0.9"}
    others |= {"model": "tiny-robust", "data": "emoji?split=train"}
    for name, value in others.items():
        with pytest.raises(UserError, match=rf"was made with {name} .*asked for: "):
            deployed_rule.measure(argparse.Namespace(**{**options, name: value}))
    del row["made with"]
    out.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="does not say what it was made with"):
        deployed_rule.measure(argparse.Namespace(**options))
