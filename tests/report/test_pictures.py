"""Charts and gallery pictures: deterministic, inline, faithful to their numbers."""

from __future__ import annotations

import base64
import io
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from robustvlm.commands.attack import plots
from robustvlm.commands.attack.plots import Margins, margins, steps_to_success
from robustvlm.report.page import amplified_difference, data_uri, load_gallery
from robustvlm.stats import rate


def decode(uri: str) -> np.ndarray:  # type: ignore[type-arg]
    prefix = "data:image/png;base64,"
    assert uri.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri[len(prefix) :]))))


def curve(name: str = "run", ticks: tuple[str, ...] = ("0", "1/255")) -> plots.Curve:
    return plots.Curve(name, (0.0, 1 / 255), ticks, (rate(9, 10), rate(4, 10)))


def test_png_holds_the_eight_bit_values() -> None:
    values = np.arange(256, dtype=np.float32).reshape(1, 16, 16).repeat(3, 0)
    assert (decode(data_uri(values / 255)) == values.transpose(1, 2, 0)).all()


def test_png_survives_values_out_of_range_and_nan() -> None:
    pixels = np.array([-1.0, 2.0, np.nan], dtype=np.float32).reshape(3, 1, 1)
    assert decode(data_uri(pixels)).ravel().tolist() == [0, 255, 0]


def test_large_pictures_are_scaled_down() -> None:
    assert decode(data_uri(np.zeros((3, 400, 600), dtype=np.float32))).shape == (171, 256, 3)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 0.5), st.integers(0, 2**16))
def test_amplification_is_faithful(size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    clean = rng.random((3, 4, 4), dtype=np.float32)
    adversarial = (clean + rng.uniform(-size, size, clean.shape)).astype(np.float32)
    shown, gain = amplified_difference(clean, adversarial)
    largest = np.abs(adversarial - clean).max()
    assert gain * largest <= 0.5 * 1.01
    assert (gain + 1) * largest > 0.5 * 0.99
    assert shown == pytest.approx(0.5 + gain * (adversarial - clean), abs=0.01)


def test_no_difference_is_plain_grey() -> None:
    clean = np.full((3, 2, 2), 0.3, dtype=np.float32)
    shown, gain = amplified_difference(clean, clean)
    assert gain == 1
    assert (shown == 0.5).all()


ABOUT = {
    "image_id": "a", "index": "0", "label": "0", "clean_prediction": "0", "prediction": "1",
    "clean_confidence": "0.9", "confidence": "0.6", "attack": "pgd", "eps": "0.1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({}, (1, 2, 2)),
        ({"label": "7"}, (3, 2, 2)),
        ({"confidence": "high"}, (3, 2, 2)),
        ({"prediction": "-2"}, (3, 2, 2)),
    ],
)
def test_damaged_examples_are_left_out(tmp_path: Path, change: dict[str, str], shape: tuple[int, ...]) -> None:
    image = np.zeros((3, 2, 2), dtype=np.float32)
    save_file({"clean": image, "adversarial": image}, tmp_path / "0001.safetensors", metadata=ABOUT)
    other = np.zeros(shape, dtype=np.float32)
    save_file({"clean": other, "adversarial": other}, tmp_path / "0000.safetensors", metadata={**ABOUT, **change})
    (tmp_path / "0002.safetensors").write_bytes(b"not a tensor file")
    (example,) = load_gallery(tmp_path, ["cat", "dog"], {0.1: "1/10"})
    assert (example.label, example.prediction, example.eps, example.confidence) == ("cat", "dog", "1/10", "60.0%")


def test_an_image_that_is_not_accepted_has_a_name_of_its_own(tmp_path: Path) -> None:
    image = np.zeros((3, 2, 2), dtype=np.float32)
    about = {**ABOUT, "clean_prediction": "-1"}
    save_file({"clean": image, "adversarial": image}, tmp_path / "0.safetensors", metadata=about)
    for words in ({}, {"refused": "no answer"}):
        (example,) = load_gallery(tmp_path, ["cat", "dog"], {0.1: "1/10"}, **words)
        assert example.clean_prediction == words.get("refused", "rejected")


def test_charts_are_deterministic_and_keyed() -> None:
    first, again = (plots.security_curve([curve()], key="a", norm="L∞") for _ in range(2))
    assert first == again
    ids = set(re.findall(r'id="([^"]+)"', first))
    assert ids
    assert all(i.startswith("a-") for i in ids)


def test_charts_keep_text_and_take_the_pages_colours() -> None:
    svg = plots.security_curve([curve()], key="a", norm="L∞")
    assert ">1/255</text>" in svg
    assert "var(--series-0)" in svg
    assert not re.search(r"#0[1-6]0[1-6]0[0-9]", svg)
    assert "http" not in svg


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=12, unique=True))
def test_labels_of_the_curve_do_not_run_into_each_other(radii: list[float]) -> None:
    ticks = {eps: f"{eps:.2g}/255" for eps in sorted([0.0, *radii])}
    labels = plots.uncrowded(ticks)
    assert len(labels) == len(ticks)
    assert labels[0] == ticks[0.0]
    assert labels[-1] == ticks[max(radii)]
    shown = {eps: label for eps, label in zip(ticks, labels, strict=True) if label}
    assert all(ticks[eps] == label for eps, label in shown.items())
    if len(ticks) <= 6 and len(shown) > 2:
        for (left, one), (right, other) in pairwise(shown.items()):
            assert (right - left) / max(radii) > 0.019 * (len(one) + len(other)) / 2


def test_labels_are_neither_mathematics_nor_markup() -> None:
    svg = plots.security_curve([curve("<b>$x^2$"), curve("b", ("0", "$\\frac{1"))], key="a", norm="<i>")
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "$\\frac{1" in svg


def test_flat_and_single_valued_data_can_be_drawn() -> None:
    assert "median 1.00" in plots.margin_histogram(Margins((1.0,), (1.0,)), key="m")
    assert "median 0" in plots.steps_histogram({0.1: [0]}, {0.1: "0.1"}, key="s")
    assert "largest 5000" in plots.steps_histogram({0.1: [1, 5000]}, {0.1: "0.1"}, key="s")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30))
def test_no_bar_mixes_right_and_wrong(values: list[float]) -> None:
    bins = plots._bins_with_zero(np.asarray(values))
    assert 0.0 in bins
    assert bins[0] <= min(values) + 1e-9
    assert bins[-1] >= max(values) - 1e-9
    assert len(bins) <= 32


def test_margins_take_the_smallest_inside_the_ball() -> None:
    def row(image: str, eps: float, outcome: str, margin: float) -> dict[str, object]:
        return {"image_id": image, "eps": eps, "outcome": outcome, "clean_margin": 3.0, "margin": margin}

    rows = [
        row("a", 0.1, "robust", 1.0), row("a", 0.2, "robust", 0.5), row("a", 0.4, "fooled", -1.0),
        row("b", 0.1, "fooled", -0.2), row("b", 0.2, "skipped", float("nan")),
        row("c", 0.1, "clean_wrong", float("nan")), row("d", 0.1, "failed", float("nan")),
    ]  # fmt: skip
    assert margins(rows, 0.2) == Margins((3.0, 3.0), (0.5, -0.2))
    assert margins(rows, 0.4).attacked == (-1.0, -0.2)


def test_steps_are_those_of_successes() -> None:
    rows = [
        {"eps": 0.2, "outcome": "fooled", "steps": 4},
        {"eps": 0.1, "outcome": "fooled", "steps": 2},
        {"eps": 0.1, "outcome": "robust", "steps": 20},
    ]
    assert list(steps_to_success(rows).items()) == [(0.1, [2]), (0.2, [4])]
