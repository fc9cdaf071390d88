"""The class that free answers name: what is counted, that silence certifies nothing, and the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import robustvlm as rv
from robustvlm.attacks.goals.words import first_named, names
from robustvlm.certify import VoteRadius
from robustvlm.certify.claims.vote import VoteAtRadius, VoteQuantity, vote_winner, votes_for
from robustvlm.commands.certify.audit import Effort, audit_folder
from robustvlm.defenses.answering import NO_CLASS, Answering, Naming, NamingVLM, answers_of
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.mllm import MllmVLM
from tests.models.transformers_folders import SIDE, make

NAMES = ["cat", "dog", "hot dog"]


def test_the_first_name_in_an_answer_counts_and_the_longer_of_two_at_one_place() -> None:
    for answer, wanted in [
        ("a dog and a cat", 1),
        ("A hot-dog, a dog.", 2),
        ("two dogs", 1),
        ("a hotdog", 2),
        ("concatenate", None),
        ("", None),
        ("hot cats; dog", 0),
    ]:
        assert first_named(answer, NAMES) == wanted
        assert (wanted is None) == (not any(names(answer, name) for name in NAMES))
    assert first_named("it's", ["???", "!"]) is None


def test_rows_of_no_class_are_votes_for_none() -> None:
    axes = np.eye(4)[:3]  # of K = 3 classes in K + 1 places
    rows = np.eye(4)[[0, 1, 1, 3, 3, 3, 3]]
    assert [int(votes_for(rows, axes, k).sum()) for k in range(3)] == [1, 2, 0]
    assert vote_winner(rows, axes) == 1
    assert vote_winner(rows[3:], axes) == -1
    assert not votes_for(rows[3:], axes, -1).any()
    quantity = VoteQuantity(text=axes, label=0, radius=0.1, logit_scale=1.0)
    assert quantity.value(rows) == pytest.approx(1 / 7)


@pytest.mark.parametrize("silent", [0.0, 0.3, 0.55, 1.0])
def test_silence_certifies_nothing_and_the_share_is_what_it_is(silent: float) -> None:
    """A silent copy has no largest cosine, and numpy's first of several would be class 0."""
    rng, axes, false, alpha = np.random.default_rng(3), np.eye(3)[:2], 0, 0.05
    share = 0.9 * (1 - silent)  # of class 0
    for _ in range(400):
        rows = np.eye(3)[rng.choice(3, 220, p=[share, 1 - share - silent, silent])]
        certifier = VoteRadius(text=axes, sigma=1.0, alpha=alpha, n=220, n_pilot=20)
        start = 0
        while (wanted := certifier.request()) is not None:
            certifier.take(rows[start : start + wanted.sure])
            start += wanted.sure
        found = certifier.finding()
        truth = share if found.prediction == 0 else 1 - share - silent if found.prediction == 1 else 0.0
        # The true radius is Phi^-1 of the true share, and none at a half or less.
        normal = torch.distributions.Normal(0.0, 1.0)
        true_radius = float(normal.icdf(torch.tensor(truth).double())) if truth > 0.5 else 0.0
        false += found.radius > max(true_radius, 0.0) + 1e-9
    assert false <= 400 * alpha + 3 * np.sqrt(400 * alpha * (1 - alpha))
    if silent == 1.0:
        assert found.prediction == -1
        assert found.radius == 0.0


def test_the_test_of_one_radius_counts_silence_against_the_class() -> None:
    axes, rows = np.eye(3)[:2], np.eye(3)[[0, 2] * 2000]
    certifier = VoteAtRadius(text=axes, radius=0.1, sigma=1.0, alpha=0.01, n=4000, n_pilot=20)
    start = 0
    while (wanted := certifier.request()) is not None:
        certifier.take(rows[start : start + wanted.sure])
        start += wanted.sure
    assert certifier.finding().radius == 0.0


def test_features_are_axes_of_what_is_said(tmp_path: Path) -> None:
    make(tmp_path / "m", "llava")
    model = load_model(f"mllm:{tmp_path / 'm'}#describe the picture.")
    assert isinstance(model, MllmVLM)
    pixels = torch.rand(3, 3, SIDE, SIDE)
    said = Answering(model, NAMES).say(pixels)
    vlm = answers_of(model, NAMES, in_words=True)
    assert isinstance(vlm, NamingVLM)
    found = vlm.encode_image(pixels)
    for row, answer in zip(found, said, strict=True):
        named = first_named(answer, NAMES)
        assert row.tolist() == torch.eye(4)[3 if named is None else named].tolist()
    assert vlm.class_vectors(["dog", "cat"]).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert vlm.at_noise(0.5).fingerprint == vlm.fingerprint
    # The deployed vote is of the same answers, with silence as a class of its own.
    naming = Naming(model, NAMES)
    assert naming.class_names == (*NAMES, NO_CLASS)
    assert naming.predict(pixels).classes.tolist() == found.argmax(1).tolist()
    voted = rv.Smoothed(naming, sigma=1e-6, n=20).predict(pixels, alpha=0.05)
    assert voted.tolist() == found.argmax(1).tolist()
    assert vlm.fingerprint != answers_of(model, NAMES).fingerprint


def test_certify_and_audit_of_a_model_that_describes_pictures(tmp_path: Path) -> None:
    run = rv.certify(
        "mllm:tiny#describe the picture.", claim="named", sigma=0.03, samples=60, alpha=0.05, limit=3, out=tmp_path,
        name="n", device="cpu",
    )  # fmt: skip
    rows = pq.read_table(run.folder / "results.parquet").to_pylist()
    assert len(rows) == 3
    assert any(row["radius"] > 0 for row in rows)
    for row in rows:
        told = json.loads(row["certificate"])
        assert (told["claim"], told["label"]) == ("named", row["prediction"])
        assert row["votes"] <= 1
    few = Effort(starts=1, steps=1, draws=2, choice=4, evidence=64, fractions=(1.0,))
    assert audit_folder(run.folder, effort=few, limit=1).findings
    assert "name first" in (run.folder / "report.html").read_text()


def test_models_without_words_are_refused() -> None:
    with pytest.raises(UserError, match="does not answer in words"):
        rv.certify("tiny", claim="named", sigma=0.1, samples=50, alpha=0.05, limit=1)
