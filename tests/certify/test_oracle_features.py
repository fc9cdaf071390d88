"""Closed-form encoders and printed values for the feature certificates T1-T4 (oracles O1-O5 and O8)."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import gamma, hyp1f1, ndtr

from robustvlm.certify import cone_cos, fcsb_cos
from robustvlm.certify.feature import (
    cone_radius,
    fcsb_inner,
    fcsb_radius,
    norm_lower,
    norm_upper,
    required_norm,
    vector_cos,
    vector_radius,
)


def test_o1_half_space_encoder_attains_the_inner_product_bound() -> None:
    b, sigma = 0.9, 0.5
    s = ndtr(b / sigma)  # f = u where z <= b, else -u
    assert s == pytest.approx(0.964070, abs=5e-7)
    assert float(fcsb_inner(s, 0.3 / sigma)) == pytest.approx(0.769861, abs=5e-7)
    exact = 2.0 * ndtr((b - 0.3) / sigma) - 1.0
    assert float(fcsb_inner(s, 0.3 / sigma)) == pytest.approx(exact, abs=1e-12)
    assert float(fcsb_radius(s, 0.5, sigma)) == pytest.approx(0.562755, abs=5e-7)


def test_o2_circle_encoder_radii_and_true_radius() -> None:
    k, sigma = 1.0, 0.5
    r = np.exp(-0.5 * (k * sigma) ** 2)
    assert r == pytest.approx(0.882497, abs=5e-7)
    radii = (
        float(fcsb_radius((1.0 + r) / 2.0, 0.5, sigma)),
        float(cone_radius(r, 0.5, sigma)),
        vector_radius(r, 0.5, sigma),
    )
    assert radii[:2] == pytest.approx((0.4454, 0.5177), abs=5e-5)
    # The design prints .6924 from a coarser search; .69258 is attained by an encoder (see the extremal field below).
    assert radii[2] == pytest.approx(0.69258, abs=1e-5)
    assert max(radii) < np.arccos(0.5) / k  # the angle between the smoothed features is k * eps exactly


def norm_of_projection(d: int, rho: float) -> float:
    """The smoothed norm of f = z / |z| at |x| = rho sigma."""
    scale = rho / np.sqrt(2.0) * gamma((d + 1) / 2) / gamma(d / 2 + 1)
    return float(scale * hyp1f1(0.5, d / 2 + 1, -rho * rho / 2))


@pytest.mark.parametrize(
    ("d", "rho", "norm"),
    [(2, 1, 0.557179), (2, 2, 0.844320), (2, 4, 0.966939), (3, 2, 0.769866), (16, 4, 0.709678), (64, 8, 0.707787)],
)
def test_o3_projection_encoder_certificates_stay_below_the_true_radius(d: int, rho: float, norm: float) -> None:
    r = norm_of_projection(d, rho)
    assert r == pytest.approx(norm, abs=5e-7)
    for cos0 in (0.2, 0.5, 0.9):
        true = rho * np.sin(np.arccos(cos0))
        assert 0.0 < vector_radius(r, cos0, 1.0) < true


def test_o4_negative_inner_product_bound_is_no_cosine() -> None:
    z = np.linspace(-8.0, 8.0, 400_001)
    density = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
    wave = np.where(np.floor(z * 200.0) % 2 == 0, 1.0, -1.0)
    m = np.array([-0.2, np.sqrt(1 - 0.04) * (density @ wave)])
    assert m[0] / np.linalg.norm(m) == pytest.approx(-1.0, abs=5e-4)
    assert float(fcsb_inner(0.4, 0.0)) == pytest.approx(-0.2)
    assert float(fcsb_cos(0.4, 0.0)) == -1.0
    assert float(fcsb_radius(0.4, 0.0, 1.0)) == 0.0


T = np.arange(-9.0, 14.0, 0.005)
WEIGHTS = np.exp(-T * T / 2) * 0.005 / np.sqrt(2 * np.pi)


def unscaled_dual(r: float, a: float, theta: float) -> tuple[float, np.ndarray]:
    """V(theta) of T4 by another route: trapezoid and Nelder-Mead over (kappa, l); also the extremal field c(t)."""
    ratio = np.exp(a * T - a * a / 2)

    def vectors(x: np.ndarray) -> np.ndarray:
        return np.stack([x[0] - ratio * np.sin(theta), ratio * np.cos(theta) - x[1]])

    def value(x: np.ndarray) -> float:
        return float(WEIGHTS @ np.linalg.norm(vectors(x), axis=0) - x[0] * r) if x[0] >= 0 else 1e9

    starts = [(0.5, 0.3), (2.0, 1.0), (5.0, 2.0)]
    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
    best = min((minimize(value, x, method="Nelder-Mead", options=options) for x in starts), key=lambda o: o.fun)
    field = vectors(best.x)
    return float(best.fun), field / np.linalg.norm(field, axis=0)


@pytest.mark.parametrize(("r", "radius"), [(0.5, 0.5827), (0.7, 0.8993), (0.9, 1.4611), (0.882497, 1.38517)])
def test_o5_extremal_field_reaches_the_certified_angle(r: float, radius: float) -> None:
    certified = vector_radius(r, 0.5, 1.0)
    assert certified == pytest.approx(radius, abs=6e-5)
    value, field = unscaled_dual(r, certified, np.pi / 3)
    assert value == pytest.approx(0.0, abs=1e-5)
    m = field @ WEIGHTS
    moved = (field * np.exp(certified * T - certified**2 / 2)) @ WEIGHTS
    assert m == pytest.approx([r, 0.0], abs=2e-4)
    assert np.degrees(np.arctan2(moved[1], moved[0])) == pytest.approx(60.0, abs=5e-3)


@pytest.mark.parametrize(("r", "a", "cos0"), [(0.3, 0.2, 0.5), (0.6, 0.7, 0.3), (0.8, 0.5, 0.8), (0.95, 1.5, 0.5)])
def test_the_scaled_and_the_unscaled_dual_agree_on_what_is_certified(r: float, a: float, cos0: float) -> None:
    least = required_norm(cos0, a)
    assert unscaled_dual(least + 1e-4, a, np.arccos(cos0))[0] < 0.0
    assert unscaled_dual(least - 1e-4, a, np.arccos(cos0))[0] > -1e-6
    assert (unscaled_dual(r, a, np.arccos(cos0))[0] < -1e-6) == (r > least)


@pytest.mark.parametrize(
    ("r", "a", "bound", "cone", "vector"),
    [
        (0.7, 0.5, 0.40834, 0.72944, 0.88458),
        (0.9, 0.5, 0.74773, 0.89007, 0.97058),
        (0.9, 1.0, 0.48098, 0.57595, 0.84715),
    ],
)
def test_o8_printed_cosines(r: float, a: float, bound: float, cone: float, vector: float) -> None:
    assert float(fcsb_inner((1.0 + r) / 2.0, a)) == pytest.approx(bound, abs=5e-6)
    assert float(cone_cos(r, a)) == pytest.approx(cone, abs=5e-6)
    assert vector_cos(r, a) == pytest.approx(vector, abs=5e-6)


@pytest.mark.parametrize(
    ("cos0", "r", "radii"),
    [
        (0.5, 0.6, (0.167, 0.540, 0.728)),
        (0.5, 0.7, (0.362, 0.669, 0.899)),
        (0.5, 0.8, (0.607, 0.836, 1.120)),
        (0.5, 0.9, (0.970, 1.093, 1.461)),
        (0.5, 0.95, (1.285, 1.330, 1.769)),
        (0.5, 0.99, (1.901, 1.901, 2.390)),
        (0.8, 0.8, (0.0, 0.536, 0.810)),
        (0.8, 0.9, (0.363, 0.676, 1.102)),
        (0.8, 0.99, (1.294, 1.294, 2.013)),
        (0.9, 0.9, (0.0, 0.477, 0.849)),
        (0.9, 0.99, (0.931, 0.931, 1.719)),
    ],
)
def test_population_radii(cos0: float, r: float, radii: tuple[float, float, float]) -> None:
    found = (float(fcsb_radius((1 + r) / 2, cos0, 1.0)), float(cone_radius(r, cos0, 1.0)), vector_radius(r, cos0, 1.0))
    assert found == pytest.approx(radii, abs=6e-4)


@pytest.mark.parametrize(("radius", "r"), [(0.1, 0.092), (0.25, 0.228), (0.5, 0.437), (1.0, 0.749), (1.5, 0.908)])
def test_printed_inverse_table(radius: float, r: float) -> None:
    assert required_norm(0.5, radius) == pytest.approx(r, abs=6e-4)


def test_norm_bounds_hold_for_the_circle_encoder() -> None:
    norms = np.array([0.2, 0.6, 0.95])
    for a in (0.0, 0.3, 2.0):
        assert (norm_lower(norms, a) <= norms + 1e-12).all()
        assert (norms <= norm_upper(norms, a) + 1e-12).all()
