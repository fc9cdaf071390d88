"""What error probability every bound behind a claim is asked for: a simulation that is far from tight does not see it.

The parts of one statement have to hold at once, so that their probabilities add up, to alpha at most. What is asked for
is watched at the functions that make bounds; those that split alpha themselves are taken apart below.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import log, sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from robustvlm.certify import angle_test, angles, bands, classes, core, feature, levels, means, shapes, tangent
from robustvlm.certify.certifier import Certifier
from robustvlm.certify.claims import CLAIMS, Materials, topk
from robustvlm.certify.claims.base import Asked
from robustvlm.certify.claims.changed_words import WordsRadius
from robustvlm.certify.claims.local_noise import local_plan
from robustvlm.certify.claims.rotation import RotationRadius
from robustvlm.certify.claims.tokens import TokensTest
from robustvlm.certify.claims.wordings import worded_plan
from robustvlm.certify.local_noise import LocalNoise
from robustvlm.certify.ranks import RankBets
from robustvlm.certify.wordings import Wordings

ALPHA, DIM = 0.1, 8
TEXT = np.eye(DIM)[:4]

BOUNDS = (means.hoeffding_lower, means.bernstein_lower, means.clopper_pearson_lower, means.kl_lower_mean,
          means.betting_lower, bands.ell_band, bands.dkw_band, shapes.sideways, angles.turn_upper, core.core_of,
          classes.mean_ball)  # fmt: skip
TESTS = (means.SequentialTest, tangent.TangentTest)
CHOICES = (angles.turn_expected, core.copies_needed, levels.choose_level)
"""They look at bounds to choose something, and state nothing."""

Asks = Counter[tuple[str, float]]


@pytest.fixture
def asks(monkeypatch: pytest.MonkeyPatch) -> Asks:
    """How often each bound was asked for, by name and part of ALPHA; not those that another bound is made of."""
    return watched(monkeypatch, (*BOUNDS, *TESTS))


def watched(monkeypatch: pytest.MonkeyPatch, bounds: Iterable[Any]) -> Asks:
    found: Asks = Counter()
    inside = [0]

    def watch(name: str, made: Callable[..., Any], counted: bool) -> Callable[..., Any]:
        signature = inspect.signature(made)

        def call(*given: Any, **named: Any) -> Any:
            if counted and not inside[0]:
                found[name, round(signature.bind(*given, **named).arguments["alpha"] / ALPHA, 9)] += 1
            inside[0] += 1
            try:
                return made(*given, **named)
            finally:
                inside[0] -= 1

        return call

    for bound in (*bounds, *CHOICES):
        name = bound.__name__
        if bound in TESTS:
            monkeypatch.setattr(bound, "__init__", watch(name, inspect.getattr_static(bound, "__init__"), True))
            continue
        wrapped = watch(name, bound, bound not in CHOICES)
        for module in [module for name, module in sys.modules.items() if name.startswith("robustvlm.certify")]:
            for own in [own for own, value in vars(module).items() if value is bound]:  # wherever it was imported
                monkeypatch.setattr(module, own, wrapped)
    return found


def part(share: float, *bounds: str) -> list[tuple[str, float]]:
    return [(bound, round(share, 9)) for bound in bounds]


BETTING, BAND, VOTES = part(1, "betting_lower"), part(1, "ell_band"), part(1, "clopper_pearson_lower")
ANYTIME, TANGENT = part(1, "SequentialTest"), part(1, "TangentTest")

# By claim and radius to test, the statements that are made of one set of samples: each is a claim of its own at alpha,
# and has a list of the bounds that have to hold at once for it.
STATED: dict[tuple[str, float | None], list[list[tuple[str, float]]]] = {
    ("feature", None): [
        BETTING, part(1, "hoeffding_lower"), BETTING, BAND, part(0.5, "ell_band", "sideways"),
    ],
    ("feature", 0.05): [ANYTIME, BETTING],
    # The bets, which see TEST_SHARE of alpha, are looked at below.
    ("joint", None): [part(0.05, "turn_upper", "betting_lower"), BETTING],
    ("joint", 0.05): [part(0.05 / 2, "turn_upper") + part(0.05, "betting_lower")],
    ("tokens", None): [BETTING, part(1 / 4, "betting_lower")],  # of each of four tokens, in one call
    ("tokens", 0.05): [BETTING, part(1 / 4, "betting_lower")],
    ("class", None): [BAND, BETTING, BETTING],
    ("class", 0.05): [TANGENT],
    ("vote", None): [VOTES],
    ("vote", 0.05): [ANYTIME],
    ("openset", None): [BAND],
    ("openset", 0.05): [TANGENT],
    ("topk", None): [part(0.5, "clopper_pearson_lower", "clopper_pearson_lower")],
    ("topk", 0.05): [],  # its bets are looked at below
    ("recall", None): [BAND],
    ("recall", 0.05): [TANGENT],
    ("named", None): [VOTES],
    ("named", 0.05): [ANYTIME],
    ("open-vote", None): [VOTES],
    ("open-vote", 0.05): [ANYTIME],
}  # fmt: skip


def settings(**changed: Any) -> Asked:
    plain = {
        "sigma": 0.25, "samples": 400, "n_pilot": 100, "alpha": ALPHA, "min_cos": 0.5, "radius": None, "tau": 0.3,
        "weight": 0.5, "deployed": None, "abstains_at": None, "top": 2, "threat": None, "prompts": None,
        "n_candidates": None,
    }  # fmt: skip
    return SimpleNamespace(**(plain | changed))


def decided(certifier: Certifier, tokens: int = 1) -> None:
    """Let it see unit features around the first axis, or tokens side by side around theirs, until it has enough."""
    rng = np.random.default_rng(0)
    while (wanted := certifier.request()) is not None:
        rows = np.eye(DIM // tokens)[0] + 0.1 * rng.standard_normal((wanted.sure, tokens, DIM // tokens))
        rows /= np.linalg.norm(rows, axis=2, keepdims=True)
        certifier.take(rows.reshape(wanted.sure, DIM) / sqrt(tokens))
    assert certifier.finding().radius > 0.0


def test_every_claim_is_in_the_table() -> None:
    tested = {(name, 0.05) for name, claim in CLAIMS.items() if claim.tests_radius}
    assert set(STATED) == tested | {(name, None) for name in CLAIMS}


@pytest.mark.parametrize(("name", "radius"), STATED, ids=lambda value: str(value))
def test_the_bounds_of_a_claim_are_asked_for_its_alpha_and_no_more(name: str, radius: float | None, asks: Asks) -> None:
    tokens = 4 if name == "tokens" else 1
    materials = Materials(text=TEXT, against=np.eye(DIM)[4:5], tokens=tokens, width=DIM, entries=(0, 1, 2, 3))
    plan = CLAIMS[name].plan(settings(radius=radius), materials)
    asks.clear()  # what settings can reach at best is no statement
    decided(plan.certifier_of(0), tokens)
    assert_stated(asks, STATED[name, radius])
    assert sum(plan.alpha_split.values()) == pytest.approx(ALPHA)


def assert_stated(asks: Asks, statements: list[list[tuple[str, float]]]) -> None:
    assert asks == Counter(bound for statement in statements for bound in statement)
    assert all(sum(share for _, share in statement) <= 1.0 for statement in statements)


def tables() -> Wordings:
    return Wordings(tuple(np.tile(row, (5, 1)) for row in TEXT), aligned=True)


@pytest.mark.parametrize(
    ("make", "statements"),
    [
        pytest.param(
            lambda: worded_plan(CLAIMS["class"], settings(), Materials(text=TEXT, wordings=tables()), votes=False),
            [BAND], id="every wording, by the mean",
        ),
        pytest.param(
            lambda: worded_plan(CLAIMS["vote"], settings(), Materials(text=TEXT, wordings=tables()), votes=True),
            [VOTES], id="every wording, by vote",
        ),
        pytest.param(
            lambda: CLAIMS["class"].plan(settings(prompts="adaptive"), Materials(text=TEXT)),
            [part(1, "core_of")], id="prompts chosen by looking",
        ),
        pytest.param(
            lambda: CLAIMS["class"].plan(settings(prompts="candidates", n_candidates=5), Materials(text=TEXT)),
            [part(1 / 20, "ell_band")], id="20 pairs of candidates",
        ),
    ],
)  # fmt: skip
def test_the_bounds_of_a_changed_claim(make: Callable[[], Any], statements: list[Any], asks: Asks) -> None:
    plan = make()
    asks.clear()
    decided(plan.certifier())
    assert_stated(asks, statements)


def test_two_changed_words_are_three_statements(asks: Asks) -> None:
    how = {"text": TEXT, "sigma": 0.25, "alpha": ALPHA, "n": 400, "n_pilot": 100}
    decided(WordsRadius(wordings=tables(), words=2, **how))
    assert_stated(asks, 3 * [VOTES])


@pytest.mark.parametrize(("votes", "bound"), [(True, "clopper_pearson_lower"), (False, "ell_band")])
def test_the_noise_level_and_the_answer_share_alpha(votes: bool, bound: str, asks: Asks) -> None:
    noise = LocalNoise((0.1, 0.25), (0.5,), 0.25)
    plan = local_plan(CLAIMS["vote" if votes else "class"], noise, settings(samples=1000),
                      Materials(text=TEXT, baselines=False), votes=votes)  # fmt: skip
    asks.clear()
    decided(plan.certifier())
    others = [] if votes else 2 * [part(0.5, "betting_lower")]  # columns of other bounds at that level
    assert_stated(asks, [part(0.5, "clopper_pearson_lower", bound), *others])


@pytest.mark.parametrize("votes", [True, False], ids=["vote", "mean"])
@pytest.mark.parametrize(("spend", "share", "times"), [("pilot", 1.0, 1), ("union", 1 / 3, 3)])
def test_levels_chosen_after_a_look_share_alpha(votes: bool, spend: Any, share: float, times: int, asks: Asks) -> None:
    rows = lambda _, n: np.repeat(TEXT[:1], n, axis=0)  # noqa: E731
    levels.certify_levels(rows, TEXT, [0.1, 0.2, 0.3], n=160, n_pilot=10, alpha=ALPHA, votes=votes, spend=spend)
    assert_stated(asks, [part(share, *times * ["clopper_pearson_lower" if votes else "ell_band"])])


def test_every_cell_of_a_rotation_is_asked_at_alpha(asks: Asks) -> None:
    """They are tested in an order that was fixed before, up to the first that fails."""
    image, how = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(1)), {"alpha": ALPHA, "sigma": 0.25}
    certifier = RotationRadius(text=np.eye(2), n=1000, n_pilot=40, **how)
    while (wanted := certifier.request()) is not None:
        certifier.shown(image, "estimation", certifier.counts["estimation"], wanted.sure)
        certifier.take(np.repeat(np.eye(2)[:1], wanted.sure, axis=0))
    assert certifier.finding().radius > 0.0
    hopes = {0.05 / ALPHA}  # at which the pilot chooses how many copies a cell gets
    assert {share for _, share in asks} - hopes == {1.0}


ROWS = np.repeat([[0.96, 0.28], [0.96, -0.28]], 60, axis=0)
SINGLE: Mapping[str, tuple[Callable[[], object], list[tuple[str, float]]]] = {
    "norm_lower_bound": (lambda: feature.norm_lower_bound(np.full(50, 0.9), ALPHA), BETTING),
    "vote_radius": (lambda: classes.vote_radius(45, 50, 0.25, ALPHA), VOTES),
    "mean_margin_radius": (lambda: classes.mean_margin_radius(ROWS, np.eye(2), 0, 0.25, ALPHA), BETTING),
    "cosine_class_radius": (
        lambda: classes.cosine_class_radius(ROWS, np.eye(2)[0], np.eye(2), 0, 0.25, ALPHA), BETTING,
    ),
    "ClassTest": (lambda: classes.ClassTest(ROWS, np.eye(2), 0, a=0.5, alpha=ALPHA), TANGENT),
    "eigenvalue_upper": (lambda: shapes.eigenvalue_upper(0.3, 50, ALPHA), part(1, "kl_lower_mean")),
    "kl_lower": (lambda: means.kl_lower(np.full(50, 0.9), ALPHA), part(1, "kl_lower_mean")),
    "clopper_pearson_upper": (lambda: means.clopper_pearson_upper(5, 50, ALPHA), VOTES),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_a_function_hands_its_alpha_on(name: str, asks: Asks) -> None:
    call, wanted = SINGLE[name]
    call()
    assert_stated(asks, [wanted])


# Bounds that split their alpha. What they ask no function for is compared with its formula at the part that is left


def test_bounds_sideways_share_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = watched(monkeypatch, [means.kl_lower_mean])
    rng = np.random.default_rng(1)
    rows = np.column_stack([np.full(90, 0.8), 0.6 * rng.choice([-1.0, 1.0], 90)])
    found = shapes.sideways(rows, [1.0, 0.0], ALPHA)
    level, left = log(1.0 / (0.5 * ALPHA)), abs(float(rows[:, 1].mean()))
    assert_stated(asks, [part(0.5, "kl_lower_mean")])  # the other half:
    assert found.eta == pytest.approx(left + sqrt(2.0 * found.lam * level / 90) + 2.0 * level / (3.0 * 90))


def test_the_parts_of_a_turn_share_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = watched(monkeypatch, [shapes.sideways, means.kl_lower_mean])
    angles.turn_upper(ROWS, np.eye(2)[0], ALPHA)
    assert_stated(asks, [part(2 / 3, "sideways") + part(1 / 3, "kl_lower_mean")])


def test_the_parts_of_a_core_share_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = watched(monkeypatch, [means.kl_lower_mean, means.clopper_pearson_lower])
    found = core.core_of(ROWS[::2], ROWS, ALPHA)
    assert_stated(asks, [part(0.25, "kl_lower_mean", "kl_lower_mean", "clopper_pearson_lower")])  # the last quarter:
    level, n = log(2.0 / (0.25 * ALPHA)), len(ROWS)
    spread = float(means.kl_upper_mean(found.spread / found.reach**2, n, 0.25 * ALPHA))
    assert found.ball == pytest.approx(found.reach * (sqrt(2.0 * spread * level / n) + 2.0 * level / n))


@pytest.mark.parametrize("r", [0.0, 0.8])
def test_the_ball_around_a_mean_is_mcdiarmids(r: float) -> None:
    assert classes.mean_ball(150, ALPHA, r=r) == pytest.approx(sqrt((1 - r * r) / 150) + sqrt(2 * log(10) / 150))


# Wealth against a claim has to reach one over the part of alpha that the bets have (Ville)


def joint(monkeypatch: pytest.MonkeyPatch, wealth: float) -> bool:
    monkeypatch.setattr(angles.Bets, "log_wealth", lambda *_: wealth)
    return angles.JointEvidence(angles.JointPilot(ROWS, cos0=0.5, n=120, alpha=ALPHA), ROWS).holds(0.5)


def joint_test(monkeypatch: pytest.MonkeyPatch, wealth: float) -> bool:
    monkeypatch.setattr(angle_test.JointTest, "log_wealth", property(lambda _: wealth))
    return angle_test.JointTest(ROWS, cos0=0.5, a=0.5, n=120, alpha=ALPHA).decision == "certified"


def sequential(monkeypatch: pytest.MonkeyPatch, wealth: float) -> bool:
    monkeypatch.setattr(means.BettingState, "log_wealth", property(lambda _: np.float64(wealth)))
    return means.SequentialTest(0.5, alpha=ALPHA).update([1.0]) == "certified"


def along_tangents(monkeypatch: pytest.MonkeyPatch, wealth: float) -> bool:
    monkeypatch.setattr(tangent.TangentTest, "log_wealth", property(lambda _: np.array([wealth])))
    test = tangent.TangentTest([0.9, 0.8], a=0.5, target=0.5, alpha=ALPHA)
    test.update([0.9])
    return bool(test.certified.all())


def every_token(monkeypatch: pytest.MonkeyPatch, wealth: float) -> bool:
    monkeypatch.setattr(means.BettingState, "log_wealth", property(lambda _: np.array([wealth, 9.0])))
    test = TokensTest(tokens=2, radius=0.05, cos0=0.5, sigma=0.25, alpha=ALPHA, n=96, n_pilot=0)
    test.take(np.full((wanted_of(test), 4), 0.5))
    return test.finding().stop == "certified"


def wanted_of(certifier: Certifier) -> int:
    wanted = certifier.request()
    assert wanted is not None
    return wanted.sure


def ranks(monkeypatch: pytest.MonkeyPatch, wealth: float) -> bool:
    monkeypatch.setattr(RankBets, "wealth", lambda *_: wealth)
    test = topk.TopAtRadius(radius=0.05, text=TEXT, k=2, own=0, sigma=0.25, alpha=ALPHA, n=400, n_pilot=50)
    for _ in range(2):
        test.take(np.repeat(TEXT[:1], wanted_of(test), axis=0))
    return test.decision == "certified"


@pytest.mark.parametrize(
    ("certifies", "share"),
    [(joint, 0.9), (joint_test, 0.9), (sequential, 1.0), (along_tangents, 1.0), (every_token, 1.0), (ranks, 1.0)],
)
def test_a_test_certifies_from_one_over_its_part_of_alpha_on(
    certifies: Callable[[pytest.MonkeyPatch, float], bool], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = log(1.0 / (share * ALPHA))
    assert certifies(monkeypatch, wanted + 1e-9)
    assert not certifies(monkeypatch, wanted - 1e-9)


def test_the_looks_at_the_turn_share_their_part_of_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bets 0.9, the turn 0.05 at all looks together, the norm 0.05."""
    asks: list[float] = []

    def never_confirmed(*given: Any) -> float:
        asks.append(given[2] / ALPHA)
        return float(np.pi)

    monkeypatch.setattr(angle_test, "turn_upper", never_confirmed)
    monkeypatch.setattr(angle_test.JointTest, "_conclude", lambda _: None)  # it goes on to the last look
    angle_test.JointTest(ROWS, cos0=0.5, a=0.5, n=1024, alpha=ALPHA).update(np.tile(ROWS, (9, 1))[:1024])
    assert asks == pytest.approx([0.05 / 2**look for look in range(1, 7)])
    assert sum(asks) <= 0.05


# And what a bound is asked for it has to keep: those without a simulation that is tight, by their formulas


def test_chernoffs_bound_is_where_the_divergence_reaches_its_level() -> None:
    mean, n = 0.7, 50
    found = float(means.kl_lower_mean(mean, n, ALPHA))
    divergence = mean * log(mean / found) + (1.0 - mean) * log((1.0 - mean) / (1.0 - found))
    assert n * divergence == pytest.approx(log(1.0 / ALPHA), rel=1e-6)


def test_hoeffdings_and_bernsteins_bounds_are_the_published_ones() -> None:
    scores = np.tile([0.9, 0.7], 25)
    mean, variance, n = 0.8, float(scores.var(ddof=1)), 50
    assert float(means.hoeffding_lower(scores, ALPHA)) == pytest.approx(mean - sqrt(log(1.0 / ALPHA) / (2 * n)))
    level = log(2.0 / ALPHA)  # Maurer and Pontil 2009, theorem 4
    expected = mean - sqrt(2.0 * variance * level / n) - 7.0 * level / (3.0 * (n - 1))
    assert float(means.bernstein_lower(scores, ALPHA)) == pytest.approx(expected)
