"""A certificate claim of the user's own, as docs/certify.md shows it: from the shell and from Python, and refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command_line import MEAN, Call
from PIL import Image
from scipy.stats import beta, norm

from robustvlm.certify import claims
from robustvlm.commands.certify import CERTIFY, CertifySettings
from robustvlm.commands.certify.view import write_certify_report
from robustvlm.core.user_code import code_policy
from robustvlm.errors import UserError
from robustvlm.runs.run import Run

SIGMA, ALPHA = 0.5, 0.001
SPEC = "my_claims:three_quarters"
GIVEN = ("my_mean:Mean", "--data", "imagefolder:photos", "--samples", "600", "--sigma", str(SIGMA), "--device", "cpu")
CLAIM = re.search(r"## Add a certificate claim.*?```python\n(.*?)```", (Path(__file__).parents[2] / "docs/certify.md").read_text(), re.S)  # fmt: skip # noqa: E501


def forget() -> None:
    """Forget the modules, as another process would not know them."""
    claims._own.clear()
    for name in ("my_claims", "my_mean"):
        sys.modules.pop(name, None)


@pytest.fixture
def here(own_place: None, tmp_path: Path) -> Path:  # noqa: ARG001
    """A current folder with the claim of the documentation, an encoder, and images some of whose votes are split."""
    assert CLAIM is not None
    forget()
    (tmp_path / "my_claims.py").write_text(CLAIM[1])
    (tmp_path / "my_mean.py").write_text(MEAN)
    for name, colour in (("red", (255, 0, 0)), ("blue", (100, 128, 140))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), colour).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path


def prepared(name: str = "python", **options: Any) -> Any:
    given = {"model": "my_mean:Mean", "data": "imagefolder:photos", "device": "cpu", "samples": 600, "sigma": SIGMA}
    return Run(CERTIFY, CertifySettings(claim=SPEC, name=name, **{**given, **options}))


def test_an_own_claim_certifies_from_the_command_line_and_from_python(here: Path, call: Call) -> None:
    ended = call("certify", *GIVEN, "--claim", SPEC, "--name", "shell", "--json")
    assert ended.code == 0, ended.err
    assert "running code" not in ended.err  # the user named it
    summary = json.loads(ended.out)
    assert summary["claim"] == SPEC
    rows = pq.read_table(here / "runs/shell/results.parquet").to_pylist()
    for row in rows:  # a second implementation: the exact lower bound of the share, against three quarters
        won = round(row["votes"] * row["n"])
        share = beta.ppf(ALPHA, won, row["n"] - won + 1) if won else 0.0
        assert row["radius"] == pytest.approx(max(0.0, SIGMA * (norm.ppf(share) - norm.ppf(0.75))), rel=1e-6)
        assert json.loads(row["certificate"])["claim"] == SPEC
    assert sum(row["radius"] > 0.0 for row in rows) >= 2
    manifest = json.loads((here / "runs/shell/manifest.json").read_text())
    assert any("is for its author to prove" in note for note in manifest["plan"]["notes"])

    found = prepared().start().summary
    assert found.own_claim is not None
    assert found.certified_correct is not None
    assert found.model_dump(mode="json")["own_claim"] == summary["own_claim"]
    again = pq.read_table(here / "runs/python/results.parquet").to_pylist()
    assert [row["radius"] for row in again] == [row["radius"] for row in rows]  # same settings, same noise

    ended = call("certify", "--audit", "shell", "--audit-starts", "2", "--audit-steps", "3")
    assert ended.code == 0, ended.err
    assert "No attack got below a certified bound" in ended.out


def test_a_certificate_three_times_too_large_is_caught(here: Path, call: Call) -> None:
    code = (here / "my_claims.py").read_text()
    wrong = code.replace("return replace(found, radius=", "return replace(found, radius=1.0 + 3 * ")
    assert wrong != code
    (here / "my_claims.py").write_text(wrong)
    assert call("certify", *GIVEN, "--claim", SPEC, "--name", "wrong").code == 0
    ended = call("certify", "--audit", "wrong", "--audit-starts", "4", "--audit-steps", "20", "--limit", "2")
    assert ended.code == 1, ended.out + ended.err
    assert "these certificates are false" in ended.out


def test_a_run_is_shown_without_its_claims_code_and_audited_only_with_it(here: Path, call: Call) -> None:
    run = prepared()
    run.start()
    folder = run.folder.path
    before = (folder / "report.html").read_text()
    assert "three quarters of the noisy copies is right and certified to stay" in before
    forget()
    with code_policy(refused=True):
        assert write_certify_report(folder).read_text() == before
    (here / "my_claims.py").write_text((here / "my_claims.py").read_text() + "\nTHRESHOLD = 0\n")
    ended = call("certify", "--audit", "python")
    assert ended.code == 2
    assert f"the claim '{SPEC}' has changed since" in ended.err


def test_a_changed_claim_is_another_run_with_other_noise(here: Path) -> None:
    first = prepared(name=None)
    forget()
    (here / "my_claims.py").write_text((here / "my_claims.py").read_text() + "\nTHRESHOLD = 0\n")
    second = prepared(name=None)
    assert first.folder.name != second.folder.name
    assert first.work.config.noise != second.work.config.noise
    forget()
    assert prepared(name=None).work.config == second.work.config


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        (SPEC, ("--no-code",), "is code, and code is refused"),
        ("absent_claims:x", (), "no module 'absent_claims', neither in this folder nor among the installed packages"),
        ("my_claims:three_quarter", (), "my_claims has no 'three_quarter'; did you mean 'three_quarters'"),
        ("my_claims:SHARE", (), "'my_claims:SHARE' is no claim: expected a robustvlm.certify.claims.Claim"),
        ("my_claims:", (), "unknown claim 'my_claims:'"),
        (SPEC, ("--radius", "0.1"), "has no test of one radius: leave out --radius"),
        (SPEC, ("--deployed", "16"), "states nothing of finitely many copies: leave out --deployed"),
        (SPEC, ("--tau", "0.1"), "--tau and --antibodies are for --claim openset"),
        (SPEC, ("--alpha", "1e-300"), "can certify any radius for no image, whatever the model"),
    ],
)
def test_mistakes_are_one_line(here: Path, call: Call, spec: str, options: tuple[str, ...], words: str) -> None:
    ended = call("certify", *GIVEN, "--claim", spec, *options)
    assert ended.code == 2
    assert words in ended.err
    assert not (here / "runs").exists()


@pytest.mark.usefixtures("here")
def test_code_that_only_a_file_names_is_announced(call: Call) -> None:
    prepared().start()
    forget()
    ended = call("certify", "--audit", "python", "--audit-starts", "2", "--audit-steps", "1", "--limit", "1")
    assert f"running code: importing '{SPEC}', named by the manifest of" in " ".join(ended.err.split())
    forget()
    ended = call("certify", "--audit", "python", "--no-code")
    assert ended.code == 2


@pytest.mark.usefixtures("here")
def test_a_refusal_holds_for_claims_that_were_loaded_before() -> None:
    assert claims.load_own(SPEC).name == "three quarters"
    with code_policy(refused=True), pytest.raises(UserError, match="code is refused"):
        claims.load_own(SPEC)


def test_columns_are_those_of_the_results() -> None:
    from dataclasses import replace

    from robustvlm.certify.claims import CLAIMS

    with pytest.raises(UserError, match="no column 'radii' in the results: did you mean 'radius'"):
        replace(CLAIMS["class"], columns=("radius", "radii"))
    with pytest.raises(UserError, match="its first column is 'radius'"):
        replace(CLAIMS["class"], columns=("mean_radius",))


@pytest.mark.usefixtures("here")
def test_a_plan_is_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Callable[..., Any] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(type(claims.load_own(SPEC)), "plan", plan)
    with pytest.raises(UserError, match="must return a Plan, its plan\\(\\) returned a NoneType"):
        prepared()


def test_a_quantity_without_its_method_is_said_in_one_line() -> None:
    """The base's own method, as a claim of the user's inherits it that names a quantity and stops there."""
    nothing: Any = None
    with pytest.raises(UserError, match="the claim 'vote' names a quantity for audits and makes none"):
        claims.Claim.audited(claims.CLAIMS["vote"], {}, nothing, nothing, steering=nothing, evidence=nothing)
