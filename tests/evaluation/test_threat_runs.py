"""Runs against other threats: what they state, keep and refuse, from model spec or option to certificate and audit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from certifying import prepared, replayed, rows

from robustvlm import Smoothed, load_classifier
from robustvlm.certify import Certificate
from robustvlm.certify.threats import THREATS, Moving, find_threat
from robustvlm.certify.threats.ellipsoids import _scales
from robustvlm.commands.certify import CertifySettings, certify
from robustvlm.commands.certify import record as words
from robustvlm.commands.certify.audit import audit_folder
from robustvlm.commands.certify.audit_search import Effort
from robustvlm.commands.certify.setup import settle_noise
from robustvlm.commands.certify.summary import CertifySummary
from robustvlm.commands.index import Entry
from robustvlm.defenses import load_pipeline
from robustvlm.errors import UserError
from robustvlm.report.methods import methods_of
from robustvlm.stats import rate

QUICK = Effort(starts=2, steps=6, draws=4, choice=32, evidence=300, fractions=(0.5, 1.0))


@pytest.fixture
def photos(make_folder: Callable[..., Path]) -> Path:
    return make_folder(9)


@pytest.mark.parametrize("threat", [*[name for name in THREATS if name != "l2"], "ellipsoid@1,1,4", "spectrum@4,1"])
def test_a_run_states_its_threat_and_its_audit_stands(photos: Path, threat: str) -> None:
    sigma = 1.0 if threat == "translation" else 0.05
    run = prepared(photos, threat=threat, sigma=sigma, claim="vote", samples=200, limit=3)
    summary = run.summary()
    assert summary.threat == threat
    records = [json.loads(row["certificate"]) for row in rows(run)]
    assert {record["threat"] for record in records} == {threat}
    assert any(not Certificate.from_dict(record).abstained for record in records)
    (line,) = [line for line in run.folder.manifest()["plan"]["threat"] if line.startswith("every image")]
    assert find_threat(threat).allows in line
    assert (summary.half_axes is not None) == ("@" in threat)
    found = audit_folder(run.folder.path, QUICK, limit=1)
    assert not found.broken
    if isinstance(find_threat(threat), Moving) and threat != "translation":
        assert {finding.start for finding in found.findings} == {"grid of moves"}


def test_other_threats_draw_other_noise(photos: Path) -> None:
    """The threat decides the claim, so it is part of what the noise is drawn for."""
    plain = prepared(photos, name="plain", samples=200, limit=2)
    whole = prepared(photos, name="whole", threat="8bit", samples=200, limit=2)
    assert plain.config.noise != whole.config.noise
    assert plain.config.stored().get("threat") is None  # runs about l2 are what they were
    plain.summary()
    whole.summary()
    seeds = [json.loads(row["certificate"])["provenance"]["seeds"] for run in (plain, whole) for row in rows(run)]
    assert len({seed["estimation"] for seed in seeds}) == 4


def test_every_claim_takes_noise_that_shifts(photos: Path) -> None:
    for claim in ("feature", "class", "topk", "recall"):
        top = {"top": 1} if claim in ("topk", "recall") else {}
        found = prepared(photos, name=claim, claim=claim, threat="gamma", sigma=0.2, samples=200, limit=2, **top)
        assert found.summary().mean_radius > 0


def test_a_radius_is_decided_with_few_copies(photos: Path) -> None:
    for threat, sigma in (("brightness", 0.1), ("l1", 0.1), ("8bit", 0.1)):
        found = prepared(photos, name=threat, claim="vote", threat=threat, sigma=sigma, radius=0.01, samples=2000)
        summary = found.summary()
        assert summary.samples.used < summary.samples.fixed
        assert set(summary.samples.stops) <= {"certified", "futile", "exhausted"}


def test_a_part_of_alpha_pays_for_the_law_of_the_noise(photos: Path) -> None:
    run = prepared(photos, threat="8bit", samples=200, limit=1, alpha=0.01)
    split = run.summary().risk.split
    assert sum(split.values()) == pytest.approx(0.01)
    assert split["law of the noise (total variation)"] == pytest.approx(1e-5)
    with pytest.raises(UserError, match="the law of the noise is exact to"):
        prepared(photos, name="much", threat="8bit", samples=1_000_000, alpha=1e-10)


def test_kept_features_are_judged_for_their_threat(photos: Path) -> None:
    prepared(photos, threat="brightness", samples=200, limit=2, cache="float32").summary()
    judged = replayed(photos, name="judged", prompts="independent")
    assert judged.config.threat == "brightness"
    judged.summary()
    assert {json.loads(row["certificate"])["threat"] for row in rows(judged)} == {"brightness"}


def test_the_model_carries_its_noise() -> None:
    spec = "tiny+smooth:brightness=0.2:8"
    assert str(settle_noise(CertifySettings(model=spec))) == "brightness=0.2"
    assert str(settle_noise(CertifySettings(model=spec, threat="brightness", sigma=0.2))) == "brightness=0.2"
    assert str(settle_noise(CertifySettings(model="tiny", threat="translation"))) == "translation=4"
    model = load_pipeline(spec)
    assert model.spec == spec
    assert model.fingerprint != load_pipeline("tiny+smooth:0.2:8").fingerprint
    pixels, seen = torch.rand(1, 3, 64, 64), []
    model.encode_noisy = lambda noisy: seen.append(noisy) or torch.ones(len(noisy), 192)  # type: ignore[method-assign]
    model.encode_image(pixels)
    shifts = (seen[0] - pixels).flatten(1)
    assert float(shifts.std(dim=1).max()) < 1e-6  # one number for all pixels of a copy
    assert float(shifts.mean(dim=1).std()) > 0.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threat": "brightnes"}, "unknown threat 'brightnes': did you mean 'brightness'"),
        ({"threat": "l1", "claim": "class"}, "certified by shares of votes alone: pass claim=vote"),
        ({"threat": "l1"}, "certified by shares of votes alone"),
        ({"model": "tiny+smooth:gamma=0.4", "threat": "l2"}, "smoothed with noise of gamma=0.4, and threat says l2"),
        ({"model": "tiny+smooth:gamma=0.4", "sigma": 0.3}, "smoothed with noise of gamma=0.4, and sigma says 0.3"),
        ({"model": "tiny+smooth:gamma=x"}, "sigma must be a number, got 'x'"),
        ({"threat": "8bit", "sigma": 1.5}, "at most 1"),
        ({"threat": "ellipsoid@1,1", "claim": "vote"}, "scales of 2 channels, and images have 3: pass one each"),
        ({"model": "tiny+smooth:ellipsoid@1,1,2=0.1", "threat": "ellipsoid@1,1,3"}, "and threat says ellipsoid@1,1,3"),
        ({"threat": "rotation"}, "certified by shares of votes alone: pass claim=vote"),
        ({"threat": "rotation", "claim": "named"}, "certified of the class by vote: pass claim=vote"),
        (
            {"threat": "rotation", "claim": "vote", "cache": "float32"},
            "cache does not go together with threat=rotation",
        ),
        ({"threat": "rotation", "claim": "vote", "radius": 200.0}, "is an angle, at most 180 degrees"),
        ({"model": "tiny+smooth:rotation=0.1", "claim": "vote"}, "write +smooth:0.1, and certify with threat=rotation"),
        ({"model": "tiny+smooth:0.1:64:0.01", "threat": "rotation"}, "certified by shares of votes alone"),
        ({"model": "tiny+smooth:gamma=0.4", "threat": "rotation", "claim": "vote"}, "noise of gamma=0.4, and threat"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        certify(**{"model": "tiny", "limit": 1, "samples": 300, "out": tmp_path, **options})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_classifier_is_certified_against_other_threats() -> None:
    """From Python: the votes of any module, with the radius in the unit of the threat."""
    step = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    with torch.no_grad():
        step[1].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 12))
        step[1].bias.copy_(torch.tensor([-6.0, 6.0]))
    image = torch.full((1, 3, 2, 2), 0.6)  # class 0 until 0.1 is taken away
    found = Smoothed(step, 0.1, threat="brightness").certify(image, n=4000)
    assert found.threat == "brightness"
    assert found.classes.item() == 0
    assert 0.085 < found.radius.item() < 0.1
    with pytest.raises(UserError, match="whole numbers"):
        Smoothed(step, 0.1, threat="8bit").certify(image + 0.001, n=200)


def test_a_model_that_votes_is_certified_at_angles(photos: Path) -> None:
    """Its own noise, held against rotations; what its copies answer elsewhere is not stated."""
    run = prepared(
        photos,
        model="Encoder+smooth:0.05:64:0.01:vote",
        claim=None,
        sigma=None,
        threat="rotation",
        samples=300,
        limit=2,
    )
    summary = run.summary()
    assert (summary.threat, summary.sigma, summary.claim) == ("rotation", 0.05, "vote")
    assert "answers another class than the certified one with probability at most 0.01" in summary.deployed
    assert "deployed_radius" not in summary.deployed
    assert {json.loads(row["certificate"])["theorem"] for row in rows(run)} == {"T30"}


def test_the_noise_against_rotations_is_told_in_its_own_unit(photos: Path) -> None:
    """Sigma is of pixels, and the radius is in degrees: no text reads the one in the unit of the other."""
    run = prepared(photos, threat="rotation", claim="vote", sigma=0.05, samples=300, limit=1)
    run.summary()
    assert str(run.config.against) == "0.05"
    manifest = run.folder.manifest()
    assert manifest is not None
    told = methods_of(manifest).text
    assert "against the threat rotation, with Gaussian noise of standard deviation 0.05 in pixels" in told
    assert "0.05 (rotation" not in told
    row = Entry(run.folder.path.name, run.folder.path, manifest)
    assert row.radius == "noise 0.05, against rotation"


def test_half_axes_are_those_of_the_radius_that_is_told() -> None:
    """The average of right images where the claim is about the class, the radius asked for, and no word of none."""

    def said(**changes: Any) -> str:
        told = {"claim": "class", "half_axes": (0.5, 4.0), "asked_radius": None, "certified_correct": rate(2, 2)}
        return words.ellipsoid(CertifySummary.model_construct(**told | changes))

    told = said(mean_radius=0.2, average_certified_radius=0.1)
    assert "below 0.0500 on average is within" in told
    assert "0.4000 on average" in told
    asked = said(mean_radius=0.05, average_certified_radius=0.05, asked_radius=0.1)
    assert "below 0.0500 is within" in asked
    assert "on average" not in asked
    assert said(certified_correct=rate(0, 2), mean_radius=0.0, average_certified_radius=0.0) == ""


def test_the_map_of_a_model_is_part_of_it(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scales.txt").write_text("1 2\n2 4\n")
    model = load_pipeline("tiny+smooth:ellipsoid@scales.txt=0.05:8")
    assert model.spec.startswith("tiny+smooth:ellipsoid@scales.txt#")
    assert load_pipeline(model.spec).fingerprint == model.fingerprint
    run = prepared(
        photos, model="Encoder", threat="ellipsoid@scales.txt", claim="vote", sigma=0.05, samples=200, limit=1
    )
    run.summary()
    assert run.config.threat == model.noise.threat.name  # type: ignore[union-attr]
    Path("scales.txt").write_text("1 2\n2 5\n")
    _scales.cache_clear()  # as in another process
    with pytest.raises(UserError, match=r"the map 'scales\.txt' has changed"):
        audit_folder(run.folder.path, QUICK, limit=1)
    assert load_pipeline("tiny+smooth:ellipsoid@scales.txt=0.05:8").fingerprint != model.fingerprint


def test_rows_of_results_keep_their_columns(photos: Path) -> None:
    run = prepared(photos, threat="contrast", samples=200, limit=2)
    run.summary()
    assert "radius" in pq.read_table(run.folder.results_path).column_names


def test_a_smoothed_classifier_answers_under_other_noise() -> None:
    model = load_classifier("tiny+smooth:8bit=0.02:16:0.01:vote", ["apple", "dog"], device="cpu")
    assert model.predict(torch.rand(2, 3, 64, 64)).classes.shape == (2,)


def test_a_model_does_not_abstain_at_less_than_its_noise_is_exact_to(photos: Path) -> None:
    """Its copies are whole numbers too: over 64 of them the law of the noise is off by more than 1e-12."""
    with pytest.raises(UserError, match="abstains at alpha 1e-12 over 64 copies: pass one with an ALPHA of at least"):
        prepared(photos, model="Encoder+smooth:8bit=0.02:64:1e-12:vote", claim=None, sigma=None, samples=200)
