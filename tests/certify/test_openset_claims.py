"""Open-set claims: bounds around the score, joint directions, the deployed rule."""

import numpy as np
import pytest

from robustvlm.certify import predict_openset
from robustvlm.certify.bands import ell_band
from robustvlm.certify.certifier import mean_feature
from robustvlm.certify.openset import (
    contrast_vectors,
    openset_score,
    pilot_choice,
)
from robustvlm.certify.shapes import halfspace_lower, halfspace_shift
from robustvlm.errors import UserError

RNG = np.random.default_rng(0)
BAND = ell_band(1000, 0.001)


def units(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


PROTOTYPES = units(RNG.standard_normal((80, 12)) + 3.0 * np.eye(12)[0])
ANTIBODIES = units(RNG.standard_normal((5, 12)))
VECTORS = contrast_vectors(PROTOTYPES, ANTIBODIES, 0.3)
ROWS = units(2.0 * PROTOTYPES[4] + 0.3 * RNG.standard_normal((1000, 12)))
FAR = units(-2.0 * np.eye(12)[0] + 0.3 * RNG.standard_normal((1000, 12)))


def least(rows: np.ndarray, vectors: np.ndarray, a: float) -> float:
    return float(halfspace_lower(rows, vectors, a, BAND).min())


def picked(chosen: np.ndarray) -> np.ndarray:
    return np.asarray(VECTORS[np.arange(len(VECTORS)), chosen])


def test_score_is_max_over_classes_of_min_over_antibodies() -> None:
    z = mean_feature(ROWS)[0]
    brute = max(min(float(z @ (mu - 0.3 * b)) for b in ANTIBODIES) for mu in PROTOTYPES)
    assert openset_score(z, VECTORS) == pytest.approx(brute)
    k, chosen = pilot_choice(z, VECTORS)
    assert k == 4
    assert float(z @ VECTORS[k, chosen[k]]) == pytest.approx(brute)


@pytest.mark.parametrize("rows", [ROWS, FAR])
def test_bounds_enclose_the_plug_in_score_and_widen(rows: np.ndarray) -> None:
    z = mean_feature(rows)[0]
    k, chosen = pilot_choice(z, VECTORS)
    lows = [least(rows, VECTORS[k], a) for a in (0.0, 0.3, 1.0)]
    highs = [-least(rows, -picked(chosen), a) for a in (0.0, 0.3, 1.0)]
    assert lows[2] <= lows[1] <= lows[0] <= openset_score(z, VECTORS) <= highs[0] <= highs[1] <= highs[2]


def test_the_joint_direction_beats_separate_bounds() -> None:
    lam, mu, b = 0.5, np.eye(12)[0], units(np.eye(12)[0] + 0.2 * np.eye(12)[1])
    rows = units(2.0 * mu + 0.3 * RNG.standard_normal((1000, 12)))
    joint = float(halfspace_lower(rows, mu - lam * b, 1.0, BAND)[0])
    separate = halfspace_lower(rows, np.stack([mu, -b]), 1.0, BAND)
    assert joint > float(separate[0] + lam * separate[1])


def test_radii_match_the_bounds_at_their_end() -> None:
    z = mean_feature(ROWS)[0]
    k, _ = pilot_choice(z, VECTORS)
    tau = 0.5 * openset_score(z, VECTORS)
    accepted = halfspace_shift(ROWS, VECTORS[k], lambda _: tau, BAND)
    assert accepted > 0.0
    assert least(ROWS, VECTORS[k], accepted) == pytest.approx(tau, abs=1e-6)
    _, chosen = pilot_choice(mean_feature(FAR)[0], VECTORS)
    below = float(np.nextafter(-tau, np.inf))
    rejected = halfspace_shift(FAR, -picked(chosen), lambda _: below, BAND)
    assert rejected > 0.0
    assert -least(FAR, -picked(chosen), rejected) <= tau
    assert halfspace_shift(ROWS, -picked(chosen), lambda _: below, BAND) == 0.0
    assert halfspace_shift(FAR, VECTORS[k], lambda _: tau, BAND) == 0.0


def test_deployed_rule_decides_or_abstains() -> None:
    tau = 0.4
    assert predict_openset(ROWS, VECTORS, tau, 0.001) == "accept"
    assert predict_openset(FAR, VECTORS, tau, 0.001) == "reject"
    assert predict_openset(ROWS[:4], VECTORS, tau, 0.001) == "abstain"
    failed = np.full_like(ROWS, np.nan)
    assert predict_openset(failed, VECTORS, tau, 0.001) == "abstain"


def test_without_antibodies_the_score_is_the_nearest_prototype() -> None:
    assert contrast_vectors(PROTOTYPES, [], 0.3).shape == (80, 1, 12)
    with pytest.raises(UserError, match="must not be negative"):
        contrast_vectors(PROTOTYPES, ANTIBODIES, -0.1)
    with pytest.raises(UserError, match="expected prototypes"):
        contrast_vectors(PROTOTYPES, ANTIBODIES[:, :3], 0.1)
    with pytest.raises(UserError, match="at least two"):
        predict_openset(ROWS[:1], VECTORS, 0.1, 0.01)
    with pytest.raises(UserError, match="finite"):
        halfspace_lower(ROWS, [np.full(12, np.nan)], 0.1, BAND)
