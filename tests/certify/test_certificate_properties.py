"""What must hold for every input: monotone in the radius, ordered by theorem, tables never above the exact value."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.certify import cone_cos, fcsb_cos, vector_table
from robustvlm.certify.bands import Band, dkw_band, ell_band
from robustvlm.certify.feature import (
    _dual,
    cone_radius,
    fcsb_radius,
    join,
    norm_upper,
    required_norm,
    vector_cos,
    vector_radius,
)
from robustvlm.certify.means import hoeffding_lower
from robustvlm.certify.normal import shift_down, shift_up
from robustvlm.certify.shapes import Sideways, cdf_lower, cdf_radius, layer_cake
from robustvlm.certify.tangent import tangent_at
from robustvlm.errors import UserError

unit = st.floats(0.0, 1.0)
shift = st.floats(0.0, 4.0)
samples = st.lists(unit, min_size=50, max_size=50)
BANDS = {name: make(50, 0.01) for name, make in (("ell", ell_band), ("dkw", dkw_band))}


def cdf_upper(scores: list[float], a: float, band: Band) -> float:
    """Return an upper bound of the mean score within `a` sigmas."""
    return 1.0 - float(cdf_lower(1.0 - np.asarray(scores), a, band))


def cdf_plug_in(scores: list[float] | np.ndarray, a: float) -> float:
    """Return the shifted mean of the empirical distribution: between both bounds, and no certificate."""
    return float(layer_cake(np.sort(scores), np.arange(len(scores), 0, -1) / len(scores), a))


@settings(max_examples=100, deadline=None)
@given(unit, shift, shift)
def test_scalar_shifts_and_cosines_do_not_grow_with_the_radius(p: float, a: float, b: float) -> None:
    near, far = min(a, b), max(a, b)
    assert shift_down(p, far) <= shift_down(p, near) <= p + 1e-12
    assert shift_up(p, far) >= shift_up(p, near) >= p - 1e-12
    for bound in (fcsb_cos, cone_cos):
        assert bound(p, far) <= bound(p, near) + 1e-12
        assert -1.0 <= bound(p, far) <= 1.0
    assert cone_cos(p, far, eta=0.3) <= cone_cos(p, near, eta=0.3) + 1e-12
    assert cone_cos(p, near, eta=0.3) <= cone_cos(p, near, eta=0.1) + 1e-12


@settings(max_examples=8, deadline=None)
@given(st.floats(0.01, 0.999), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_vector_certificate_is_monotone_and_the_best_of_all(r: float, a: float, b: float) -> None:
    near, far = min(a, b), max(a, b)
    best = vector_cos(r, near)
    assert vector_cos(r, far) <= best + 1e-6
    assert vector_cos(0.9 * r, near) <= best + 1e-6
    inner = float(2.0 * shift_down((1.0 + r) / 2.0, near) - 1.0)
    assert best >= max(float(fcsb_cos((1.0 + r) / 2.0, near)), float(cone_cos(r, near)))
    if inner > 0.0:
        assert best >= inner / float(norm_upper(r, near)) - 3e-5  # a shift below 1e-4 is judged as 1e-4


@settings(max_examples=25, deadline=None)
@given(st.floats(0.0, 0.99), st.floats(0.0, 3.0), st.floats(0.0, 3.0), st.floats(-1.0, 3.0), st.floats(0.0, 0.2))
def test_any_multipliers_are_at_least_the_least_norm(cos0: float, a: float, s: float, low: float, eta: float) -> None:
    assert _dual(np.array([s, low]), cos0, a, eta)[0] >= required_norm(cos0, a, eta=eta) - 5e-6
    assert required_norm(cos0, a, eta=eta) >= required_norm(cos0, a) - 5e-6  # each within its minimiser of the least


@settings(max_examples=10, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.0, 0.999), st.floats(0.0, 4.5))
def test_the_table_is_never_above_the_exact_certificate(r: float, cos0: float, a: float) -> None:
    table = vector_table()
    assert float(table.radius(r, cos0, 1.0)) <= vector_radius(r, cos0, 1.0) + 1e-6
    assert float(table.cos(r, a)) <= max(vector_cos(r, min(a, 5.0)), -1.0) + 1e-6
    assert table.required(cos0, a) >= required_norm(cos0, a) - 1e-9


def test_the_table_is_close_to_the_exact_certificate() -> None:
    for r, cos0 in ((0.3, 0.5), (0.7, 0.5), (0.95, 0.8), (0.99, 0.2)):
        exact = vector_radius(r, cos0, 1.0)
        assert exact - 0.011 <= float(vector_table().radius(r, cos0, 1.0)) <= exact
    norms = np.minimum(vector_table().norms, 2.0)
    assert (np.diff(norms, axis=0) >= 0).all()
    assert (np.diff(norms, axis=1) >= 0).all()


def test_the_table_abstains_outside_its_grid() -> None:
    table = vector_table()
    assert table.radius([float("nan"), 0.0, 0.9999], 0.9995, 0.5).tolist() == [0.0, 0.0, 0.0]
    assert table.radius([float("nan"), 0.0], 0.5, 0.5).tolist() == [0.0, 0.0]
    assert table.radius(1.0, 0.5, 0.5) == 2.0
    assert table.cos([0.999, float("nan")], 4.2).tolist() == [-1.0, -1.0]
    assert table.cos(0.9, float("nan")) == -1.0
    assert table.required(0.5, 4.2) == float("inf")
    assert table.required(0.9999, 0.1) == float("inf")


def test_vector_certificate_abstains_on_nan_and_beyond_its_shifts() -> None:
    assert vector_radius(float("nan"), 0.5, 1.0) == 0.0
    assert vector_radius(0.0, 0.5, 1.0) == 0.0
    assert 5.0 < vector_radius(1.0, 0.5, 1.0) < 8.0
    assert required_norm(0.5, 7.0) > 1.0
    assert vector_cos(0.99, 7.0) == -1.0
    assert required_norm(0.0, 0.5) == pytest.approx(0.3829, abs=1e-4)


@pytest.mark.parametrize("eta", [0.05, 0.3])
def test_vector_certificate_with_a_sideways_part_beats_the_cone(eta: float) -> None:
    for r in (0.6, 0.8, 0.9):
        assert vector_radius(r, 0.5, 1.0, eta=eta) >= float(cone_radius(r, 0.5, 1.0, eta=eta)) - 1e-4
        assert vector_radius(r, 0.5, 1.0, eta=eta) < vector_radius(r, 0.5, 1.0)


@settings(max_examples=60, deadline=None)
@given(samples, shift, shift)
def test_distribution_certificate_is_monotone_and_between_its_plug_ins(x: list[float], a: float, b: float) -> None:
    near, far = min(a, b), max(a, b)
    for band in BANDS.values():
        low, high = float(cdf_lower(x, near, band)), cdf_upper(x, near, band)
        assert float(cdf_lower(x, far, band)) <= low + 1e-12
        assert cdf_upper(x, far, band) >= high - 1e-12
        assert low <= cdf_plug_in(x, near) + 1e-12
        assert 1.0 - cdf_plug_in(1.0 - np.array(x), near) <= high + 1e-9


@settings(max_examples=60, deadline=None)
@given(samples, st.floats(0.0, 0.99))
def test_dkw_distribution_is_never_below_hoeffding_fcsb(x: list[float], cos0: float) -> None:
    paper = float(fcsb_radius(hoeffding_lower(x, 0.01), cos0, 1.0))
    assert cdf_radius(x, (1.0 + cos0) / 2.0, 1.0, BANDS["dkw"]) >= paper - 1e-6


@settings(max_examples=60, deadline=None)
@given(samples, samples, shift, st.sampled_from([1e-2, 1e-3]))
def test_tangents_lie_below_the_shifted_mean(x: list[float], pilot: list[float], a: float, clip: float) -> None:
    value = cdf_plug_in(x, a)
    assert tangent_at(pilot, a, clips=[clip]).bound(x).item() <= value + 1e-9
    own = tangent_at(x, a, clips=[1e-12])
    assert own.bound(x).item() == pytest.approx(value, abs=1e-4)
    moved = own.transform(sorted(x)).ravel()
    assert (np.diff(moved) >= -1e-12).all()
    assert moved.min() >= 0.0
    assert moved.max() <= 1.0 + 1e-12


@settings(max_examples=40, deadline=None)
@given(samples, shift, shift, unit, unit)
def test_direction_certificate_is_monotone(x: list[float], a: float, b: float, eta: float, lam: float) -> None:
    near, far = min(a, b), max(a, b)
    side = Sideways(eta, lam, 0.01)
    reached = [float(join(2.0 * cdf_lower(x, shift, BANDS["ell"]) - 1.0, side.at(shift))) for shift in (near, far)]
    assert reached[1] <= reached[0] + 1e-12
    assert float(side.at(far)) >= float(side.at(near)) - 1e-12


def test_perfect_and_vacuous_inputs_give_finite_radii() -> None:
    for radius in (float(fcsb_radius(1.0, 0.5, 1.0)), float(cone_radius(1.0, 0.5, 1.0)), vector_radius(1.0, 0.5, 1.0)):
        assert np.isfinite(radius)
        assert radius > 0.0
    assert [float(fcsb_radius(s, 0.5, 1.0)) for s in (0.0, 0.5, 0.75)] == [0.0, 0.0, 0.0]
    for refused in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="cosine to certify"):
            fcsb_radius(0.9, refused, 1.0)
    with pytest.raises(UserError, match="sigma must be"):
        fcsb_radius(0.9, 0.5, 0.0)
    with pytest.raises(UserError, match="shift"):
        required_norm(0.5, -1.0)
