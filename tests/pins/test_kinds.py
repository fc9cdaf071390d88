"""Words that stand in files of earlier runs, kept in `kinds.json`: kinds of models, attacks, scores and their parts.

A card names the kind of its model, a seed is made of the name of an attack, and the digest of a gate is made of the
classes and fields of its scores (fields with `()` behind are the name of a class). What is there stays; after something
new has come, `PYTHONPATH=. python tests/pins/test_kinds.py` writes it down.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robustvlm.attacks import ATTACKS
from robustvlm.defenses.pipeline import KINDS
from robustvlm.detect import SCORES, Head, Supplies


def _present() -> dict[str, Any]:
    rows = torch.nn.functional.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(48) % 3
    supplies = Supplies(Head(rows[:3], 20.0), features=rows[3:51], labels=labels, words=rows[51:], stream=rows[3:9])
    supplies = replace(supplies, negatives=rows[51:])
    return {
        "models": list(KINDS),
        "attacks": sorted(ATTACKS),
        "scores": {name: _fields(score.made(supplies).state()) for name, score in SCORES.items()},
    }


def _fields(state: dict[str, object]) -> str:
    return " ".join(f"{key}{value}" if key.endswith("()") else key for key, value in state.items())


def test_words_are_those_that_files_hold() -> None:
    assert _present() == json.loads((Path(__file__).parent / "kinds.json").read_text())


if __name__ == "__main__":
    (Path(__file__).parent / "kinds.json").write_text(json.dumps(_present(), indent=1) + "\n")
