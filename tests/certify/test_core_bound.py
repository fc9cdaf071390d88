"""The bound for all directions at once (T21): every direction that a look can choose, known truth, planted faults."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, norm

from robustvlm.certify import ClassRadius, VocabularyRadius
from robustvlm.certify.certifier import Certifier
from robustvlm.certify.classes import rival_normals
from robustvlm.certify.core import Core, best_core_shift, copies_needed, core_of
from robustvlm.certify.normal import shift_up
from robustvlm.errors import UserError

RUNS = [pytest.param(200, id="light"), pytest.param(10_000, id="heavy", marks=pytest.mark.slow)]
DIM = 8


class Turning:
    """An encoder that looks at one coordinate t: it turns by `turn` tanh(t), and beyond `edge` it points backwards.

    A part `side` of every feature is of random sign along a random axis, which has no mean. The smoothed feature under
    a shift along t is an integral over t.
    """

    def __init__(self, *, turn: float, edge: float, side: float) -> None:
        self.turn, self.edge, self.side = turn, edge, side

    def _front(self, t: np.ndarray) -> np.ndarray:
        angle = np.where(t > self.edge, np.pi, self.turn * np.tanh(t))
        rows = np.zeros((len(t), DIM))
        rows[:, 0], rows[:, 1] = np.cos(angle), np.sin(angle)
        return rows * np.sqrt(1.0 - self.side**2)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        rows = self._front(rng.standard_normal(n))
        rows[np.arange(n), rng.integers(2, DIM, n)] = self.side * rng.choice([-1.0, 1.0], n)
        return rows

    def mean(self, a: float) -> np.ndarray:
        t = np.linspace(-8.0, 8.0, 20_001)
        return np.asarray((norm.pdf(t - a)[:, None] * self._front(t)).sum(axis=0) * (t[1] - t[0]))


ENCODERS = {
    "turns": Turning(turn=0.4, edge=9.0, side=0.1),
    "rarely backwards": Turning(turn=0.05, edge=2.2, side=0.1),
    "often backwards": Turning(turn=0.0, edge=1.0, side=0.3),
    "mostly sideways": Turning(turn=0.1, edge=2.0, side=0.8),
}


def promised_too_much(core: Core, truth: np.ndarray, a: float) -> float:
    """The largest excess of the bound over <m(x'), v>, over all unit v: they enter linearly, so one v has it."""
    lost = float(shift_up(core.outside, a))
    worst = core.mean - truth - lost * core.centre
    v = worst / np.linalg.norm(worst)
    return float((core.lower(v[None], a) - v @ truth)[0])


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("runs", RUNS)
def test_no_direction_chosen_after_a_look_has_less_than_promised(name: str, runs: int) -> None:
    encoder, alpha, rng, false = ENCODERS[name], 0.2, np.random.default_rng(3), 0
    shifts = np.array([0.0, 0.5, -0.5, 1.0, 2.0])
    truths = [encoder.mean(a) for a in shifts]
    for _ in range(runs):
        core = core_of(encoder.draw(rng, 30), encoder.draw(rng, 120), alpha)
        false += any(promised_too_much(core, m, abs(a)) > 0.0 for a, m in zip(shifts, truths, strict=True))
    assert binom.sf(false - 1, runs, alpha) > 1e-3


@pytest.mark.parametrize(
    ("name", "a", "faulty"),
    [
        ("rarely backwards", 2.0, {"outside": 0.0}),
        ("turns", 1.0, {"variance": 0.0, "outside": 0.0}),
        ("turns", 0.0, {"ball": 0.0, "outside": 0.0}),
    ],
)
def test_the_simulation_notices_a_part_that_is_left_out(name: str, a: float, faulty: dict[str, float]) -> None:
    encoder, rng = ENCODERS[name], np.random.default_rng(4)
    pilot = Turning(turn=encoder.turn, edge=9.0, side=encoder.side).draw(rng, 100)  # may be anything
    truth, core = encoder.mean(a), core_of(pilot, encoder.draw(rng, 1000), 0.05)
    assert promised_too_much(core, truth, a) <= 0.0
    assert promised_too_much(replace(core, **faulty), truth, a) > 0.0


def test_many_copies_come_near_the_distribution_along_one_direction() -> None:
    """Half of the radius of prompts that were fixed before, from 1,000 copies, for features close together."""
    rng = np.random.default_rng(5)
    rows = np.eye(64)[0] + 0.02 * rng.standard_normal((1000, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    text = np.stack([np.eye(64)[0], 0.98 * np.eye(64)[0] + np.sqrt(1.0 - 0.98**2) * np.eye(64)[1]])
    kinds: dict[str, Certifier] = {
        "fixed": ClassRadius(text=text, sigma=1.0, alpha=0.001, n=1000, n_pilot=200, baselines=False),
        "any": VocabularyRadius(text=text, sigma=1.0, alpha=0.001, n=1000, n_pilot=200),
    }
    for certifier in kinds.values():
        certifier.take(rows[:200])
        certifier.take(rows[200:])
    fixed, chosen = (kinds[name].finding().radius for name in ("fixed", "any"))
    assert 0.5 * fixed < chosen < fixed


def test_more_copies_than_needed_certify_and_fewer_do_not() -> None:
    """The estimate that is told beforehand, of samples like these."""
    rng, text = np.random.default_rng(6), np.stack([np.eye(DIM)[0], [0.96, 0.28, *np.zeros(DIM - 2)]])
    encoder = Turning(turn=0.05, edge=9.0, side=0.1)
    normals = rival_normals(text, 0)
    assert normals is not None
    pilot = encoder.draw(rng, 200)
    needed = copies_needed(core_of(pilot, encoder.draw(rng, 60), 0.001), normals, 0.001)
    assert needed is not None
    assert core_of(pilot, encoder.draw(rng, round(0.7 * needed)), 0.001).shift(normals) == 0.0
    assert core_of(pilot, encoder.draw(rng, round(1.4 * needed)), 0.001).shift(normals) > 0.0
    assert copies_needed(core_of(pilot, encoder.draw(rng, 60), 0.001), -normals, 0.001) is None


def test_failed_copies_are_outside_and_a_pilot_of_failures_certifies_nothing() -> None:
    rng = np.random.default_rng(7)
    rows = ENCODERS["turns"].draw(rng, 500)
    lost = rows.copy()
    lost[:20] = np.nan
    whole, part = core_of(rows[:100], rows, 0.01), core_of(rows[:100], lost, 0.01)
    assert part.outside > whole.outside + 0.02
    assert whole.shift(np.eye(DIM)[:1]) < best_core_shift(500, 0.01)
    with pytest.raises(UserError, match="every pilot sample failed"):
        core_of(np.full((5, DIM), np.nan), rows, 0.01)
    certifier = VocabularyRadius(text=np.eye(DIM)[:2], sigma=1.0, alpha=0.01, n=20, n_pilot=10)
    certifier.take(np.full((10, DIM), np.nan))
    certifier.take(rows[:10])
    assert certifier.finding().radius == 0.0
