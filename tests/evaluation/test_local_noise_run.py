"""Runs with noise chosen for each image: certified, deployed and audited as one model."""

import json
import math
from dataclasses import replace

import pytest
import torch
from analytic_encoders import Analytic, along, image_at
from certifying import prepared
from torch import Tensor

import robustvlm as rv
from robustvlm.certify.claims import Materials
from robustvlm.certify.claims.vote import VoteQuantity
from robustvlm.certify.local_noise import LocalNoise
from robustvlm.commands.certify.audit import audit_folder
from robustvlm.commands.certify.audit_local_noise import CHOICE, audit_chosen
from robustvlm.commands.certify.audit_search import Effort, Target
from robustvlm.commands.certify.record import assumptions
from robustvlm.defenses import smooth

SPEC = "small_encoders:Encoder+dual:0.02,0.06:0.1:0.05:64:0.01:vote"
QUICK = Effort(starts=4, steps=10, draws=8, choice=64, evidence=512, fractions=(1.0,))


@pytest.fixture
def photos(make_folder):
    return make_folder(4)


@pytest.fixture
def run(photos):
    return prepared(photos, "Encoder+dual:0.02,0.06:0.1:0.05:64:0.01:vote", sigma=None, claim=None).start()


def test_every_certificate_says_the_noise_that_was_chosen(run):
    rows = run.rows.to_pylist()
    assert {row["claim"] for row in rows} == {"vote"}  # that by which the model answers
    for row in rows:
        record = json.loads(row["certificate"])
        assert record["provenance"]["sigma"] == row["noise_level"] in (0.02, 0.06)
        assert record["theorem"] == "T22"
        assert set(record["provenance"]["seeds"]) == {"noise", "pilot", "estimation"}
        assert row["radius"] == min(row["noise_radius"], row["level_radius"])
        assert row["deployed_radius"] <= row["radius"]
        assert row["n"] + row["n_pilot"] == 300 == row["passes"]
    assert any(row["radius"] > 0 for row in rows)
    assert {method.column for method in run.summary.methods} >= {"radius", "noise_radius", "level_radius"}
    assert sum(run.summary.risk.split.values()) == pytest.approx(run.config.alpha)
    assert any("vote for" in text for _, text in assumptions(run))


def test_no_true_certificate_breaks_under_an_audit_of_choice_and_class(run):
    found = audit_folder(run.folder, QUICK, limit=2)
    assert not found.broken
    assert {finding.start.startswith(CHOICE) for finding in found.findings} == {True, False}
    assert "vote for the noise level" in found.quantity


def test_evaluate_and_attack_take_the_same_model(photos):
    data, out = f"imagefolder:{photos}?empty=1", photos.parent / "runs"
    clean = rv.evaluate(SPEC, data=data, out=out)
    assert clean.summary.abstained is not None
    attacked = rv.attack(SPEC, data=data, limit=2, steps=2, eps="2/255", attack="pgd", out=out)
    assert attacked.summary.abstains


class TwoEdges(Analytic):
    """Class 0 below one edge of z, a vote for the larger noise below another."""

    def __init__(self, level: float, label: float) -> None:
        super().__init__(f"two-edges-{level}-{label}")
        self.edges = level, label

    def _image_features(self, pixels: Tensor) -> Tensor:
        level, label = (_step(edge - along(pixels)) for edge in self.edges)
        angle = math.pi / 4 - label * (0.1 + 0.6 * (0.5 + 0.5 * level))
        return torch.stack([angle.cos(), angle.sin()], dim=-1)


def _step(x: Tensor) -> Tensor:
    """Return the sign of x, with the gradient of a slope."""
    soft = torch.tanh(10.0 * x)
    return soft + (torch.where(x > 0, 1.0, -1.0) - soft).detach()


@pytest.mark.parametrize("edges", [(0.12, 0.5), (0.5, 0.12)])
def test_planted_radii_are_found_whether_the_choice_falls_or_the_class(edges):
    noise, text = LocalNoise((0.05, 0.1), (0.5,), 0.1), Materials(text=torch.eye(2).numpy())
    clean = image_at(0.5)
    base = float(along(clean))
    model = TwoEdges(base + edges[0], base + edges[1])
    for factor, broken in ((0.98, False), (1.15, True), (1.3, True)):
        radius = factor * 0.12
        claim = VoteQuantity(text=text.classes, label=0, radius=radius, logit_scale=10.0)
        target = Target(image_id="a", pixels=clean, radius=radius, claim=lambda *_, claim=claim: claim)
        found = audit_chosen(
            lambda sigma: smooth(model, sigma), target, replace(QUICK, evidence=2048), noise=noise,
            row={"radius": radius}, sigma=0.1, materials=text, alpha=0.001, seed=0,
        )  # fmt: skip
        fallen = {finding.start.startswith(CHOICE) for finding in found if finding.broken}
        assert fallen == ({edges[0] < edges[1]} if broken else set()), factor
