"""A run folder as the program writes it, with planted structure: harder classes, several eps, two attacks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from robustvlm.commands.attack.summary import summarise
from robustvlm.runs.records import Check, Cost, UnreadableImage

sys.path.insert(0, str(Path(__file__).parent))

WriteRun = Callable[..., Path]
EPS = {0.5 / 255: "0.5/255", 1 / 255: "1/255", 2 / 255: "2/255"}

SCHEMA = pa.schema(
    [(name, pa.int32()) for name in ("index", "label", "clean_prediction", "adversarial_prediction", "steps", "passes")]
    + [(name, pa.string()) for name in ("image_id", "attack", "norm", "outcome")]
    + [(name, pa.float64()) for name in ("eps", "linf", "l2", "clean_margin", "margin", "seconds")]
    + [("clean_confidence", pa.float64()), ("confidence", pa.float64()), ("restart", pa.int32())]
)
CHECKS = [
    Check(name="finite output", level="ok", message="all logits were finite"),
    Check(name="useful gradients", level="warning", message="the gradient is exactly zero for 12% of the images"),
    Check(name="independent images", level="ok", message="an image's logits do not depend on its neighbours"),
]


def _picture(rng: np.random.Generator, hue: float, size: int = 64) -> np.ndarray[Any, Any]:
    """A soft disc on a gradient: enough to look at."""
    y, x = np.mgrid[0:size, 0:size] / size
    disc = ((x - rng.uniform(0.35, 0.65)) ** 2 + (y - rng.uniform(0.35, 0.65)) ** 2 < rng.uniform(0.04, 0.1))[None]
    colour = 0.5 + 0.45 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))[:, None, None]
    ground = np.stack([x * 0.4 + 0.3, y * 0.4 + 0.3, 0.7 - x * 0.3])
    return np.where(disc, colour, ground).astype(np.float32)


def _image_rows(
    rng: np.random.Generator, index: int, label: int, n: int, attacks: list[str], strength: float
) -> list[dict[str, Any]]:
    """Rows of one image: its margin decides at which eps it falls, each attack finding a little more."""
    margin = float(rng.normal(3.2 + 1.5 * np.sin(label), 2.0))
    wrong = margin < 0
    other = int((label + 1 + rng.integers(n - 1)) % n)
    clean = other if wrong else label
    rows, fallen = [], False
    for eps in EPS:
        for j, attack in enumerate(attacks):
            after = margin - strength * eps * 255 * float(rng.uniform(2.0, 3.0)) - 0.3 * j
            outcome = "clean_wrong" if wrong else "skipped" if fallen else "fooled" if after < 0 else "robust"
            ran = outcome in ("fooled", "robust")
            steps = 20 if outcome == "robust" else int(rng.integers(1, 20)) if ran else 0
            rows.append(
                {
                    "index": index, "image_id": f"emoji/test/{index:05d}/0", "label": label, "clean_prediction": clean,
                    "attack": attack, "norm": "Linf", "eps": eps, "outcome": outcome,
                    "adversarial_prediction": other if outcome == "fooled" else label if ran else -1,
                    "steps": steps, "passes": steps + 1 if ran else 0,
                    "linf": eps if ran else 0.0, "l2": eps * 60 if ran else 0.0,
                    "clean_margin": margin, "margin": max(after, -0.8) if ran else float("nan"),
                    "clean_confidence": 0.9, "confidence": 0.6, "restart": 0, "seconds": 0.01 * steps,
                }
            )  # fmt: skip
            fallen = fallen or outcome == "fooled"
    return rows


def _write_gallery(folder: Path, rows: list[dict[str, Any]], rng: np.random.Generator, names: list[str]) -> None:
    folder.mkdir()
    for i, row in enumerate([row for row in rows if row["outcome"] == "fooled"][:12]):
        clean = _picture(rng, row["label"] / len(names))
        noise = rng.choice([-1.0, 0.0, 1.0], size=clean.shape).astype(np.float32) * np.float32(row["eps"])
        about = {
            "image_id": row["image_id"], "index": str(row["index"]), "label": str(row["label"]),
            "clean_prediction": str(row["clean_prediction"]), "prediction": str(row["adversarial_prediction"]),
            "clean_confidence": "0.9312", "confidence": "0.5521", "attack": row["attack"], "eps": repr(row["eps"]),
        }  # fmt: skip
        tensors = {"clean": clean, "adversarial": np.clip(clean + noise, 0, 1)}
        save_file(tensors, folder / f"{i:04d}.safetensors", metadata=about)


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    """Return a function that writes a finished run folder; `strength` scales the attack, class names may be given."""

    def write(
        folder: Path, *, images: int = 300, n_classes: int = 101, n_superclasses: int = 26, seed: int = 0,
        strength: float = 1.0, class_names: list[str] | None = None, checks: list[Check] | None = None,
        attacks: tuple[str, ...] = ("pgd", "apgd-ce"), eps: int = 3,
    ) -> Path:  # fmt: skip
        rng = np.random.default_rng(seed)
        names = class_names or [f"class {i:03d}" for i in range(n_classes)]
        supers = {name: f"group {chr(97 + i % n_superclasses)}" for i, name in enumerate(names)}
        rows = [
            row
            for index in range(images)
            for row in _image_rows(rng, index, index % len(names), len(names), list(attacks), strength)
            if row["eps"] in list(EPS)[:eps]
        ]
        manifest = {
            "format": 1, "kind": "attack", "name": folder.name,
            "command": "robustvlm attack tiny --eps 0.5/255,1/255,2/255",
            "created": "2025-01-31T12:00:00+00:00",
            "config": {
                "model": "tiny", "data": "emoji?split=test", "attack": list(attacks), "norm": "Linf",
                "eps": list(EPS)[:eps], "eps_text": list(EPS.values())[:eps],
                "steps": 20, "restarts": 1, "limit": images, "seed": seed,
            },
            "versions": {"robustvlm": "0.1.0", "torch": "2.9.0"}, "device": "cpu, 2 threads", "git_commit": None,
            "model": {"spec": "tiny", "fingerprint": "ab" * 16, "image_size": 64, "logit_scale": 100.0},
            "data": {"spec": "emoji", "fingerprint": "cd" * 16, "images": images, "class_names": names,
                     "templates": ["an emoji of {}"], "superclasses": supers},
        }  # fmt: skip
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "results.parquet")
        summary = summarise(
            rows,
            manifest,
            cost=Cost(
                forward_passes=12345, backward_passes=11111, seconds=151.5, model_seconds=140, passes_per_second=155
            ),
            checks=CHECKS if checks is None else checks,
            unreadable=[UnreadableImage(id="emoji/test/broken.png", reason="truncated file: 12 of 5,120 bytes")],
        )
        (folder / "summary.json").write_text(summary.model_dump_json(indent=1), encoding="utf-8")
        _write_gallery(folder / "gallery", rows, rng, names)
        return folder

    return write
