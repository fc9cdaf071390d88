"""Without a terminal: a line at least every 30 seconds, whatever a command is busy with; by the test's own clock."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.cells import cell_len

from robustvlm.cli.console import EVERY, Bars, Console, stage_line
from robustvlm.cli.inspect import examine
from robustvlm.data import open_data


class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def told(**given: object) -> tuple[Bars, Clock, io.StringIO]:
    clock, stream = Clock(), io.StringIO()
    console = Console(width=40)
    console.file = stream
    return Bars(console, clock=clock, **given), clock, stream  # type: ignore[arg-type]


def test_a_line_says_what_is_done_of_how_much_and_what_is_left() -> None:
    bars, clock, stream = told()
    bars.begin("pgd at 2/255", 1500, 500)
    clock.now += 29
    bars.advance(10)
    bars.tick()
    assert stream.getvalue() == ""
    clock.now += 1
    bars.tick()
    bars.tick()
    assert stream.getvalue() == "pgd at 2/255: 510 of 1,500, about 50 min left\n"  # 10 in 30 s, 990 to go
    clock.now += 30
    bars.advance(980)
    bars.tick()
    assert stream.getvalue().splitlines()[1:] == ["pgd at 2/255: 1,490 of 1,500, about 1 s left"]


def test_nothing_done_yet_and_no_total_are_said() -> None:
    bars, clock, stream = told(doing="Purifying")
    clock.now += EVERY
    bars.tick()
    bars.begin("Encoding [noise]", 5)
    clock.now += EVERY
    bars.tick()
    bars.begin("Words")
    bars.advance(7)
    clock.now += 200
    bars.tick()
    assert stream.getvalue().splitlines() == [
        "Purifying: 30 s so far",
        "Encoding [noise]: 0 of 5, time left not known yet",
        "Words: 7 done, 3 min so far",
    ]


def test_lines_come_while_the_run_itself_reports_nothing() -> None:
    stream = io.StringIO()
    console = Console()
    console.file = stream
    bars = Bars(console, every=0.02)
    bars.begin("Slow", 2)
    with bars:
        until = time.monotonic() + 20
        while stream.getvalue().count("\n") < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert stream.getvalue().startswith("Slow: 0 of 2, time left not known yet\nSlow: 0 of 2")
    before = stream.getvalue()
    time.sleep(0.06)
    assert stream.getvalue() == before


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_quiet_console_and_a_terminal_have_no_lines() -> None:
    for settings in ({"quiet": True}, {}):
        stream = io.StringIO() if settings else Terminal()
        console = Console(**settings)  # type: ignore[arg-type]
        console.file = stream
        console._force_terminal = not settings
        with Bars(console, every=0.0) as bars:
            bars.begin("Slow", 2)
            time.sleep(0.03)
        assert "time left not known" not in stream.getvalue()


def test_a_bar_at_80_columns_keeps_count_and_times() -> None:
    stream = Terminal()
    console = Console(width=80)
    console.file, console._force_terminal = stream, True
    with Bars(console) as bars:
        bars.begin("a long title of a stage: misclassify at 2/255", 1200)
        bars.advance(317, loss="0.412", clean_accuracy="81.2%", robust_accuracy="40.1%")
        bars.passed(1, 5000)
        line = "".join(segment.text for segment in console.render_lines(bars._bars, pad=False)[0]).rstrip()
    assert len(line) <= 80
    assert "317/1,200" in line
    assert "loss 0.412" in line
    assert re.search(r"0:00:0\d left (0:00:|-:--:)[\d-]+$", line)
    assert "…" not in line
    assert "0/?" not in stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_a_bar_is_no_wider_than_the_terminal(width: int, share: float | None) -> None:
    more = ["loss 0.412", "clean accuracy 81.2%", "1,234 passes/s"]
    line = stage_line(width, "名前 of a stage that is long", "317/1,200", "0:00:10 left 0:01:30", more, share)
    assert cell_len(line) <= max(width, 9 + 20 + 4 + 3)
    assert "317/1,200" in line
    assert line.endswith(" 0:00:10 left 0:01:30")


def test_looking_at_data_counts_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(Bars, "begin", lambda _, *given: seen.append(given))
    monkeypatch.setattr(Bars, "advance", lambda _, count=1: seen.append(count))
    assert examine(open_data("emoji"), 3, progress=True)["readable"] == 3
    assert seen == [("Decoding", 3), 1, 1, 1]


def test_a_title_is_whole_wherever_all_else_leaves_it_room() -> None:
    title = "autoattack:standard Linf 4/255 superclass:2"
    for width, shown in ((200, title), (90, title[:22]), (40, title[:6])):
        line = stage_line(width, title, "12/90", "0:00:10 left 0:00:30", ["fooled 20%"], 0.1)
        assert line.startswith(shown)
        assert cell_len(line) <= width
