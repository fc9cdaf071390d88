"""`certify --audit` from end to end: a finished run, its audit, its exit code."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from analytic_encoders import PIXELS, SIDE, Circle
from PIL import Image

from robustvlm.cli.acts import run_audit
from robustvlm.cli.console import Bars
from robustvlm.commands.certify import CertifySettings, certify
from robustvlm.commands.certify.audit import audit_folder
from robustvlm.commands.certify.audit_search import Effort
from robustvlm.errors import UserError
from robustvlm.models.custom import CustomVLM
from robustvlm.runs.manifest import write_checksums
from robustvlm.runs.settings import Observer

QUICK = Effort(starts=4, steps=15, draws=8, choice=64, evidence=1000, fractions=(0.5, 1.0))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Uniform images in two classes, whose names are the angles of their texts: 0 and 90 degrees."""
    monkeypatch.setattr("robustvlm.defenses.pipeline.load_model", lambda *_, **__: CustomVLM(Circle(), spec="circle"))
    for name, z in (("0", 0.0), ("90", 1.5)):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        grey = round(255 * z / np.sqrt(PIXELS))
        Image.new("RGB", (SIDE, SIDE), (grey, grey, grey)).save(folder / f"{name}.png")
    (tmp_path / "templates.txt").write_text("{}\n")
    return tmp_path / "pictures"


def finished(pictures: Path, claim: str, **options: object) -> Path:
    return certify(
        "circle", data=f"imagefolder:{pictures}", templates=pictures.parent / "templates.txt", claim=claim,
        sigma=0.5, samples=1000, out=pictures.parent, name=claim, **options,
    ).folder  # fmt: skip


def audited(folder: Path, **options: Any) -> int:
    """Return the exit code of an audit as the command line makes it, as quick as `QUICK`."""
    options = {"audit": str(folder), "device": "cpu", **options}
    return run_audit(CertifySettings(**options), QUICK)


def stretch(folder: Path, factor: float) -> None:
    """Plant false certificates: radii (and the bounds behind them) larger than they are."""
    table = pq.read_table(folder / "results.parquet")
    for name in ("radius", "r"):
        if table.column(name).null_count == 0:
            values = table.column(name).to_numpy() * factor
            column = pa.array(np.minimum(values, 0.999) if name == "r" else values)
            table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, folder / "results.parquet")
    write_checksums(folder, json.loads((folder / "manifest.json").read_text()))  # as a faulty run would have done


@pytest.mark.parametrize("claim", ["feature", "joint", "class", "vote", "openset", "topk", "recall"])
def test_true_certificates_stand_and_stretched_ones_fall(pictures: Path, claim: str) -> None:
    own: dict[str, dict[str, Any]] = {"openset": {"tau": 0.6}, "topk": {"top": 1}, "recall": {"top": 1}}
    folder = finished(pictures, claim, **own.get(claim, {}))
    result = audit_folder(folder, QUICK)
    assert len(result.findings) == 2 * result.certified == 4
    assert not result.broken
    assert json.loads((folder / "audit.json").read_text())["findings"][0]["image_id"]
    stretch(folder, 4.0)
    assert audit_folder(folder, QUICK).broken


def test_a_model_that_is_smoothed_by_its_name_is_audited_as_it_is(pictures: Path) -> None:
    folder = certify(
        "circle+smooth:0.5:8", data=f"imagefolder:{pictures}", templates=pictures.parent / "templates.txt",
        claim="class", samples=1000, out=pictures.parent, name="named",
    ).folder  # fmt: skip
    assert audit_folder(folder, QUICK).findings
    assert not audit_folder(folder, QUICK).broken
    stretch(folder, 4.0)
    assert audit_folder(folder, QUICK).broken


def test_the_exit_code_and_the_report_say_what_was_found(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(pictures, "feature")
    assert audited(folder) == 0
    assert "No attack got below a certified bound on any of 2 images" in capsys.readouterr().out
    assert "No attack got below a certified bound" in (folder / "report.html").read_text(encoding="utf-8")
    stretch(folder, 4.0)
    monkeypatch.setattr("robustvlm.cli.console.Bars", partial(Bars, every=0.0))
    assert audited(folder, limit=1, as_json=True) == 1
    said = capsys.readouterr()
    shown = json.loads(said.out)
    assert "Attacking: 0 of 1" in said.err
    assert shown["broken"] > 0
    assert shown["certified"] == 2
    assert "these certificates are false" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_exit_code_one_is_kept_for_false_certificates(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(pictures, "class")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an encoder of the user's broke")

    monkeypatch.setattr("robustvlm.commands.certify.audit.audit_image", fail)
    with pytest.raises(UserError, match="failed: RuntimeError: an encoder of the user's broke"):
        audited(folder)
    with pytest.raises(UserError, match="limit must be at least 1, got 0"):
        audited(folder, limit=0)


def test_another_image_under_the_same_name_is_not_audited(pictures: Path) -> None:
    folder = finished(pictures, "class")
    Image.new("RGB", (SIDE, SIDE), (9, 9, 9)).save(pictures / "90" / "90.png")
    with pytest.raises(UserError, match=r"'.*90\.png' has changed since"):
        audit_folder(folder, QUICK)


@pytest.mark.parametrize("claim", ["class", "vote", "openset"])
def test_other_texts_than_the_certified_ones_are_not_audited(pictures: Path, claim: str) -> None:
    antibodies = pictures.parent / "antibodies.txt"
    antibodies.write_text("180\n")
    folder = finished(pictures, claim, **({"tau": 0.1, "antibodies": antibodies} if claim == "openset" else {}))
    antibodies.write_text("120\n")
    if claim == "openset":
        with pytest.raises(UserError, match=r"the antibodies of .* have changed since it was certified"):
            audit_folder(folder, QUICK)
    (pictures.parent / "templates.txt").write_text("1{}\n")
    with pytest.raises(UserError, match=r"the templates of .* have changed since it was certified"):
        audit_folder(folder, QUICK)


def test_a_single_radius_is_audited_as_asked(pictures: Path) -> None:
    folder = finished(pictures, "feature", radius=0.3)
    findings = audit_folder(folder, QUICK).findings
    assert {round(finding.eps, 4) for finding in findings} == {0.15, 0.3}
    assert all(0.5 <= finding.bound <= finding.lowest for finding in findings)


def test_other_models_missing_images_and_unfinished_runs(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(pictures, "class")
    with monkeypatch.context() as patch:
        patch.setattr("robustvlm.defenses.pipeline.load_model", lambda *_, **__: CustomVLM(Circle(2.0), spec="other"))
        with pytest.raises(UserError, match="has changed since"):
            audit_folder(folder, QUICK)
    (pictures / "90" / "90.png").rename(pictures / "90" / "new.png")
    with pytest.raises(UserError, match="no longer in"):
        audit_folder(folder, QUICK)
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match="has not ended"):
        audited(folder)
    with pytest.raises(UserError, match="audit_steps must be at least 1, got 0"):
        audited(folder, audit_steps=0)


@pytest.mark.equality
def test_a_killed_audit_goes_on_where_it_was(pictures: Path) -> None:
    folder = finished(pictures, "class")
    straight = audit_folder(folder, QUICK)

    class Watch(Observer):
        def __init__(self, kills: bool = False) -> None:
            self.kills, self.known, self.seen = kills, 0, 0

        def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
            assert (title, total) == ("Attacking", 2)
            self.known = done

        def advance(self, count: int = 1, **shown: str) -> None:
            assert not shown
            self.seen += count
            if self.kills:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit_folder(folder, QUICK, observer=Watch(kills=True))
    watch = Watch()
    resumed = audit_folder(folder, QUICK, observer=watch)
    assert (watch.known, watch.seen) == (1, 1)
    assert resumed.findings == straight.findings
    assert resumed.passes == straight.passes
    assert not (folder / "audit.jsonl").exists()
    with pytest.raises(KeyboardInterrupt):
        audit_folder(folder, QUICK, observer=Watch(kills=True))
    assert audit_folder(folder, QUICK, seed=1).findings != straight.findings  # other settings start over
