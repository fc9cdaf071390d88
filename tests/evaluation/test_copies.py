"""Intervals of attacks and certificates count every image: of pictures of one thing among them the run says so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import robustvlm as rv


def told(run: Any) -> list[str]:
    return [check.message for check in run.summary.checks if check.name == "copies"]


def worth(ids: list[str]) -> float:
    """Kish's effective size, written out: an id is STYLE/DRAWING/COPY behind the name of the set."""
    sizes = Counter(name.rsplit("/", 1)[0] for name in ids).values()
    return len(ids) / (sum(size * size for size in sizes) / len(ids))


def test_an_attack_says_how_many_independent_images_there_are(tmp_path: Path) -> None:
    few: dict[str, Any] = {"attack": "pgd:steps=1", "checks": "none", "limit": 24, "out": tmp_path}
    run = rv.attack("tiny", data="emoji?split=test", **few)
    ids = run.rows.column("image_id").unique().to_pylist()
    assert len(ids) == 24 > worth(ids)
    assert told(run)[0].startswith(f"24 images are worth {worth(ids):.0f} independent ones")
    assert told(rv.attack("tiny", data="emoji?split=test&copies=1", **few)) == []


def test_certificates_say_it_too_and_so_do_those_from_kept_features(tmp_path: Path) -> None:
    run = rv.certify("tiny", data="emoji?split=test", limit=11, samples=200, cache="float16", out=tmp_path)
    ids = run.rows.column("image_id").to_pylist()
    assert told(run)[0].startswith(f"11 images are worth {worth(ids):.0f} independent ones")
    again = rv.certify("tiny", from_cache=str(run.folder), prompts="independent", out=tmp_path)
    assert told(again) == told(run)
