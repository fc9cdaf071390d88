"""The numbers of a certify run, recomputed by hand from a few rows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from robustvlm.certify import cone_cos, fcsb_cos
from robustvlm.certify.claims import ClaimFacts
from robustvlm.certify.feature import vector_cos
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.commands.certify.record import CertifyRecord, rule, source, state, verdict
from robustvlm.commands.certify.store import CERTIFY_SCHEMA, COLUMNS, CertifyFact, make_certify_rows
from robustvlm.commands.certify.summary import CertifySummary, standing, summarise_certify
from robustvlm.commands.certify.view import certify_report
from robustvlm.report.screen import show


def manifest(**changes: Any) -> dict[str, Any]:
    config = CertifyConfig(
        **{
            "model": "m", "data": "d", "claim": "feature", "sigma": 0.5, "samples": 1000, "n_pilot": 200, "alpha": 0.01,
            "min_cos": 0.5, "at": [0.1, 0.3], "limit": None, "seed": 0, "lanes": 64, "device": "cpu",
            "precision": "fp32", "resolution": 32, **changes,
        }
    )  # fmt: skip
    plan = {"statement": "it holds", "alpha_split": {"all": 0.01}, "best_radius": 1.0}
    return {"config": config.model_dump(), "plan": plan}


def fact(index: int, radius: float, **changes: Any) -> CertifyFact:
    values: dict[str, Any] = {
        "index": index, "image_id": f"i{index}", "label": 0, "prediction": 0, "correct": True, "claim": "feature",
        "radius": radius, "stop": "fixed", "n": 800, "n_pilot": 200, "failed": 0, "r": 0.8, "resize_norm": 1.0,
        "passes": 1001, "seconds": 1.0, "certificate": "{}",
        "columns": {"paper_radius": 0.5 * radius, "paper_s": 0.85, "cone_radius": 0.8 * radius}, **changes,
    }  # fmt: skip
    return CertifyFact(**values)


def summary(*facts: CertifyFact, **config: Any) -> CertifySummary:
    return summarise_certify(make_certify_rows(facts), manifest(**config))


def test_copies_of_every_image_leave_intervals_as_they_were() -> None:
    radii = [0.4, 0.2, 0.0, 0.3]
    alone = summary(*(fact(i, radius, correct=i > 0) for i, radius in enumerate(radii)))
    rows = make_certify_rows([fact(i, radii[i // 3], correct=i // 3 > 0) for i in range(12)])
    both = summarise_certify(rows, manifest(), group=lambda name: str(int(name[1:]) // 3))
    assert (alone.worth, both.worth) == (4.0, 4.0)
    pairs = [(alone.abstained, both.abstained), (alone.correct, both.correct)]
    pairs += [(alone.certified_correct, both.certified_correct)]
    for one, other in zip(alone.at, both.at, strict=True):
        pairs += [(one.certified, other.certified), (one.correct, other.correct)]
        pairs += [(one.others[name], other.others[name]) for name in one.others]
    pairs += [(one.abstained, other.abstained) for one, other in zip(alone.methods, both.methods, strict=True)]
    for one_rate, other_rate in pairs:
        assert one_rate is not None
        assert other_rate is not None
        assert other_rate.total == 3 * one_rate.total
        assert (other_rate.low, other_rate.value, other_rate.high) == pytest.approx(
            (one_rate.low, one_rate.value, one_rate.high)
        )


def test_shares_and_means_by_hand() -> None:
    found = summary(
        fact(0, 0.4), fact(1, 0.2), fact(2, 0.0), fact(3, 0.3, correct=False), fact(4, 0.1, correct=None, label=-1)
    )
    assert found.images == 5
    assert found.mean_radius == pytest.approx(0.2)
    assert found.median_radius == 0.2
    assert (found.abstained.successes, found.abstained.total) == (1, 5)
    assert found.average_certified_radius == pytest.approx((0.4 + 0.2) / 4)
    assert found.correct is not None
    assert (found.correct.successes, found.correct.total) == (3, 4)
    assert found.certified_correct is not None
    assert (found.certified_correct.successes, found.certified_correct.total) == (2, 4)
    low, high = found.at
    assert (low.certified.successes, high.certified.successes) == (4, 2)
    assert low.correct is not None
    assert high.correct is not None
    assert (low.correct.successes, high.correct.successes) == (2, 1)
    assert (low.others["paper_radius"].successes, high.others["cone_radius"].successes) == (3, 1)
    assert [method.column for method in found.methods] == ["radius", "cone_radius", "paper_radius"]
    assert found.risk.expected_false == pytest.approx(0.05)
    assert found.certified_correct.low < 0.5 < found.certified_correct.high


def test_the_cosine_curve_is_the_mean_of_the_bounds() -> None:
    found = summary(
        fact(0, 0.3), fact(1, 0.0, r=0.02, columns={"paper_s": 0.5, "paper_radius": 0.0, "cone_radius": 0.0})
    )
    by_eps = {point.eps: point for point in found.curve}
    assert {0.0, 0.1, 0.3} <= set(by_eps)
    point = by_eps[0.3]
    exact = 0.5 * (vector_cos(0.8, 0.6) - 1.0)
    assert exact - 0.01 < point.ours <= exact
    assert point.cone == pytest.approx(0.5 * (float(cone_cos(0.8, 0.6)) - 1.0))
    assert point.paper == pytest.approx(0.5 * (float(fcsb_cos(0.85, 0.6)) - 1.0))
    assert point.fcsb is None
    assert point.deployed is None
    ours = [point.ours for point in found.curve]
    assert ours == sorted(ours, reverse=True)
    assert all(point.ours >= point.cone - 0.01 for point in found.curve)


def test_the_deployed_curve_lies_below_the_ideal_one() -> None:
    found = summary(fact(0, 0.3), fact(1, 0.0, r=0.0), deployed=1000)
    assert all(point.deployed is not None and point.deployed <= point.ours + 1e-9 for point in found.curve)
    assert max(point.deployed or 0.0 for point in found.curve) > -0.2


def test_samples_are_compared_with_the_fixed_number() -> None:
    found = summary(
        fact(0, 0.3, n=96, n_pilot=0, stop="certified", passes=128),
        fact(1, 0.0, n=320, n_pilot=0, stop="futile", passes=352),
        fact(2, 0.0, n=1000, n_pilot=0, stop="exhausted", passes=1000),
        radius=0.3,
    )
    assert found.samples.used == 1416
    assert found.samples.fixed == 3000
    assert found.samples.saved == pytest.approx(1 - 1416 / 3000)
    assert found.samples.median == 320
    assert found.samples.stops == {"certified": 1, "futile": 1, "exhausted": 1}


def test_class_claims_have_no_cosine_curve() -> None:
    found = summary(fact(0, 0.3, claim="class", r=None, columns={"mean_radius": 0.1}), claim="class", min_cos=None)
    assert found.curve == []
    assert [method.column for method in found.methods] == ["radius", "mean_radius"]


def test_rows_hold_every_column_and_order_by_image() -> None:
    table = make_certify_rows([fact(3, 0.1), fact(1, 0.0)])
    assert table.schema == CERTIFY_SCHEMA
    assert set(COLUMNS) < set(table.column_names)
    assert table.column("index").to_pylist() == [1, 3]
    assert table.column("abstained").to_pylist() == [True, False]
    assert table.column("votes").null_count == 2


OWN = ClaimFacts(name="mine", kept="my class is certified to stay", about_class=True, columns=("radius", "mean_radius"))


def test_a_claim_that_is_nobodys_is_refused_and_an_own_one_is_told() -> None:
    found = summary(fact(0, 0.2))
    assert "own_claim" not in found.model_dump()  # files of built-in claims stay as they were
    assert CertifySummary.model_validate_json(found.model_dump_json()) == found
    content = found.model_dump(mode="json")
    for changes, words in (
        ({"claim": "featur"}, "unknown claim 'featur': did you mean 'feature'"),
        ({"claim": "my_claims:mine"}, "which need it"),
        ({"own_claim": asdict(OWN)}, "own_claim is for claims of the form module:callable"),
    ):
        with pytest.raises(ValidationError, match=words):
            CertifySummary.model_validate(content | changes)
    with pytest.raises(ValidationError, match="unknown claim 'featur'"):
        CertifyConfig(**manifest(claim="featur")["config"])


def test_a_summary_goes_by_what_an_own_claim_says_of_itself() -> None:
    about = manifest(claim="my_claims:mine")
    about["plan"]["claim"] = asdict(OWN)
    own = summarise_certify(make_certify_rows([fact(0, 0.2, columns={"mean_radius": 0.1})]), about)
    assert [method.column for method in own.methods] == ["radius", "mean_radius"]
    assert own.curve == []
    assert "my class is certified to stay" in verdict(own)
    assert CertifySummary.model_validate_json(own.model_dump_json()) == own


def test_a_run_without_images_has_no_summary() -> None:
    with pytest.raises(ValueError, match="without images"):
        summarise_certify([], manifest())


def test_colour_and_verdict_go_by_a_distance_that_was_asked_about() -> None:
    """A mean radius of 0.0034 is no success, however many images have one."""
    tiny = summary(*(fact(i, 0.0034) for i in range(4)))
    some = summary(fact(0, 0.2), *(fact(i, 0.0034) for i in range(1, 4)))
    half = summary(fact(0, 0.2), fact(1, 0.1), fact(2, 0.0), fact(3, 0.0))
    nothing = summary(fact(0, 0.0), fact(1, 0.0))
    assert [state(one) for one in (tiny, some, half, nothing)] == ["none", "neutral", "neutral", "none"]
    assert "0.0034 (L₂) on average" in verdict(tiny)
    assert "At the distance 0.1 it holds for 0 of 4." in verdict(tiny)
    assert verdict(nothing).startswith("For none of the 2 images")
    wrong = summary(
        *(fact(i, 0.2, correct=False, claim="class", r=None) for i in range(4)), claim="class", min_cos=None
    )
    assert state(wrong) == "none"  # certified to stay wrong
    asked = summary(fact(0, 0.3, stop="certified"), fact(1, 0.0, stop="futile"), radius=0.3, at=[0.01, 0.3])
    assert standing(asked) == (0.3, asked.at[1].certified)
    assert state(asked) == "held", "half of the images keep what was asked for"
    assert "One grey level in every pixel is a distance of 0.218." in verdict(tiny, resolution=32)


def test_what_was_asked_for_is_printed_as_asked_and_bounds_on_the_safe_side(tmp_path: Path) -> None:
    low = 0.1234567
    options: dict[str, Any] = {"at": [low], "alpha": 0.0123456, "sigma": 0.5000001}
    facts, made = (fact(0, low), fact(1, 0.0)), {**manifest(**options), "kind": "certify", "name": "run"}
    found, config = summary(*facts, **options), CertifyConfig(**made["config"])
    run = CertifyRecord(tmp_path, made, found, config, make_certify_rows(facts))
    console = Console(width=200)
    with console.capture() as shown:
        show(console, certify_report(run))
    text = shown.get()
    assert "0.123457" not in text  # rounded up
    assert text.count("0.1234567") >= 2
    assert "noise 0.5000001" in text
    assert "wrong with probability at most 0.0123456" in text
    assert "at most 0.0247" in text  # 2 * 0.0123456 = 0.0246912


def test_runs_say_which_rule_and_which_source_they_are_about() -> None:
    found = summary(fact(0, 0.3), fact(1, 0.3, resize_norm=None))
    assert "1 of 2 images were resized first and rounded to 8 bits" in source(found)
    assert "not resized" in source(summary(fact(0, 0.3)))
    assert "nothing is stated of them" in rule(found)
