"""The report of a certify run: complete, self-contained, deaf to hostile names, honest about what it shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from robustvlm.certify import vector_table
from robustvlm.certify.feature import cone_radius, fcsb_radius
from robustvlm.certify.threats import read_noise
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.commands.certify.pictures import ENDS, load_extremes, save_extremes
from robustvlm.commands.certify.record import accuracy, cosine_lines, load_certify_run, share_lines, verdict
from robustvlm.commands.certify.store import CertifyFact, make_certify_rows
from robustvlm.commands.certify.summary import summarise_certify
from robustvlm.commands.certify.view import (
    audit_view,
    certify_report,
    load_audit,
    show_audit,
    write_certify_report,
)
from robustvlm.core.framing import Framing
from robustvlm.data.source import DataSource, Sample
from robustvlm.errors import UserError
from robustvlm.report.page import page_of
from robustvlm.runs.records import Check, Cost, UnreadableImage

SIGMA, SAMPLES = 0.25, 2000
WriteRun = Callable[..., Path]


class Pictures(DataSource):
    """Grey images with names to fear."""

    def ids(self) -> list[str]:
        return [f"img-{i:03d}" for i in range(60)]

    def _stream(self, keep: Callable[[str], bool]) -> Any:
        for i, name in enumerate(self.ids()):
            if keep(name):
                yield Sample(name, Image.new("RGB", (16, 16), (4 * i, 90, 200 - 3 * i)), i % 3)


def facts(claim: str, rng: np.random.Generator, images: int, radius: float | None) -> list[CertifyFact]:
    found = []
    for i in range(images):
        r = float(np.clip(rng.normal(0.75, 0.2), 0.0, 0.99))
        s = 0.5 * (1.0 + 0.9 * r)
        own = float(vector_table().radius(r, 0.5, SIGMA))
        columns = {
            "paper_s": s, "paper_radius": float(fcsb_radius(s, 0.5, SIGMA)),
            "cone_radius": float(cone_radius(r, 0.5, SIGMA)),
        } if claim == "feature" and radius is None else {}  # fmt: skip
        shown = own if radius is None else (radius if own > radius else 0.0)
        n = 1800 if radius is None else int(rng.integers(32, 900))
        found.append(
            CertifyFact(
                i, f"img-{i:03d}", i % 3, i % 3 if i % 7 else (i + 1) % 3, bool(i % 7), claim, shown,
                "fixed" if radius is None else ("certified" if shown else "futile"), n,
                200 if radius is None else 0, 0, r, 2.0, n + 200, 0.1, "{}", columns,
            )
        )  # fmt: skip
    return found


@pytest.fixture
def write_certify_run() -> WriteRun:
    def write(
        folder: Path, *, claim: str = "feature", images: int = 60, radius: float | None = None, gallery: bool = True,
        names: tuple[str, ...] = ("cat", "dog", "fox"), checks: tuple[Check, ...] = (), reason: str = "truncated",
    ) -> Path:  # fmt: skip
        folder.mkdir(parents=True)
        config = CertifyConfig(
            model="tiny", data="emoji", claim=claim, sigma=SIGMA, samples=SAMPLES, n_pilot=200, alpha=0.001,
            min_cos=0.5 if claim == "feature" else None, radius=radius, at=[0.0625, 0.125, 0.25], limit=images, seed=0,
            lanes=64, device="cpu", precision="fp32", resolution=16,
        )  # fmt: skip
        manifest = {
            "format": 1, "kind": "certify", "name": folder.name, "command": "robustvlm certify tiny --sigma 0.25",
            "created": "2025-01-31T12:00:00+00:00", "config": config.model_dump(), "versions": {"torch": "2.9.0"},
            "device": "cpu", "git_commit": None, "model": {"spec": "tiny", "image_size": 16, "logit_scale": 100.0},
            "data": {"spec": "emoji", "class_names": list(names)},
            "plan": {"statement": "cos(m(x'), m(x)) >= 0.5", "alpha_split": {"norm": 0.001}, "best_radius": 0.7},
        }  # fmt: skip
        rows = make_certify_rows(facts(claim, np.random.default_rng(0), images, radius))
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        pq.write_table(rows, folder / "results.parquet")
        cost = Cost(
            forward_passes=9, backward_passes=0, seconds=12.5, model_seconds=12.0, passes_per_second=9600.0
        )  # fmt: skip
        unreadable = [UnreadableImage(id="broken.png", reason=reason)]
        summary = summarise_certify(rows, manifest, cost=cost, checks=checks, unreadable=unreadable)
        (folder / "summary.json").write_text(summary.model_dump_json(), encoding="utf-8")
        if gallery:
            source = Pictures("pictures", names)
            save_extremes(
                folder / "gallery", rows.to_pylist(), source, framing=Framing(16), noise=read_noise(str(SIGMA)), seed=0
            )
        return folder

    return write


class Page(HTMLParser):
    """Collects tags and attributes, and insists that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in {"meta", "img", "br", "link"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_a_feature_report_has_every_part(tmp_path: Path, write_certify_run: WriteRun) -> None:
    folder = write_certify_run(tmp_path / "run")
    path = write_certify_report(folder)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == folder / "report.html"
    assert text.count('<svg class="chart"') == 2
    assert page.tags.count("img") == 2 * 2 * ENDS
    assert "script" not in page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    for words in ("paper&#39;s bound", "cone", "false certificates", "Gaussian", "L₂", "up to floating point"):
        assert words in text, words
    assert "60 of 60 images were resized first and rounded to 8 bits" in text
    assert "of infinitely many copies" in text


@pytest.mark.parametrize("claim", ["class", "vote", "openset"])
def test_other_claims_and_single_radii(tmp_path: Path, write_certify_run: WriteRun, claim: str) -> None:
    for radius in (None, 0.125):
        run = load_certify_run(write_certify_run(tmp_path / f"{radius}", claim=claim, radius=radius))
        text = page_of(certify_report(run))
        Page(text)
        assert text.count('<svg class="chart"') == 1
        assert ("Noisy copies used</h3>" in text) == (radius is not None)
        assert ("right and certified" in text) == (claim != "openset")


def test_numbers_are_those_of_the_rows(tmp_path: Path, write_certify_run: WriteRun) -> None:
    run = load_certify_run(write_certify_run(tmp_path / "run", gallery=False))
    radii = run.radii("radius")
    assert radii is not None
    ours = share_lines(run)[0]
    for eps, rate in zip(ours.eps, ours.rates, strict=True):
        assert rate.successes == int(((radii >= eps) & (radii > 0)).sum())
    cosine = {line.name: line.values for line in cosine_lines(run)}
    assert cosine["this certificate"][0] == pytest.approx(run.summary.curve[0].ours)
    assert np.all(np.array(cosine["this certificate"]) >= np.array(cosine["cone"]) - 0.011)
    certified = int((radii > 0).sum())
    assert "right class for 85.0% of the images." in accuracy(run)
    assert verdict(run.summary).startswith(f"For {certified:,} of 60 images")
    assert f"At the distance 0.0625 it holds for {int((radii >= 0.0625).sum())} of 60." in verdict(run.summary)


def test_certified_accuracy_counts_right_classes_only(tmp_path: Path, write_certify_run: WriteRun) -> None:
    run = load_certify_run(write_certify_run(tmp_path / "run", claim="class", gallery=False))
    radii, right = run.radii("radius"), run.rows.column("correct").to_numpy(zero_copy_only=False)
    assert radii is not None
    assert share_lines(run)[0].rates[0].successes == int((right & (radii > 0)).sum()) < int((radii > 0).sum())


def test_extremes_are_the_ends(tmp_path: Path, write_certify_run: WriteRun) -> None:
    run = load_certify_run(write_certify_run(tmp_path / "run"))
    radii = run.radii("radius")
    assert radii is not None
    (_, small), (_, large) = load_extremes(run)
    order = [f"img-{i:03d}" for i in np.argsort(radii, kind="stable")]
    assert {x.image_id for x in small} == set(order[:ENDS])
    assert {x.image_id for x in large} == set(order[-ENDS:])
    assert large[0].image_id == order[-1]


def test_hostile_texts_stay_texts(tmp_path: Path, write_certify_run: WriteRun) -> None:
    evil = "<script>alert(1)</script>"
    check = Check(name=evil, level="warning", message=evil)
    names = (evil, '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}")
    folder = write_certify_run(tmp_path / "run", claim="class", names=names, checks=(check,), reason=evil)
    finding = {"image_id": evil, "fraction": 1.0, "eps": 0.1, "bound": 0.5, "lowest": 0.1, "upper": 0.2}
    (folder / "audit.json").write_text(json.dumps({"quantity": evil, "findings": [finding]}))
    text = page_of(certify_report(load_certify_run(folder)))
    page = Page(text)
    assert "script" not in page.tags
    assert "onerror" not in page.attributes
    assert "49" not in re.findall(r"class <bdi>([^<]*)</bdi>", text)
    assert "these certificates are false" in text


def test_unfinished_foreign_and_damaged_runs(tmp_path: Path, write_certify_run: WriteRun) -> None:
    folder = write_certify_run(tmp_path / "run", gallery=False)
    (folder / "summary.json").rename(folder / "kept.json")
    with pytest.raises(UserError, match="has not ended"):
        load_certify_run(folder)
    (folder / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="not a certify run of this version"):
        load_certify_run(folder)
    (folder / "kept.json").rename(folder / "summary.json")
    (folder / "results.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot read"):
        load_certify_run(folder)
    (folder / "manifest.json").write_text('{"format": 1, "kind": "attack", "config": {}}')
    with pytest.raises(UserError, match="is no certify run"):
        load_certify_run(folder)


class TestAuditTable:
    """What an audit found, in words."""

    @staticmethod
    def finding(image: str, lowest: float, upper: float, fraction: float = 1.0) -> dict[str, Any]:
        return {
            "image_id": image, "fraction": fraction, "eps": 0.2, "bound": 0.5, "lowest": lowest, "upper": upper,
        }  # fmt: skip

    def test_a_bound_is_broken_only_beyond_doubt(self) -> None:
        content = {"quantity": "cosine", "findings": [self.finding("a", 0.49, 0.55), self.finding("b", 0.8, 0.9)]}
        view = audit_view(content)
        assert (view.broken, view.fallen, view.rows[0][-2:]) == (False, frozenset(), ("1", "0"))
        assert "No attack" in view.sentence
        content["findings"].append(self.finding("c", 0.3, 0.4))  # type: ignore[attr-defined]
        assert audit_view(content).broken
        assert audit_view(content).fallen == {0}
        assert "1 of 3 images" in audit_view(content).sentence

    def test_nothing_to_audit(self, tmp_path: Path) -> None:
        assert "nothing to attack" in audit_view({"findings": []}).sentence
        console = Console(width=100)
        with console.capture() as shown:
            show_audit({"findings": []}, console)
        assert shown.get().strip() == audit_view({"findings": []}).sentence
        assert load_audit(tmp_path / "none.json", {}) is None
        (tmp_path / "bad.json").write_text("[1]")
        assert load_audit(tmp_path / "bad.json", {}) is None


def test_the_noise_that_is_shown_is_that_of_the_run(tmp_path: Path, write_certify_run: WriteRun) -> None:
    from safetensors.torch import load_file

    folder = write_certify_run(tmp_path / "run")
    pairs = [load_file(path) for path in (folder / "gallery").glob("*.safetensors")]
    noise = torch.stack([pair["noisy"] - pair["clean"] for pair in pairs])
    assert noise.std().item() == pytest.approx(SIGMA, rel=0.05)
    assert len({row.numpy().tobytes() for row in noise}) == len(pairs) == 2 * ENDS


def test_the_report_command_knows_certify_runs(
    tmp_path: Path, write_certify_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    from robustvlm.cli.acts import report

    folder = write_certify_run(tmp_path / "run", gallery=False)
    report([str(folder)], out=tmp_path / "page.html", as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["runs"][0]["summary"]["claim"] == "feature"
    assert "Certificate report" in (tmp_path / "page.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="'certify'"):
        report([str(folder), str(folder)], out=None, as_json=False)
