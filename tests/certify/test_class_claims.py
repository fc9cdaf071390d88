"""Class claims: P1-CDF against a direct computation, early stopping, open vocabulary, hard vote, deployed rule."""

import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import binom, norm

from robustvlm.certify import ClassRadius, predict, vote_predict, vote_radius
from robustvlm.certify.bands import ell_band
from robustvlm.certify.certifier import direction_scores, mean_feature
from robustvlm.certify.classes import (
    ClassTest,
    class_margin_radius,
    cosine_class_radius,
    mean_ball,
    mean_margin_radius,
    rival_normals,
)
from robustvlm.certify.deployed import _by_angle, class_margin_needed, deployed_inner, vote_share_needed
from robustvlm.certify.feature import vector_radius
from robustvlm.certify.means import betting_lower, clopper_pearson_lower
from robustvlm.certify.shapes import cdf_radius
from robustvlm.certify.tangent import TangentTest
from robustvlm.errors import UserError


def cloud(seed: int, n: int, *, centre: np.ndarray, spread: float) -> np.ndarray:
    rows = centre + spread * np.random.default_rng(seed).standard_normal((n, len(centre)))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


DIM, CLASSES = 16, 150
TEXT = cloud(0, CLASSES, centre=np.eye(DIM)[0], spread=0.4)
ROWS = cloud(1, 1000, centre=3.0 * TEXT[7], spread=0.3)
PILOT = cloud(2, 200, centre=3.0 * TEXT[7], spread=0.3)
BAND = ell_band(1000, 0.001)


def test_chunked_class_radius_is_the_minimum_over_rivals() -> None:
    normals = rival_normals(TEXT, 7)
    single = [cdf_radius(direction_scores(ROWS, v), 0.5, 0.25, BAND) for v in normals]
    assert class_margin_radius(ROWS, TEXT, 7, 0.25, BAND) == pytest.approx(min(single), abs=1e-6)
    assert min(single) > 0.0


def test_distribution_beats_mean_margin_and_both_scale_with_sigma() -> None:
    full, mean = class_margin_radius(ROWS, TEXT, 7, 1.0, BAND), mean_margin_radius(ROWS, TEXT, 7, 1.0, 0.001)
    assert full > mean > 0.0
    assert class_margin_radius(ROWS, TEXT, 7, 0.5, BAND) == pytest.approx(full / 2)


def test_more_rivals_never_help_and_identical_prompts_abstain() -> None:
    few = class_margin_radius(ROWS, TEXT[:20], 7, 1.0, BAND)
    assert class_margin_radius(ROWS, TEXT, 7, 1.0, BAND) <= few + 1e-9
    doubled = np.vstack([TEXT, TEXT[7]])
    assert class_margin_radius(ROWS, doubled, 7, 1.0, BAND) == 0.0
    assert mean_margin_radius(ROWS, doubled, 7, 1.0, 0.001) == 0.0
    assert rival_normals(doubled, 7) is None
    assert predict(ROWS, np.vstack([TEXT[7], TEXT[7]]), 0.001) is None
    assert ClassTest(PILOT, doubled, 7, a=0.1, alpha=0.001).decision == "futile"


def test_wrong_labels_abstain() -> None:
    assert class_margin_radius(ROWS, TEXT, 3, 1.0, BAND) == 0.0
    assert mean_margin_radius(ROWS, TEXT, 3, 1.0, 0.001) == 0.0
    assert class_angle(TEXT[7], 3) < 0.0


def test_failed_rows_only_shrink_the_radius_and_cannot_be_dropped() -> None:
    failed = ROWS.copy()
    failed[:5] = np.nan
    assert class_margin_radius(failed, TEXT, 7, 1.0, BAND) < class_margin_radius(ROWS, TEXT, 7, 1.0, BAND)
    with pytest.raises(UserError, match="made for 1000 samples, got 995"):
        class_margin_radius(failed[5:], TEXT, 7, 1.0, BAND)


def test_early_stopping_certifies_small_radii_and_gives_up_on_large_ones() -> None:
    reach = class_margin_radius(ROWS, TEXT, 7, 1.0, BAND)
    easy = ClassTest(PILOT, TEXT, 7, a=0.5 * reach, alpha=0.001)
    for start in range(0, 1000, 50):
        if easy.update(ROWS[start : start + 50]) != "open":
            break
    assert easy.decision == "certified"
    assert easy.n < 1000
    assert easy.open_rivals == 0
    hard = ClassTest(PILOT, TEXT, 7, a=4.0 * reach, alpha=0.001)
    more = cloud(3, 4000, centre=3.0 * TEXT[7], spread=0.3)
    for start in range(0, 4000, 200):
        if hard.update(more[start : start + 200]) != "open":
            break
    assert hard.decision == "futile"
    assert hard.update(ROWS) == "futile"


def class_angle(direction: np.ndarray, label: int) -> float:
    """Return the angle that a unit direction may turn before another class wins (P2)."""
    normals = rival_normals(TEXT, label)
    assert normals is not None
    return float(np.arcsin((normals @ direction).min()))


def test_angle_route_certifies_where_the_angle_allows() -> None:
    mean, _ = mean_feature(ROWS)
    beta = class_angle(mean / np.linalg.norm(mean), 7)
    assert 0.0 < beta < np.pi / 2
    assert vector_radius(0.8, float(np.cos(beta)), 1.0) > 0.0


def test_hard_vote_is_cohens() -> None:
    p = float(clopper_pearson_lower(800, 1000, 0.001))
    assert vote_radius(800, 1000, 0.5, 0.001) == pytest.approx(0.5 * norm.ppf(p))
    assert vote_radius(520, 1000, 0.5, 0.001) == 0.0
    assert vote_radius(0, 1000, 0.5, 0.001) == 0.0
    assert np.isfinite(vote_radius(1000, 1000, 0.5, 0.001))
    assert vote_predict([0, 0, 0], 0.01) is None
    assert vote_predict([3, 70, 9], 0.01) == 1
    with pytest.raises(UserError, match="two classes"):
        vote_predict([3], 0.01)


def test_prediction_abstains_rather_than_errs() -> None:
    rng = np.random.default_rng(8)
    text = np.eye(2)
    angle = np.pi / 4 + 0.02  # the smoothed feature is just on the side of class 1
    answers = []
    for _ in range(300):
        turned = angle + rng.normal(0.0, 0.8, 64)
        answers.append(predict(np.stack([np.cos(turned), np.sin(turned)], axis=1), text, 0.05))
    assert answers.count(0) <= 0.05 * 300
    assert answers.count(None) > 0
    assert predict(ROWS, TEXT, 0.001) == 7
    with pytest.raises(UserError, match="at least two"):
        predict(ROWS[:1], TEXT, 0.001)


def test_deployed_corrections_shrink_with_n0() -> None:
    kept = [float(deployed_inner(0.8, n0, 0.001)) for n0 in (1, 10, 100, 1000, 10**6)]
    assert kept == sorted(kept)
    assert kept[-1] < 0.8
    near, far = np.array(0.9), np.array(0.8)
    angles = [float(_by_angle(near, far, n0, 0.001)) for n0 in (10, 1000, 10**6)]
    assert angles == sorted(angles)
    assert angles[0] == -1.0
    assert angles[-1] < 0.9
    assert _by_angle(np.array(-1.0), far, 1000, 0.001) == -1.0
    assert _by_angle(near, np.array(0.0), 1000, 0.001) == -1.0
    with pytest.raises(UserError, match="n0 = 0"):
        deployed_inner(0.5, 0, 0.001)
    with pytest.raises(UserError, match="one sample"):
        mean_ball(0, 0.1)


@pytest.mark.parametrize("n0", [1, 2, 5, 16, 63])
def test_share_for_a_deployed_vote_is_the_end_of_the_exact_tail(n0: int) -> None:
    share = vote_share_needed(n0, 0.01)
    assert binom.cdf(n0 // 2, n0, share) == pytest.approx(0.01, rel=1e-6)
    assert binom.cdf(n0 // 2, n0, share) <= 0.01 * (1 + 1e-9)


def test_a_deployed_vote_never_needs_less_than_the_ideal_one() -> None:
    assert all(vote_share_needed(n0, 0.5) >= 0.5 for n0 in range(1, 200))  # at 81 by the last digit


@pytest.mark.parametrize(("rivals", "n0", "alpha0"), [(1, 16, 0.05), (9, 64, 0.01), (999, 300, 0.001)])
def test_margin_for_a_deployed_mean_meets_chernoffs_bound(rivals: int, n0: int, alpha0: float) -> None:
    q = 0.5 * (1.0 + class_margin_needed(rivals, n0, alpha0))
    divergence = 0.5 * np.log(0.5 / q) + 0.5 * np.log(0.5 / (1.0 - q))  # KL(1/2 || q), written out
    assert rivals * np.exp(-n0 * divergence) == pytest.approx(alpha0, rel=1e-6)
    draws = np.random.default_rng(0)
    # Two-valued scores are the worst law: even all rivals at once flip the mean's class no more often than alpha0.
    wins = draws.binomial(n0, q, size=(4000, min(rivals, 20)))
    assert (2 * wins <= n0).any(axis=1).mean() <= alpha0 + 3 * np.sqrt(alpha0 / 4000)


def test_what_is_deployed_keeps_less_and_in_the_limit_everything() -> None:
    rows, pilot = ROWS, PILOT[:100]
    radii = []
    for n0 in (None, 4, 64, 1000, 10**6):
        certifier = ClassRadius(text=TEXT, sigma=0.25, alpha=0.001, n=1100, n_pilot=100, deployed=n0, baselines=False)
        certifier.take(pilot)
        certifier.take(rows)
        found = certifier.finding()
        assert found.prediction == 7
        radii.append(found.columns.get("deployed_radius"))
        assert found.radius == pytest.approx(class_margin_radius(ROWS, TEXT, 7, 0.25, BAND), rel=1e-6)
    assert radii[0] is None
    assert radii[1] == 0.0
    assert 0.0 <= radii[2] < radii[3] < radii[4] <= found.radius  # type: ignore[operator]
    assert radii[4] > 0.9 * found.radius
    needed = class_margin_needed(CLASSES - 1, 1000, 0.001)
    normals = rival_normals(TEXT, 7)
    assert normals is not None
    # A second implementation: the radius at which the smallest margin's lower bound is the one that is needed.
    by_bound = min(cdf_radius(0.5 * (1.0 + ROWS @ v), 0.5 * (1.0 + needed), 0.25, BAND) for v in normals)
    assert radii[3] == pytest.approx(by_bound, rel=1e-5)


@pytest.mark.parametrize("rounding", [-1e-4, float("nan"), float("inf")])
def test_a_rounding_that_would_add_radius_is_refused(rounding: float) -> None:
    with pytest.raises(UserError, match="finite number >= 0"):
        ClassRadius(text=TEXT, sigma=0.25, alpha=0.001, n=300, n_pilot=100, rounding=rounding)


@pytest.mark.parametrize("sizes", [{"n": 100, "n_pilot": 100}, {"n": 100, "n_pilot": 0}, {"n": 10, "n_pilot": 20}])
def test_claims_without_estimation_or_pilot_samples_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="n_pilot"):
        ClassRadius(text=TEXT, sigma=0.25, alpha=0.001, **sizes)


def test_label_and_text_errors() -> None:
    with pytest.raises(UserError, match="one of the 150 classes"):
        rival_normals(TEXT, 150)
    with pytest.raises(UserError, match="at least two classes"):
        rival_normals(TEXT[:1], 0)


def test_tests_side_by_side_equal_single_tests() -> None:
    normals = rival_normals(TEXT, 7)
    assert normals is not None
    pilot, scores = direction_scores(PILOT, normals[:6]), direction_scores(ROWS, normals[:6])
    scores[3] = np.nan
    together = TangentTest(pilot, a=0.9, target=0.5, alpha=0.001)
    together.update(scores[:50])
    together.keep(np.arange(6) != 2)
    together.update(np.delete(scores[50:], 2, axis=1))
    for column, k in enumerate([0, 1, 3, 4, 5]):
        alone = TangentTest(pilot[:, k], a=0.9, target=0.5, alpha=0.001)
        alone.update(scores[:50, k])
        alone.update(scores[50:, k])
        assert together.log_wealth[column] == pytest.approx(alone.log_wealth.item())
        assert together.certified[column] == alone.certified.item()
        assert together.hopeless[column] == alone.hopeless.item()


def test_the_radius_through_a_cosine_is_that_of_the_nearest_bisector() -> None:
    rows, text = np.tile([[0.8, 0.6], [1.0, 0.0]], (500, 1)), np.eye(2)
    u = np.array([1.0, 0.3]) / np.hypot(1.0, 0.3)
    share = float(betting_lower(0.5 * (1.0 + rows @ u), 0.001))
    turn = np.pi / 4 - np.arctan(0.3)  # from u to the line between the two texts
    wanted = 0.25 * (ndtri(share) - ndtri(0.5 * (1.0 + np.cos(turn))))
    assert cosine_class_radius(rows, 7.0 * u, text, 0, 0.25, 0.001) == pytest.approx(wanted, rel=1e-9)
    # Beyond the bisector, of no direction, and of two equal texts nothing is certified.
    assert cosine_class_radius(rows, u, text, 1, 0.25, 0.001) == 0.0
    assert cosine_class_radius(rows, [0.0, 0.0], text, 0, 0.25, 0.001) == 0.0
    assert cosine_class_radius(rows, u, [[1.0, 0.0], [1.0, 0.0]], 0, 0.25, 0.001) == 0.0
    # A rival near the direction takes the radius away, wherever the others are.
    near = np.vstack([text, [[0.96, 0.28]]])
    assert cosine_class_radius(rows, u, near, 0, 0.25, 0.001) == 0.0


@pytest.mark.parametrize("turn", [np.pi / 2, 0.6])
def test_the_radius_through_a_cosine_is_true_as_often_as_it_says(turn: float) -> None:
    """Features of a half-space's two sides, e1 with probability p: the class stays up to sigma Phi^-1(p)."""
    rng, alpha, false = np.random.default_rng(5), 0.05, 0
    text = np.array([[1.0, 0.0], [np.cos(turn), np.sin(turn)]])
    for p in np.linspace(0.55, 0.97, 15):
        for _ in range(50):
            sides = (rng.random(260) > p).astype(int)
            pilot, rows = text[sides[:60]], text[sides[60:]]
            radius = cosine_class_radius(rows, pilot.mean(0), text, 0, 1.0, alpha)
            false += radius > ndtri(p)
    assert false <= 750 * alpha + 3 * np.sqrt(750 * alpha * (1 - alpha))
