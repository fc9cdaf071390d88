"""The report page: complete, self-contained, well-formed, and deaf to hostile names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import HOSTILE, Page

from robustvlm.commands.attack.compare import write_comparison
from robustvlm.commands.attack.record import load_run
from robustvlm.commands.attack.report import attack_report, write_report
from robustvlm.errors import UserError
from robustvlm.report.page import page_of
from robustvlm.report.words import interval, percent
from robustvlm.runs.records import Check

WriteRun = Callable[..., Path]


@pytest.fixture(scope="module")
def run_folder(write_run: WriteRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", images=120, n_classes=40)


@pytest.fixture(scope="module")
def html(run_folder: Path) -> str:
    return write_report(run_folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile_html(write_run: WriteRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_run(
        tmp_path_factory.mktemp("hostile") / "run",
        images=60,
        class_names=HOSTILE,
        checks=[Check(name="<b>check</b>", level="fault", message="<script>alert(2)</script>")],
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["name"] = "<script>name</script>"
    manifest["command"] = "robustvlm attack '<script>command</script>'"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return page_of(attack_report(load_run(folder)))


def assert_self_contained(text: str) -> None:
    page = Page(text)
    assert not page.tags["script"]
    assert not page.tags["link"]
    assert not page.tags["iframe"]
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?://|url\((?!#)|@import", text)


def test_page_is_well_formed_and_self_contained(html: str) -> None:
    assert_self_contained(html)
    page = Page(html)
    assert page.tags["main"] == page.tags["h1"] == 1


def test_ids_are_unique_and_every_reference_has_its_target(html: str) -> None:
    page = Page(html)
    ids = Counter(value for _, name, value in page.attributes if name == "id")
    assert [i for i, n in ids.items() if n > 1] == []
    targets = {value[1:] for _, name, value in page.attributes if name == "href"} | set(
        re.findall(r"url\(#([^)]+)\)", html)
    )
    assert targets <= set(ids)


def test_every_number_of_the_summary_is_on_the_page(html: str, run_folder: Path) -> None:
    summary = load_run(run_folder).summary
    for rate in [summary.clean_accuracy] + [
        r for e in summary.per_eps for r in (e.robust_accuracy, e.attack_success_rate)
    ]:
        assert percent(rate.value) in html
        assert interval(rate) in html
    assert f"{summary.cost.forward_passes:,}" in html
    assert "truncated file" in html
    for group in summary.per_eps[-1].per_class:
        assert group.name in html


def test_pictures_have_alternative_texts(html: str) -> None:
    page = Page(html)
    assert page.tags["img"] == 36
    alts = [value for tag, name, value in page.attributes if tag == "img" and name == "alt"]
    assert len(alts) == 36
    assert all(alts)
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == page.tags["svg"] == 3


def test_same_run_gives_the_same_bytes(run_folder: Path, html: str) -> None:
    assert page_of(attack_report(load_run(run_folder))) == html


def test_hostile_names_stay_text(hostile_html: str) -> None:
    assert_self_contained(hostile_html)
    page = Page(hostile_html)
    assert "alert(1)" in "".join(page.text)
    assert "{{ 7 * 7 }}" in "".join(page.text)
    assert "49" not in [text.strip() for text in page.text]
    assert page.tags["style"] == 1
    for forbidden in ("\x1b", "\x07", "\u202e"):
        assert forbidden not in hostile_html
    assert "x" * 90 not in "".join(text for text in page.text if "," not in text)


def test_a_fault_is_announced_at_the_top(hostile_html: str, html: str) -> None:
    assert "cannot be trusted" in hostile_html
    assert "cannot be trusted" not in html


def test_one_eps_needs_no_curve(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", images=30, n_classes=4, n_superclasses=2, eps=1, attacks=("pgd",))
    text = page_of(attack_report(load_run(folder)))
    assert_self_contained(text)
    assert Page(text).tags["svg"] == 2
    assert "the attack:" in text


def test_a_run_without_images_or_gallery_still_renders(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "none", images=0, checks=[])
    text = page_of(attack_report(load_run(folder)))
    assert_self_contained(text)
    assert "No image was evaluated" in text
    assert "No check was recorded" in text


def test_comparison_is_self_contained_and_names_the_better_run(write_run: WriteRun, tmp_path: Path) -> None:
    weak = write_run(tmp_path / "<i>weak", images=150, n_classes=10, n_superclasses=3)
    strong = write_run(tmp_path / "strong", images=150, n_classes=10, n_superclasses=3, strength=0.2)
    path = write_comparison([weak, strong])
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "comparison.html"
    assert_self_contained(text)
    assert not Page(text).tags["i"]
    assert "strong (B) is right more often than &lt;i&gt;weak (A)" in text


def test_unwritable_target_is_one_clear_line(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(run_folder, tmp_path / "file" / "report.html")


def test_no_half_written_file_is_left(run_folder: Path, tmp_path: Path) -> None:
    path = write_report(run_folder, tmp_path / "new" / "out.html")
    assert [p.name for p in path.parent.iterdir()] == ["out.html"]
