"""The benchmark of purifier and mapper: what its columns say of features that are understood."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks.common import MADE_WITH
from benchmarks.purify import pipeline, scores
from benchmarks.purify.columns import EPS, columns
from benchmarks.purify.tables import NAMES, print_tables
from robustvlm.data import open_data
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.stats import rate

TEXT = np.eye(3)


def features(spread: float, centre: int = 0, n: int = 200) -> np.ndarray:
    rows = TEXT[centre] + spread * np.random.default_rng(0).normal(size=(n, 3))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def test_tight_features_near_the_clean_one_get_all_certificates() -> None:
    found = columns(features(0.05), TEXT[0], TEXT, 0.5)
    assert found["score"] > 0.99
    assert (found["class"], found["pilot_class"]) == (0, 0)
    assert found["class_radius"] > 0
    assert found["radius"] > 0
    assert all(found[f"cos@{eps}"] >= found[f"anchored@{eps}"] for eps in EPS if found[f"cos@{eps}"] < 1)
    assert found["anchored@0.1"] > 0.5


def test_features_that_noise_made_alike_are_certified_but_not_anchored() -> None:
    found = columns(features(0.05, centre=1), TEXT[0], TEXT, 0.5)
    assert found["radius"] == pytest.approx(columns(features(0.05), TEXT[0], TEXT, 0.5)["radius"], rel=0.05)
    assert found["anchored@0.1"] == -1
    assert found["score"] < 0.6
    assert found["class"] == 1


def test_tables_average_over_images_and_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for seed in (0, 1):
        for image in "ab":
            for variant in NAMES:
                if variant == "encoder" and seed:
                    continue
                values = columns(features(0.05), TEXT[0], TEXT, 0.25)
                del values["class"], values["pilot_class"]
                facts = {"label": "m", "image": image, "sigma": 0.25, "variant": variant, "seed": seed, "n": 200}
                lines.append({**facts, **values, "score": 0.5 + 0.1 * seed, "right": True, "pilot_right": True})
    print_tables(lines)
    said = capsys.readouterr().out
    assert "2 images, 200 copies, seeds 0, 1" in said
    assert "| 0.25 | encoder alone | 0.500 |" in said
    assert "| 0.25 | + both | 0.550 ±0.050 |" in said


@pytest.mark.parametrize("changed", ["steps", "mapper-steps", "precision", "data"])
def test_lines_of_other_settings_are_refused(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained; lines of another label may be of whatever they like."""
    value = {"precision": "fp32", "data": "emoji?split=train"}.get(changed, "7")
    monkeypatch.setattr(sys, "argv", ["scores", "tiny", f"--{changed}", value])
    monkeypatch.setattr(scores, "trained", lambda *_, **__: pytest.fail("trained"))
    made = {"model": load_model("tiny").fingerprint, "data": open_data("emoji").fingerprint()}
    made |= {"train_data": open_data("emoji?split=train").fingerprint()}
    made |= {"steps": 500, "mapper_steps": 400, "precision": "bf16"}
    line = {"label": "tiny", "n": 160, "image": "i", "sigma": 0.25, "variant": "encoder", "seed": 0, MADE_WITH: made}
    with pytest.raises(UserError, match=rf"was made with {changed.replace('-', '_')} .*\(asked for: "):
        next(scores.measure(scores.arguments(), [line]))
    del line[MADE_WITH]
    with pytest.raises(UserError, match="does not say what it was made with"):
        next(scores.measure(scores.arguments(), [line]))
    with pytest.raises(pytest.fail.Exception, match="trained"):
        next(scores.measure(scores.arguments(), [{**line, "label": "another"}]))


def test_a_model_that_is_right_on_no_image_has_no_success_rate() -> None:
    assert pipeline.success(rate(0, 0)) == "no images"
    assert pipeline.success(rate(0, 4)).startswith("0.00 (0.00 to 0.")
