"""Comparisons use the images that both runs decided, and claim no more than the corrected tests show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustvlm.commands.attack.compare import CLEAN, Comparison, apart, compare, comparison_report, findings, stopped
from robustvlm.commands.attack.record import AttackedRun, load_run
from robustvlm.commands.attack.summary import summarise
from robustvlm.report.page import page_of
from robustvlm.stats import holm, mcnemar_exact, rate

WriteRun = Callable[..., Path]


@pytest.fixture
def pair(write_run: WriteRun, tmp_path: Path) -> tuple[AttackedRun, AttackedRun]:
    weak = write_run(tmp_path / "weak", images=120, n_classes=10, n_superclasses=3, seed=1)
    strong = write_run(tmp_path / "strong", images=90, n_classes=10, n_superclasses=3, seed=2, strength=0.2)
    return load_run(weak), load_run(strong)


def edit_rows(run: AttackedRun, change: Callable[[dict[str, object]], dict[str, object]]) -> AttackedRun:
    rows = [change(row) for row in run.rows.to_pylist()]
    return AttackedRun(run.folder, run.manifest, run.summary, pa.Table.from_pylist(rows, schema=run.rows.schema))


def right(run: AttackedRun, eps: float | None) -> dict[str, bool]:
    """Who is right, from the rows by definition."""
    rows = run.rows.to_pylist()
    answer = {r["image_id"]: r["label"] == r["clean_prediction"] for r in rows}
    for r in rows:
        if eps is not None and r["outcome"] == "fooled" and r["eps"] <= eps:
            answer[r["image_id"]] = False
    return answer


def test_counts_match_the_rows_on_common_images(pair: tuple[AttackedRun, AttackedRun]) -> None:
    radii = [None, *(at.eps for at in pair[0].summary.per_eps)]
    comparisons = compare(*pair)
    assert [c.condition for c in comparisons] == [CLEAN, "L∞ 0.5/255", "L∞ 1/255", "L∞ 2/255"]
    for comparison, eps in zip(comparisons, radii, strict=True):
        first, second = right(pair[0], eps), right(pair[1], eps)
        common = sorted(first.keys() & second.keys())
        assert len(common) == comparison.test.total == 90
        expected = mcnemar_exact([first[i] for i in common], [second[i] for i in common])
        assert comparison.test == expected
        assert comparison.first_rate == rate(sum(first[i] for i in common), 90)
        assert comparison.second_rate == rate(sum(second[i] for i in common), 90)
    assert [c.adjusted for c in comparisons] == holm([c.test.p_value for c in comparisons])


def test_copies_of_a_drawing_count_once(pair: tuple[AttackedRun, AttackedRun]) -> None:
    def copied(run: AttackedRun) -> AttackedRun:
        rows = [
            {**row, "index": 3 * row["index"] + copy, "image_id": f"{row['image_id'][:-1]}{copy}"}
            for row in run.rows.to_pylist()
            for copy in range(3)
        ]
        return AttackedRun(run.folder, run.manifest, run.summary, pa.Table.from_pylist(rows, schema=run.rows.schema))

    for one, three in zip(compare(*pair), compare(*map(copied, pair)), strict=True):
        assert three.test.p_value == one.test.p_value
        assert three.test.total == 3 * one.test.total
        assert three.test.things == one.test.only_first + one.test.only_second
        assert (three.first_rate.low, three.second_rate.high) == pytest.approx(
            (one.first_rate.low, one.second_rate.high)
        )
        assert three.finding == one.finding
    page = page_of(comparison_report(list(pair), compare(*map(copied, pair))))
    assert "Copies of one thing count once, in intervals and in tests" in page


def test_a_run_does_not_differ_from_itself(pair: tuple[AttackedRun, AttackedRun]) -> None:
    comparisons = compare(pair[0], pair[0])
    assert {c.adjusted for c in comparisons} == {1.0}
    assert findings(comparisons, ["a", "b"]) == [
        "No difference between a and b is shown unperturbed, at L∞ 0.5/255, at L∞ 1/255 and at L∞ 2/255 "
        "(paired test, p <= 0.05 after Holm's correction)."
    ]


def test_swapping_the_runs_swaps_the_finding(pair: tuple[AttackedRun, AttackedRun]) -> None:
    there, back = compare(*pair), compare(*pair[::-1])
    assert [c.finding for c in there] == [None if c.finding is None else 1 - c.finding for c in back]
    assert there[-1].finding == 1


def test_undecided_images_are_not_compared(pair: tuple[AttackedRun, AttackedRun]) -> None:
    lost = f"emoji/test/{next(r['index'] for r in pair[1].rows.to_pylist() if r['outcome'] == 'robust'):05d}/0"
    broken = edit_rows(
        pair[1], lambda r: {**r, "outcome": "failed"} if r["image_id"] == lost and r["outcome"] == "robust" else r
    )
    assert compare(pair[0], broken)[1].test.total == 89


def test_the_same_id_with_another_class_is_another_image(pair: tuple[AttackedRun, AttackedRun]) -> None:
    moved = edit_rows(pair[1], lambda r: {**r, "label": (r["label"] + 1) % 10})  # type: ignore[operator]
    assert compare(pair[0], moved) == []


def on_data(run: AttackedRun, **facts: object) -> AttackedRun:
    manifest = json.loads(json.dumps(run.manifest))
    manifest["data"] |= facts
    return AttackedRun(run.folder, manifest, run.summary, run.rows)


def test_equal_ids_of_other_data_are_other_images(pair: tuple[AttackedRun, AttackedRun]) -> None:
    photos = on_data(pair[0], spec="imagefolder:photos", fingerprint="ab")
    fog = on_data(pair[1], spec="imagefolder:photos_fog", fingerprint="cd")
    assert compare(photos, fog) == []
    assert compare(photos, on_data(fog, spec="imagefolder:photos")) == []  # the images in there were changed
    copied = compare(photos, on_data(fog, fingerprint="ab"))
    assert [c.test for c in copied] == [c.test for c in compare(*pair)]
    page = page_of(comparison_report([photos, fog], []))
    assert "saw different images (" in page
    assert "they are not tested" in page
    three = compare(photos, fog, on_data(photos, spec="imagefolder:copy"))
    assert {(c.first, c.second) for c in three} == {(0, 2)}
    assert len(apart([photos, fog, photos], ["a", "b", "c"])) == 2


def test_class_names_decide_not_their_numbers(pair: tuple[AttackedRun, AttackedRun]) -> None:
    names = list(pair[1].class_names)
    manifest = json.loads(json.dumps(pair[1].manifest))
    manifest["data"]["class_names"] = names[::-1]
    flipped = edit_rows(
        pair[1],
        lambda r: {**r, "label": 9 - r["label"], "clean_prediction": 9 - r["clean_prediction"]},  # type: ignore[operator]
    )
    renamed = AttackedRun(flipped.folder, manifest, flipped.summary, flipped.rows)
    assert compare(pair[0], renamed) == compare(*pair)


def test_other_norms_share_only_the_unperturbed_condition(pair: tuple[AttackedRun, AttackedRun]) -> None:
    manifest = json.loads(json.dumps(pair[1].manifest))
    manifest["config"]["norm"] = "L2"
    full = pq.read_table(pair[1].folder / "results.parquet")
    other = AttackedRun(pair[1].folder, manifest, summarise(full, manifest), pair[1].rows)
    assert [c.condition for c in compare(pair[0], other)] == [CLEAN]


def test_a_difference_is_claimed_only_below_the_level() -> None:
    test = mcnemar_exact([True] * 9, [False] * 9)
    counts = {"first": 0, "second": 1, "condition": CLEAN, "first_rate": rate(9, 9), "second_rate": rate(0, 9)}
    assert Comparison(**counts, test=test, adjusted=0.05).finding == 0
    assert Comparison(**counts, test=test, adjusted=0.051).finding is None


def test_where_a_run_stopped_early_it_is_not_tested(pair: tuple[AttackedRun, AttackedRun]) -> None:
    """What it has decided are the images that fall first: they would make it look worse than it is."""
    last = max(row["eps"] for row in pair[1].rows.to_pylist())
    cut = edit_rows(
        pair[1], lambda r: {**r, "outcome": "undecided"} if r["outcome"] == "robust" and r["eps"] == last else r
    )
    early = cut.summary.model_copy(update={"unfinished": "the budget was spent"})
    half = AttackedRun(cut.folder, cut.manifest, early, cut.rows)
    assert [c.condition for c in compare(pair[0], half)] == [CLEAN, "L∞ 0.5/255", "L∞ 1/255"]
    assert stopped([half], ["b"]) == [
        "b stopped early (the budget was spent): where it has undecided images it is not tested."
    ]
    page = page_of(comparison_report([pair[0], half], compare(pair[0], half)))
    assert "stopped early" in page
    assert "Only the first" in page


def test_data_of_another_content_is_other_data(pair: tuple[AttackedRun, AttackedRun]) -> None:
    assert compare(on_data(pair[0], content="ab"), on_data(pair[1], content="cd")) == []
    assert compare(on_data(pair[0], content="ab"), pair[1]) == compare(*pair)
