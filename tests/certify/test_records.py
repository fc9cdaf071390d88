"""Certificates as records: contradictions are refused, nothing is lost in JSON, numbers are rounded down."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.certify import Certificate, Provenance
from robustvlm.certify.record import best_of, expected_false
from robustvlm.errors import UserError
from robustvlm.text import floor_to, format_down, format_exact, format_up

HOW = Provenance(
    sigma=0.25,
    alpha=0.001,
    n=640,
    n_pilot=200,
    stop_rule="anytime",
    bound="betting",
    seeds={"pilot": 1, "estimation": 2, "inference": 3},
    dtype="float32",
    encoder="ab12",
    alpha_split={"r": 0.001},
    resize_norm=0.878,
    label_source="pilot",
    direction_source="predictable",
    deployed_n0=1000,
)
GOOD = Certificate(
    claim="class", theorem="T5+T8", radius=0.31, label=3, provenance=HOW, image_id="a", image="f00", classes="c1"
)


def test_round_trip_through_json() -> None:
    assert Certificate.from_dict(json.loads(json.dumps(GOOD.to_dict()))) == GOOD
    with pytest.raises(UserError, match="colour"):
        Certificate.from_dict({**GOOD.to_dict(), "colour": 1})
    with pytest.raises(FrozenInstanceError):
        GOOD.radius = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("radius", [-0.1, float("nan"), float("inf")])
def test_impossible_radii_are_refused(radius: float) -> None:
    with pytest.raises(UserError, match="finite number >= 0"):
        replace(GOOD, radius=radius)


def test_negative_cosines_and_unsourced_labels_are_refused() -> None:
    with pytest.raises(UserError, match=r"\[0, 1\)"):
        Certificate(claim="feature", theorem="T1", radius=0.1, cos0=-0.2, provenance=HOW)
    with pytest.raises(UserError, match="what chose it"):
        replace(GOOD, provenance=replace(HOW, label_source="none"))
    with pytest.raises(UserError, match="what chose it"):
        replace(GOOD, label=None)
    with pytest.raises(UserError, match="claim must be one of"):
        replace(GOOD, claim="anything")


@pytest.mark.parametrize("bound", ["hoeffding", "bernstein", "kl", "ell", "clopper-pearson"])
def test_a_fixed_bound_cannot_have_stopped_early(bound: str) -> None:
    with pytest.raises(UserError, match="cannot stop early"):
        replace(HOW, bound=bound)
    assert replace(HOW, bound=bound, stop_rule="fixed").bound == bound


def test_selection_on_the_estimation_sample_cannot_be_recorded() -> None:
    for field in ("label_source", "direction_source"):
        with pytest.raises(UserError, match="must be one of"):
            replace(HOW, **{field: "estimation"})


def test_streams_must_differ_and_alpha_adds_up() -> None:
    with pytest.raises(UserError, match="different seeds"):
        replace(HOW, seeds={"pilot": 1, "estimation": 1})
    with pytest.raises(UserError, match="add up"):
        replace(HOW, alpha_split={"band": 0.0008, "side": 0.0004})
    with pytest.raises(UserError, match="alpha must lie"):
        replace(HOW, alpha=0.0)


def test_the_best_is_only_taken_within_one_rule_and_alpha() -> None:
    half = replace(GOOD, provenance=replace(HOW, alpha=0.0005, alpha_split=None))
    better = replace(half, radius=0.4, theorem="T6")
    assert best_of([half, better], 0.001) is better
    assert expected_false([half, better]) == pytest.approx(0.001)
    with pytest.raises(UserError, match="split it"):
        best_of([GOOD, better], 0.001)
    vote = replace(better, claim="vote")
    with pytest.raises(UserError, match="one deployed rule"):
        best_of([half, vote], 0.001)
    with pytest.raises(UserError, match="one deployed rule"):
        best_of([half, replace(better, label=2)], 0.001)


@pytest.mark.parametrize(
    ("differs", "name"),
    [
        ({"image": "f01"}, "image"), ({"image_id": "b"}, "image"), ({"classes": "c2"}, "class list"),
        ({"rule": "another"}, "rule"), ({"prompts": "d3"}, "prompts"),
    ],
)  # fmt: skip
def test_the_best_is_not_taken_over_images_or_class_lists(differs: dict[str, str], name: str) -> None:
    half = replace(GOOD, provenance=replace(HOW, alpha=0.0005, alpha_split=None))
    with pytest.raises(UserError, match=f"these differ in {name}"):
        best_of([half, replace(half, radius=0.4, **differs)], 0.001)


def test_the_best_is_only_taken_where_it_is_said_of_what() -> None:
    half = replace(GOOD, provenance=replace(HOW, alpha=0.0005, alpha_split=None))
    with pytest.raises(UserError, match="name it"):
        best_of([replace(half, image=""), replace(half, image="")], 0.001)
    accepts = replace(half, claim="openset-accept", label=None)
    with pytest.raises(UserError, match="thresholds"):
        best_of([accepts, accepts], 0.001)
    known = replace(accepts, thresholds={"tau": 0.3})
    with pytest.raises(UserError, match="these differ in thresholds"):
        best_of([known, replace(known, thresholds={"tau": 0.31})], 0.001)
    along = replace(half, claim="direction", cos0=0.5, label=None)
    with pytest.raises(UserError, match="does not name its direction"):
        best_of([along, along], 0.001)


def test_a_deployed_radius_is_never_the_larger_one() -> None:
    assert replace(GOOD, deployed_radius=0.3).deployed_radius == 0.3
    for radius in (0.32, -0.1, float("nan")):
        with pytest.raises(UserError, match="finitely many copies"):
            replace(GOOD, deployed_radius=radius)


@given(st.floats(1e-9, 1e9), st.integers(1, 6))
def test_upper_limits_are_printed_at_least_as_high_and_requests_exactly(value: float, digits: int) -> None:
    assert value <= float(format_up(value, digits)) <= value * (1 + 10.0 ** (1 - digits) * (1 + 1e-9))
    assert float(format_exact(value)) == value


@given(st.floats(-1e3, 1e3), st.integers(0, 6))
def test_printed_numbers_never_exceed_the_computed_ones(value: float, digits: int) -> None:
    assert float(format_down(value, digits)) <= value
    assert value - floor_to(value, digits) < 10.0**-digits * (1 + 1e-6) + 1e-12
    assert float(format_down(value, digits)) == floor_to(value, digits)


def test_rounding_keeps_exact_decimals() -> None:
    assert [format_down(x, 2) for x in (0.29, 0.295, 0.2999999, 0.0)] == ["0.29", "0.29", "0.29", "0.00"]
