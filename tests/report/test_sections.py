"""One description, two renderers: nothing is lost on the way to the terminal or the page, and no text is trusted."""

from __future__ import annotations

import io
import random
import re
from types import SimpleNamespace

import pytest
from markupsafe import Markup
from pages import HOSTILE, Page
from rich.console import Console

from robustvlm.commands.assemble import work as build
from robustvlm.commands.judge.view import tone_of
from robustvlm.commands.prompts import work as prompts
from robustvlm.commands.soup import work as soup
from robustvlm.defenses.finetune.saved import Tasting
from robustvlm.report.page import page_of
from robustvlm.report.screen import narrowed, show, split
from robustvlm.report.sections import (
    Card,
    Chart,
    Checks,
    Closing,
    Code,
    Column,
    Facts,
    Line,
    Measure,
    More,
    Name,
    Pair,
    Picture,
    Pictures,
    Report,
    Section,
    Small,
    Table,
    Text,
    Verdict,
    numbers,
    ungrouped_footer,
)
from robustvlm.report.words import RANGE, Finding, number, percent
from robustvlm.runs.records import Check
from robustvlm.stats import Mean, PairedTest, rate


def shown(*blocks: object, width: int = 80) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=width), blocks)  # type: ignore[arg-type]
    return stream.getvalue()


def report(text: str) -> Report:
    """Return a report with `text` in every place where a text can stand."""
    line: list[Line] = [text, Code(text), Name(text), Small(text), Measure(text, text)]
    columns = [Column(text), Column(text, number=True, group=text), Column(text, group=text)]
    table = Table(columns, [text, (text, text, Name(text))], title=text, caption=text, strong=frozenset({1}))
    finding = Finding("fault", "x", "fault", text, text, text)
    blocks = [
        *(Text(part, kind=kind) for part in line for kind in ("plain", "lead", "small")),
        Pair([table, Chart(lambda: Markup("<svg></svg>"), text, text, text)]),
        *(Facts([(text, text)], kind=kind) for kind in ("list", "sentences", "settings")),
        Checks([finding]),
        Checks([], none=text),
        Pictures([Picture([("data:,", text, text)], text, text)], title=text),
        More(text, [table]),
    ]
    section = Section(text, blocks, key="a", short=text)
    return Report(
        text, text, text, line, [Verdict(line)], [section], [Card(text, text, text), Card(text, rate(1, 2), text)]
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_markup_on_the_page(text: str) -> None:
    written = page_of(report(text))
    page = Page(written)
    plain = Page(page_of(report("harmless")))
    assert page.tags == plain.tags
    assert [name for _, name, _ in page.attributes] == [name for _, name, _ in plain.attributes]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_moves_the_cursor(text: str) -> None:
    said = shown(*report(text).sections[0].blocks, *report(text).verdicts)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", said)


@pytest.mark.parametrize("seed", range(40))
def test_a_table_of_any_width_keeps_every_word_and_column_whole(seed: int) -> None:
    draw = random.Random(seed)
    words = [f"w{i}{'x' * draw.randint(0, 14)}" for i in range(400)]
    count = draw.randint(1, 14)

    def cell() -> str:
        return " ".join(words.pop() for _ in range(draw.randint(1, 2)))

    titles = [cell() for _ in range(count)]
    rows = [tuple(cell() for _ in range(count)) for _ in range(draw.randint(1, 5))]
    said = shown(Table([Column(title) for title in titles], rows))
    assert max(map(len, said.splitlines())) <= 80
    found = said.split()
    for word in " ".join([*titles, *(cell for row in rows for cell in row)]).split():
        assert word in found


def test_the_parts_of_a_wide_table_repeat_the_names_of_its_rows() -> None:
    columns = [Column("name"), *numbers(*(f"column{i}" for i in range(12)))]
    said = shown(Table(columns, [("first", *map(str, range(12)))], title="Wide", caption="End"))
    assert said.count("first") == len(split([5, *[8] * 12], 80)) > 1
    assert said.count("Wide") == said.count("End") == 1


def test_a_word_wider_than_the_terminal_is_folded_and_not_cut() -> None:
    path = "/a" * 60
    said = shown(Table([Column("name"), Column("path")], [("one", path)]))
    assert path in "".join(said.split())


def test_widths_are_the_wished_ones_where_there_is_room() -> None:
    assert narrowed([9, 7], [3, 3], room=80) == [9, 7]
    assert sum(narrowed([40, 70], [3, 3], room=60)) + 5 == 60


def test_a_number_and_its_interval_stay_on_one_line() -> None:
    found = Measure.of(rate(30, 40))
    columns = [Column("Sentences of some length"), *(Column(f"column {i}") for i in range(5))]
    said = shown(Table(columns, [("what a row is about, in words of its own", *[found] * 5)]))
    assert said.count(f"{found.text}  {found.interval}") == 5


def test_sentences_beside_numbers_are_no_thin_pillars() -> None:
    about = "what this row is about, which takes a sentence to say"
    row = ("a name of the row", *("1.2345" for _ in range(5)), about)
    said = shown(Table([Column("Name"), *numbers(*(f"figure {i}" for i in range(5))), Column("About")], [row]))
    assert about[:28].rpartition(" ")[0] in said


def test_both_say_the_same_of_a_table() -> None:
    table = Table([Column("what"), Column("share"), *numbers("images")], [("cats", Measure.of(rate(7, 9)), "9")])
    cells = ["what", "share", "images", "cats", *shown_parts(Measure.of(rate(7, 9)))]
    page = " ".join(Page(page_of(Report("k", "n", "k", "f", [], [Section("s", [table])]))).text)
    for cell in cells:
        assert cell in shown(table)
        assert cell in page


def shown_parts(measure: Measure) -> tuple[str, str]:
    return measure.text, measure.interval


def test_closing_lines_are_never_broken() -> None:
    path = "runs/" + "long name " * 20
    assert f"Model:  {path}" in shown(Closing({"Model": path, "Report": "x"}))


def test_what_is_for_one_place_is_not_in_the_other() -> None:
    blocks = [Text("for all"), Text("for paper", only="page"), Text("for screens", only="terminal")]
    page, said = page_of(Report("k", "n", "k", "f", [], [Section("s", blocks)])), shown(*blocks)
    found = [[text in where for text in ("for all", "for paper", "for screens")] for where in (page, said)]
    assert found == [[True, True, False], [True, False, True]]


def test_a_fault_anywhere_raises_the_alarm() -> None:
    assert "cannot be trusted" in page_of(report("harmless"))
    assert "cannot be trusted" not in page_of(Report("k", "n", "k", "f", [], []))


def test_a_soup_names_every_ingredient_and_measure() -> None:
    tasted = [Tasting("runs/a", 0.5, True), Tasting("runs/b", 0.25, False)]
    said = shown(*soup.blocks(soup.Soup(method="greedy", tasted=tasted, measures={"clean accuracy": rate(1, 2)})))
    for words in ("runs/a kept 50.0%", "runs/b left out 25.0%", "clean accuracy 50.0% 1.2"):
        assert words in " ".join(said.split())
    assert "Soup with it" not in shown(*soup.blocks(soup.Soup(method="uniform", tasted=tasted)))


def test_tuned_prompts_stand_beside_the_hand_written_ones() -> None:
    side, alone = prompts.PromptMeasures(accuracy=rate(1, 2), auroc={"x": [0.5, 0.25, 0.75]}), {"loss": 0.5}
    record = prompts.PromptRecord(images=1200, history=[alone], zero_shot=side, tuned=side, notes=["mind the gap"])
    said = shown(*prompts.blocks(record, "data"))
    for words in ("1,200 images, loss 0.500", "AUROC of the energy change, x", "0.500  0.250", "mind the gap"):
        assert words in said
    assert "accuracy" not in shown(*prompts.blocks(prompts.PromptRecord(images=1, history=[alone]), None))


def test_a_pipeline_names_its_parts_in_order_and_what_does_not_fit() -> None:
    parts, misfits = ["encoder tiny", "smoothing 0.25:8"], ["the head was made for another encoder"]
    said = shown(*build.blocks(build.Pipeline(name="p", parts=parts, model={}, misfits=misfits)))
    assert "encoder tiny > smoothing 0.25:8" in said
    assert "warning: the head was made for another encoder" in said


def test_a_heading_of_rows_is_not_broken_where_the_names_below_it_are_short() -> None:
    wide = [(f"n{i}", *("0.123  0.100" for _ in range(6))) for i in range(2)]
    columns = [Column("set"), *(Column(f"column {i}") for i in range(6))]
    assert "Mahalanobis" in shown(Table(columns, ["Mahalanobis", *wide]), width=60)


@pytest.mark.parametrize(("tone", "word"), [("held", "Good"), ("", "Bad"), ("neutral", "")])
def test_the_colour_of_a_verdict_is_also_a_sign_with_a_word(tone: str, word: str) -> None:
    page = Page(page_of(Report("k", "n", "k", "f", [Verdict(["so it is"], tone)], [])))
    assert [value for _, name, value in page.attributes if name == "aria-label"] == [
        "Sections",
        *([word] if word else []),
    ]


@pytest.mark.parametrize(
    ("first", "second", "p", "level", "tone"),
    [
        (9, 1, 0.01, "ok", "held"),
        (1, 9, 0.01, "ok", ""),
        (9, 1, 0.2, "ok", "neutral"),
        (9, 1, 0.01, "fault", "neutral"),
    ],
)
def test_a_judged_defence_has_a_colour_for_a_clear_difference_only(
    first: int, second: int, p: float, level: str, tone: str
) -> None:
    gain = PairedTest(both=0, only_first=first, only_second=second, neither=0, p_value=p)
    checks = [SimpleNamespace(level=level)]
    assert tone_of(SimpleNamespace(gain=gain, gain_p=p, checks=checks)) == tone  # type: ignore[arg-type]
    assert tone_of(SimpleNamespace(gain=None, gain_p=None, checks=[])) == "neutral"  # type: ignore[arg-type]


def test_reports_say_where_copies_make_intervals_too_narrow() -> None:
    bundled, own = ({"config": {"data": data}} for data in ("emoji?split=test", "imagefolder:emoji"))
    assert "the bundled data have copies of each drawing" in ungrouped_footer(bundled, [], None)
    assert ungrouped_footer(bundled, [], 24.0) == ""
    said = Check(name="copies", level="note", message="24 images are worth 19 independent ones")
    assert ungrouped_footer(bundled, [said], None) == ""
    assert ungrouped_footer(own, [], None) == ""


def test_printed_intervals_cover_what_was_computed_and_only_none_is_zero_percent() -> None:
    auroc = Measure.between(0.9987, 0.99961, 0.99972)
    mean = Measure.of(Mean(total=9, value=-0.1, low=-0.123412, high=0.123401))
    said = number(Mean(total=9, value=0.5, low=0.49996, high=0.50004))
    assert (auroc.interval, mean.interval) == (f"0.999{RANGE}1.000", f"-0.1235{RANGE}0.1235")
    assert said == f"0.500 (0.499{RANGE}0.501)"
    assert [percent(share) for share in (0.0, 0.0004, 0.9996, 1.0)] == ["0%", "<0.1%", ">99.9%", "100%"]
    assert Measure.of(rate(1, 10_000)).text == "<0.1%"
