"""The open-set rule by vote: a class, none of them, or no answer; deployed by every command, and certified."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

import robustvlm as rv
from benchmarks.deployed_models import measured
from robustvlm.certify import vote_predict
from robustvlm.certify.claims.vote import VoteRadius
from robustvlm.commands.certify import CertifySettings
from robustvlm.commands.certify.audit import Effort, audit_folder
from robustvlm.commands.certify.work import _check as require_judged
from robustvlm.core.framing import to_pixels
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_classifier, load_pipeline
from robustvlm.defenses.immunity import AdaptedVLM, ImmunisedClassifier, Immunity, immunise_without_images
from robustvlm.defenses.immunity.state import card_settings, load_immunity, save_tensors
from robustvlm.defenses.immunity.votes import OpenVotes, VotingVLM, at_copies, open_vote
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.saved import Card, read_card, write_card

SIGMA = 0.02
RUNS = [pytest.param(2000, id="light"), pytest.param(20_000, id="heavy", marks=pytest.mark.slow)]


def axes(counts: list[int], *, failed: int = 0) -> torch.Tensor:
    """Features of copies that vote for each axis so often, and of some that failed."""
    rows = torch.eye(len(counts)).repeat_interleave(torch.tensor(counts), dim=0)
    return torch.cat([rows, torch.full((failed, len(counts)), float("nan"))])


@pytest.mark.parametrize("failed", [0, 3])
@pytest.mark.parametrize("counts", [[9, 1, 0], [0, 2, 10], [5, 0, 5], [0, 12, 0], [0, 0, 12], [4, 3, 5], [7, 0, 0]])
def test_it_answers_what_the_exact_test_decides_among_classes_and_none(counts: list[int], failed: int) -> None:
    alpha = 0.05
    logits, evidence = open_vote(axes(counts, failed=failed)[None])
    wanted, needed = vote_predict(counts, alpha), np.log(1.0 / alpha)
    said = None if abs(evidence.item()) < needed else 2 if evidence.item() < 0 else int(logits.argmax())
    assert said == wanted


def test_axes_that_tie_are_votes_for_nothing() -> None:
    even = torch.full((1, 20, 3), 3**-0.5)
    assert open_vote(even)[1].item() == 0.0


def test_gradients_of_both_parts_are_finite_and_not_zero() -> None:
    rows = torch.rand(2, 30, 4, generator=torch.Generator().manual_seed(1))
    rows = torch.nn.functional.normalize(rows, dim=2).requires_grad_(True)
    logits, evidence = open_vote(rows)
    for part in (logits[:, 0].sum(), evidence.sum()):
        (slope,) = torch.autograd.grad(part, rows, retain_graph=True)
        assert slope.isfinite().all()
        assert slope.abs().sum() > 0


@pytest.mark.parametrize("mine", [0, 2], ids=["class", "none"])
@pytest.mark.parametrize("runs", RUNS)
def test_inside_a_radius_another_answer_is_given_no_oftener_than_half_of_alpha(mine: int, runs: int) -> None:
    """At the edge of a half-space, which attains the certificate: half of the copies for it, the rest for one rival."""
    alpha, n0, rng = 0.1, 21, np.random.default_rng(41)
    rival = 2 - mine
    places = np.where(rng.random((runs, n0)) < 0.5, mine, rival)
    logits, evidence = open_vote(torch.eye(3)[torch.from_numpy(places)])
    decided = evidence.abs() >= np.log(1.0 / alpha)
    said = torch.where(evidence < 0, 2, logits.argmax(dim=1))
    wrong = int((decided & (said != mine)).sum())
    assert binom.sf(wrong - 1, runs, alpha / 2) > 1e-3
    assert wrong > 0  # the bound is not loose by an error of sign


@pytest.mark.parametrize(
    "runs", [pytest.param(200, id="light"), pytest.param(10_000, id="heavy", marks=pytest.mark.slow)]
)
def test_certified_radii_of_none_are_too_large_no_oftener_than_alpha(runs: int) -> None:
    """An encoder that rejects up to 0.1 along one direction, and sees a class beyond."""
    alpha, edge, sigma, false, rng = 0.2, 0.1, 0.1, 0, np.random.default_rng(42)
    for _ in range(runs):
        certifier = VoteRadius(text=np.eye(3), sigma=sigma, alpha=alpha, n=110, n_pilot=10)
        for size in (10, 100):
            certifier.take(np.eye(3)[np.where(sigma * rng.standard_normal(size) > edge, 0, 2)])
        found = certifier.finding()
        false += found.radius > edge or found.prediction != 2
    assert binom.sf(false - 1, runs, alpha) > 1e-3


# A folder with thresholds for copies, through every command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, vlm = open_data("emoji"), load_model("tiny")
    made = immunise_without_images(vlm, source.class_names, source.templates, ["wolf", "tractor"])
    count = len(made.class_names)
    made = replace(made, thresholds=torch.full((count,), -0.1), copies={SIGMA: torch.full((count,), -0.05)})
    place = tmp_path_factory.mktemp("votes") / "immune"
    place.mkdir()
    save_tensors(place, made)
    write_card(place, Card("immunize", "tiny", vlm.fingerprint, card_settings(made)))
    return place


def spec(folder: Path, rule: str = "16:0.01:vote") -> str:
    return f"{folder}+smooth:{SIGMA}:{rule}"


def immunity_of(folder: Path) -> Immunity:
    card = read_card(folder)
    assert card is not None
    return load_immunity(folder, card.settings)


def test_a_copy_votes_as_the_head_decides_with_the_thresholds_for_copies(folder: Path) -> None:
    made = immunity_of(folder)
    noise = load_pipeline(spec(folder)).noise  # type: ignore[union-attr]
    judged = at_copies(made, noise, "x")
    assert (judged.thresholds == -0.05).all()
    encoder = AdaptedVLM(load_model("tiny"), made.adapter)
    pixels = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    for shift in (-0.4, -0.05, 0.0, 0.3):
        moved = replace(judged, thresholds=judged.thresholds + shift)
        output = ImmunisedClassifier(encoder, moved)(pixels)
        wanted = torch.where(output[:, -1] > 0, output[:, :-1].argmax(1), len(made.class_names))
        features = VotingVLM(encoder, moved).encode_image(pixels)
        assert features.argmax(1).tolist() == wanted.tolist()
        assert features.norm(dim=1).sub(1).abs().max() < 1e-5


def test_a_model_says_a_class_none_of_them_or_nothing(folder: Path) -> None:
    made = immunity_of(folder)
    encoder = load_pipeline(spec(folder))
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    for height, column in ((-2.0, "classes"), (2.0, "rejected")):
        moved = replace(made, copies={SIGMA: torch.full_like(made.thresholds, height)})
        found = OpenVotes(encoder, moved, "x").predict(pixels)  # type: ignore[arg-type]
        if column == "rejected":
            assert found.rejected.all()
            assert not found.abstained.any()
        else:
            assert not found.rejected.any()
        assert ((found.classes < 0) == (found.rejected | found.abstained)).all()
    strict = load_classifier(f"{folder}+smooth:{SIGMA}:8:0.008:vote", made.class_names, ["{}"])
    assert isinstance(strict, OpenVotes)
    assert strict.says.startswith("the class, or that it is none of them, that the vote of 8 noisy copies decides")
    with pytest.raises(UserError, match="abstains at an alpha of its own"):
        strict.predict(pixels, alpha=0.1)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("FOLDER+smooth:0.02:64:0.01", {}, "answer by vote: write"),
        ("FOLDER+smooth:0.3:64:0.01:vote", {}, "thresholds for copies that vote at noise of 0.02 only"),
        ("FOLDER+smooth:0.02:64:0.01:vote", {"claim": "openset"}, "leave out claim, or pass claim=open-vote"),
        ("FOLDER+smooth:0.02:64:0.01:vote", {"claim": "vote"}, "answers by the vote of its copies"),
        ("FOLDER+smooth:0.02:64:0.01:vote", {"cache": "float32"}, "votes of copies cannot be kept"),
        ("FOLDER+dual:0.01,0.02:0.1:0.02:64:0.01:vote", {}, "vote under one noise for all images"),
        ("tiny", {"claim": "open-vote", "sigma": 0.02}, "never refuses an image.*pass claim=vote"),
    ],
)
def test_other_rules_than_the_deployed_one_are_refused(
    folder: Path, tmp_path: Path, model: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rv.certify(model.replace("FOLDER", str(folder)), limit=1, samples=100, alpha=0.05, out=tmp_path, **options)


@pytest.mark.parametrize("claim", ["class", "vote"])
def test_a_certificate_of_the_class_alone_says_that_it_leaves_refusal_out(
    folder: Path, tmp_path: Path, claim: str
) -> None:
    run = rv.certify(str(folder), claim=claim, sigma=SIGMA, limit=1, samples=100, alpha=0.05, out=tmp_path)
    assert "may refuse an image" in {check.name: check.message for check in run.summary.checks}["refusal"]


def test_kept_features_of_the_encoder_are_no_votes(folder: Path) -> None:
    asked = CertifySettings(model=str(folder), from_cache="kept", claim="open-vote", prompts="independent")
    with pytest.raises(UserError, match="vote by its whole head"):
        require_judged(asked, None)  # type: ignore[arg-type]  # whatever run kept them


def test_a_pipeline_whose_copies_could_not_vote_is_not_built(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"thresholds for copies that vote at noise of 0\.02 only"):
        rv.build("tiny", immunize=str(folder), smooth="0.3:12:0.01:vote", out=tmp_path)


def test_a_pipeline_carries_the_rule(folder: Path, tmp_path: Path) -> None:
    built = rv.build("tiny", immunize=str(folder), smooth=f"{SIGMA}:12:0.01:vote", out=tmp_path)
    model = str(built.folder)
    assert json.loads((built.folder / "model.json").read_text())["settings"]["smooth"] == f"{SIGMA}:12:0.01:vote"
    names = open_data("emoji").class_names
    deployed = load_classifier(model, names, ["{}"])
    assert isinstance(deployed, OpenVotes)
    assert built.summary.rule == deployed.says
    said = rv.predict(model, data="emoji", limit=1, device="cpu")
    assert said.rule == deployed.says


def test_what_is_not_decided_is_no_refusal_to_evaluate(folder: Path, tmp_path: Path) -> None:
    """Copies of the first image are rejected about as often as not; few copies decide only where all agree."""
    made, source = immunity_of(folder), open_data("emoji")
    encoder = AdaptedVLM(load_model("tiny"), made.adapter)
    (first,) = (item for item in source.samples(limit=1) if isinstance(item, Sample))
    pixels = to_pixels(first.image, encoder.framing)[None].expand(32, -1, -1, -1)
    noisy = pixels + SIGMA * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    middle = float(ImmunisedClassifier(encoder, made)(noisy)[:, -1].median())
    moved = replace(made, copies={SIGMA: made.thresholds + middle})
    split = tmp_path / "split"
    split.mkdir()
    save_tensors(split, moved)
    write_card(split, Card("immunize", "tiny", load_model("tiny").fingerprint, card_settings(moved)))
    run = rv.evaluate(spec(split, "8:0.008:vote"), limit=6, out=tmp_path, device="cpu")
    rows, found = run.rows.to_pylist(), run.summary
    assert found.rejected is not None
    assert found.abstained is not None
    undecided = [row for row in rows if row["undecided"]]
    assert undecided
    assert not any(row["accepted"] for row in undecided)
    known = [row for row in rows if row["correct"] is not None]
    assert found.abstained.successes == sum(row["undecided"] for row in known)
    assert found.rejected.successes == sum(not row["accepted"] and not row["undecided"] for row in known)
    text = run.report.read_text()
    assert "no answer, images of known classes" in text
    assert "rejected, images of known classes" in text


def test_a_deployed_open_vote_is_attacked_inside_its_radius(folder: Path) -> None:
    options = argparse.Namespace(
        model=spec(folder, "12:0.01:vote"), data="emoji", limit=1, samples=100, alpha=0.05, fractions="0.5,0.99",
        steps=2, eot=1, answers=3,
    )  # fmt: skip
    found = [one for row in measured(options) for one in row["attacks"]]
    assert len(found) == 2
    assert all(set(one["said"]) <= {-1, one["label"]} for one in found)


def test_the_benchmark_of_deployed_models_refuses_radii_that_are_no_l2_distances() -> None:
    """Its attack moves pixels in l2, which leaves an ellipsoid, and is no change of brightness at all."""
    options = argparse.Namespace(
        model="tiny+smooth:ellipsoid@1,1,4=0.03:12:0.01:vote", data="emoji", limit=1, samples=60, alpha=0.05,
        fractions="0.5", steps=1, eot=1, answers=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="are no l2 distances"):
        list(measured(options))


@pytest.mark.slow
def test_every_command_uses_the_rule(folder: Path, tmp_path: Path) -> None:
    names, model = open_data("emoji").class_names, spec(folder, "12:0.01:vote")
    clean = rv.evaluate(model, limit=2, out=tmp_path, device="cpu").summary
    assert clean.rejected is not None
    attacked = rv.attack(
        model, attack="pgd:steps=1", eps="1/255", limit=1, checks="none", out=tmp_path, device="cpu"
    ).summary
    assert attacked.can_reject
    certified = rv.certify(model, limit=1, samples=100, alpha=0.05, out=tmp_path, device="cpu")
    assert certified.config.claim == "open-vote"
    assert (certified.config.deployed, certified.config.abstains_at) == (12, 0.01)
    for row in certified.rows.to_pylist():
        told = json.loads(row["certificate"])
        place = row["prediction"]
        assert told["label_name"] == ("none of the classes" if place == len(names) else names[place])
        assert row["deployed_radius"] <= row["radius"]
        assert told["theorem"] == "T28"
    assert not audit_folder(certified.folder, effort=Effort(starts=1, steps=1)).broken
    found = rv.detect(model, scores="own,mcm", limit=3, out=tmp_path, device="cpu").summary
    assert found.scores
