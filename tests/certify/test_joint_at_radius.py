"""Angles and mean tested at one radius (T26): coverage with known truth, looks at the direction, and what is gained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

import robustvlm as rv
from robustvlm.certify.angle_test import JointTest, look_share, looks_of
from robustvlm.certify.angles import TURN_SHARE, turn_upper
from robustvlm.certify.claims.feature import FeatureTest
from robustvlm.certify.claims.joint import JointAtRadius
from tests.certify.test_joint_claim import ENCODERS, at, half_turned

RUNS = [pytest.param(40, id="light"), pytest.param(10_000, id="heavy", marks=pytest.mark.slow)]


def decided(test: JointTest, rows: np.ndarray, step: int = 32) -> str:
    for start in range(0, len(rows), step):
        if test.update(rows[start : start + step]) != "open":
            break
    return test.decision


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("runs", RUNS)
def test_a_false_radius_is_certified_no_oftener_than_alpha_at_any_look(name: str, runs: int) -> None:
    """At the first shift where the claim is false, looked at after every 32 samples: known truth, a large alpha."""
    encoder, cos0 = ENCODERS[name]
    truth, alpha, n = encoder.true_shift(cos0), 0.2, 128
    rng, false = np.random.default_rng(21), 0
    for _ in range(runs):
        test = JointTest(encoder.draw(rng, 20), cos0=cos0, a=truth, n=n, alpha=alpha)
        false += decided(test, encoder.draw(rng, n)) == "certified"
    assert binom.sf(false - 1, runs, alpha) > 1e-3


@pytest.mark.parametrize("factor", [1.15, 1.3])
def test_the_simulation_notices_a_test_at_a_smaller_shift(factor: float) -> None:
    encoder, alpha = half_turned(0.1, np.pi / 3), 0.2
    truth, rng, false = encoder.true_shift(0.5), np.random.default_rng(22), 0
    for _ in range(40):
        test = JointTest(encoder.draw(rng, 200), cos0=0.5, a=truth / factor, n=8192, alpha=alpha)
        false += decided(test, encoder.draw(rng, 8192), step=512) == "certified"
    assert binom.sf(false - 1, 40, alpha) < 1e-6


@pytest.mark.parametrize("runs", [pytest.param(40, id="light"), pytest.param(2000, id="heavy", marks=pytest.mark.slow)])
def test_all_looks_at_a_direction_together_fail_no_oftener_than_its_part(runs: int) -> None:
    """The angle to the direction is that of the true mean: no look may bound it by less."""
    rng, dim, alpha, truth = np.random.default_rng(23), 16, 1.0, 0.3
    failed = 0
    for _ in range(runs):
        side = rng.standard_normal((256, dim)) @ np.diag(np.geomspace(2.0, 0.1, dim))
        side -= np.outer(side @ at(truth, dim), at(truth, dim))
        side *= 0.6 / np.linalg.norm(side, axis=1, keepdims=True)
        rows = 0.8 * at(truth, dim) + side
        bounds = [
            turn_upper(rows[:count], np.eye(dim)[0], TURN_SHARE * alpha * look_share(look))
            for look, count in enumerate(looks_of(256))
        ]
        failed += min(bounds) < truth
    assert binom.sf(failed - 1, runs, TURN_SHARE * alpha) > 1e-3


def test_what_the_mean_alone_cannot_certify_is_certified_early() -> None:
    rng = np.random.default_rng(24)
    rows = np.eye(64)[0] + 0.05 * rng.standard_normal((10_050, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    asked = {"radius": 1.9, "cos0": 0.5, "sigma": 1.0, "alpha": 0.001}
    by_mean = FeatureTest(**asked, n=10_000)
    together = JointAtRadius(**asked, n=10_050, n_pilot=50)
    for certifier in (by_mean, together):
        used = 0
        while (wanted := certifier.request()) is not None:
            certifier.take(rows[used : used + wanted.sure])
            used += wanted.sure
    assert (by_mean.finding().radius, by_mean.finding().stop) == (0.0, "futile")
    found = together.finding()
    assert (found.radius, found.stop) == (1.9, "certified")
    assert found.n < 1100
    assert found.r is not None
    assert 0.5 < found.r < np.linalg.norm(rows.mean(axis=0))


def test_angles_to_an_unconfirmed_direction_do_not_count() -> None:
    """The pilot's features are far from the others', which are close together: its direction is refuted by them."""
    rng = np.random.default_rng(25)
    pilot = np.tile(at(0.5, 8), (50, 1))
    rows = np.eye(8)[0] + 0.02 * rng.standard_normal((1000, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    test = JointTest(pilot, cos0=0.5, a=2.35, n=1000, alpha=0.001)
    assert decided(test, rows) != "certified"
    assert not test.confirmed
    right = JointTest(rows[:50], cos0=0.5, a=1.5, n=950, alpha=0.001)
    assert decided(right, rows[50:]) == "certified"


def test_pieces_of_any_size_and_failed_samples() -> None:
    rng = np.random.default_rng(26)
    rows = np.tile([at(0.3), at(-0.3)], (400, 1))
    whole, pieces = (JointTest(rows[:50], cos0=0.5, a=1.2, n=750, alpha=0.001) for _ in range(2))
    whole.update(rows[50:])
    start = 50
    while start < 800:
        size = int(rng.integers(1, 40))
        pieces.update(rows[start : start + size])
        start += size
    assert whole.decision == pieces.decision == "certified"
    lost = JointTest(rows[:50], cos0=0.5, a=1.2, n=750, alpha=0.001)
    assert decided(lost, np.full((750, 2), np.nan)) != "certified"
    assert JointTest(np.full((50, 2), np.nan), cos0=0.5, a=1.0, n=10, alpha=0.1).decision == "futile"


def test_a_run_answers_whether_a_radius_is_certified(tmp_path: Path) -> None:
    run = rv.certify("tiny", claim="joint", sigma=0.1, radius=0.05, limit=1, samples=400, out=tmp_path)
    rows = run.rows.to_pylist()
    assert {row["stop"] for row in rows} <= {"certified", "futile", "exhausted"}
    assert any(row["radius"] == 0.05 and row["n"] < 350 for row in rows)


def test_an_image_whose_pilot_failed_is_given_up() -> None:
    certifier = JointAtRadius(radius=0.3, cos0=0.5, sigma=0.25, alpha=0.001, n=1000, n_pilot=50)
    certifier.take(np.full((50, 4), np.nan))
    assert certifier.request() is None
    found = certifier.finding()
    assert (found.radius, found.stop, found.failed, found.r) == (0.0, "futile", 50, 0.0)
