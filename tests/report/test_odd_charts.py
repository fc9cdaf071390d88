"""Every chart is drawn, or says that it could not be, whatever the numbers are: none, equal, huge, infinite, NaN."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from robustvlm.commands.attack import plots
from robustvlm.commands.attack import report as html
from robustvlm.commands.attack.plots import Margins
from robustvlm.commands.attack.record import AttackedRun, load_run
from robustvlm.commands.certify import pictures as certify_plots
from robustvlm.commands.detect import words as detect_plots
from robustvlm.errors import UserError
from robustvlm.report import charts
from robustvlm.report.page import page_of
from robustvlm.stats import mean, rate

WriteRun = Callable[..., Path]
ODD = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-320, 1e300, -1e300, float("inf"), float("nan"), 3.7]), max_size=4
)
RATES = st.lists(st.builds(lambda n, k: rate(min(k, n), n), st.integers(0, 3), st.integers(0, 3)), max_size=3)
FIGURE = settings(max_examples=5, deadline=None, phases=[Phase.generate])


def check(drawn: Markup) -> None:
    assert drawn.startswith(("<svg", '<p class="small">This chart could not be drawn'))
    assert "<script" not in drawn


@FIGURE
@given(ODD)
def test_charts_of_attacks(values: list[float]) -> None:
    eps = tuple(values)
    curve = plots.Curve("a", eps, tuple(map(str, eps)), tuple(rate(i, 4) for i in range(len(eps))))
    check(plots.security_curve([curve] * len(values), key="k", norm="L2"))
    check(plots.margin_histogram(Margins(eps, eps[::-1]), key="k"))
    check(plots.steps_histogram({e: [i] * i for i, e in enumerate(eps)}, dict.fromkeys(eps, "e"), key="k"))


@FIGURE
@given(ODD, RATES)
def test_charts_of_certificates(values: list[float], rates: list[object]) -> None:
    line = charts.Line("a", tuple(values), values=tuple(values))
    check(certify_plots.cosine_curve([line], key="k", cos0=values[0] if values else None))
    shares = charts.Line("a", tuple(values[: len(rates)]), rates=tuple(rates[: len(values)]))  # type: ignore[arg-type]
    check(certify_plots.share_curve([shares], key="k", what="certified"))
    check(certify_plots.samples_histogram([int(v) for v in values if np.isfinite(v)], key="k", fixed=len(values)))


@FIGURE
@given(ODD, RATES)
def test_charts_of_detection_and_training(values: list[float], rates: list[object]) -> None:
    array = np.array(values)
    check(detect_plots.roc_chart([detect_plots.Curve("a", array, array[::-1])], key="k", unknown="far"))
    check(detect_plots.histogram(array, [("far", array)], values[0] if values else 0.0, key="k", title="score"))
    check(detect_plots.auroc_chart([], ["far"], key="k"))
    points = list(enumerate(values))
    check(charts.loss_curves({"loss": points} if values else {}, key="k"))
    check(charts.rate_curves({"a": list(enumerate(rates))}, key="k", kept=None))  # type: ignore[arg-type]
    check(charts.mean_curves({"a": [(0, mean([v for v in values if abs(v) < 1e9]))]}, key="k"))
    check(charts.level_norms(dict(points), dict(points), key="k"))


@pytest.mark.parametrize("margin", [0.0, 5.0, -2.0])
def test_equal_margins_are_a_chart(margin: float) -> None:
    drawn = plots.margin_histogram(Margins((margin,) * 3, (margin,) * 3), key="k")
    assert drawn.startswith("<svg")
    assert re.search("Margins of 3 images", drawn)


def test_a_run_whose_margins_are_all_zero_has_a_report(write_run: WriteRun, tmp_path: Path) -> None:
    """As of a head of zeros, or of two classes with the same text."""
    run = load_run(write_run(tmp_path / "run", images=12, n_classes=4, eps=1))
    rows = [{**row, "clean_margin": 0.0, "margin": 0.0} for row in run.rows.to_pylist()]
    flat = AttackedRun(run.folder, run.manifest, run.summary, pa.Table.from_pylist(rows, schema=run.rows.schema))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 'id="curve"' in page_of(html.attack_report(flat))


def test_a_fault_of_the_report_is_one_line_that_says_where_the_numbers_are(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", images=12, n_classes=4, eps=1)

    def broken(run: AttackedRun) -> str:
        del run
        raise IndexError("no such\nthing")

    monkeypatch.setattr(html, "attack_report", broken)
    with pytest.raises(UserError, match=r"could not be drawn \(IndexError: no such thing\); its numbers are whole"):
        html.write_report(folder)
