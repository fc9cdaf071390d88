"""What extra attacks show: more effort must find more, noise no more than gradients, a huge ball everything."""

from __future__ import annotations

import pytest

from robustvlm.commands.attack import effort
from robustvlm.commands.common.questions import sign_test

WORDS = ("eps 1", "eps 2")


def flags(count: int, of: int = 32, start: int = 0) -> list[bool]:
    return [start <= i < start + count for i in range(of)]


@pytest.mark.parametrize(
    ("less", "more", "level"),
    [
        (flags(7), flags(0), "warning"),
        (flags(6), flags(0), "ok"),  # one chance in 64 for a fair coin
        (flags(20), flags(20, start=12), "ok"),  # twelve lost, twelve gained
        (flags(20), flags(12, start=2), "warning"),
        (flags(0), flags(32), "ok"),
        ([], [], "ok"),
    ],
)
def test_less_for_more_effort_is_a_warning_beyond_chance(less: list[bool], more: list[bool], level: str) -> None:
    assert effort.more_effort("larger radius", less, more, words=WORDS).level == level


def test_noise_must_not_beat_gradients() -> None:
    assert effort.noise_wins(flags(0), flags(7), draws=11).level == "warning"
    assert effort.noise_wins(flags(2), flags(8), draws=11).level == "ok"
    assert effort.noise_wins(flags(9), flags(0), draws=11).level == "ok"


def test_nothing_is_robust_in_a_huge_ball() -> None:
    everything, nothing = flags(32), flags(0)
    assert effort.huge_radius(everything, nothing, radius="eps 128/255").level == "ok"
    assert effort.huge_radius(flags(30), everything, radius="eps 128/255").level == "ok"
    masked = effort.huge_radius(flags(10), everything, radius="eps 128/255")
    assert masked.level == "warning"
    assert "missed 22 of 32" in masked.message
    held = effort.huge_radius(flags(31), nothing, radius="eps 128/255")
    assert held.level == "warning"
    assert "1 of 32 images still look robust" in held.message


def test_shares_are_reported_as_notes() -> None:
    assert effort.rounding(0, 0) is None
    check = effort.rounding(9, 8)
    assert check is not None
    assert (check.level, check.message.startswith("Rounded to 8 bits, 8 of 9 ")) == ("note", True)
    assert effort.second_look(0, 0, why="gradients in bf16") is None
    for upheld, words in ((5, "All 5 successes"), (3, "2 of 5 successes")):
        look = effort.second_look(5, upheld, why="gradients in bf16")
        assert look is not None
        assert look.message.startswith(words)


def test_the_sign_test_is_the_binomial_tail() -> None:
    assert sign_test(7, 0) == pytest.approx(2**-7)
    assert sign_test(2, 1) == pytest.approx(0.5)
    assert sign_test(0, 5) == 1.0
