"""A smoothed model that abstains: one rule in its spec and folder, the same for every command."""

import json
import re

import numpy as np
import pytest
import torch

import robustvlm as rv
from robustvlm.certify import predict, vote_predict
from robustvlm.commands.evaluate.beside import _attacked
from robustvlm.commands.evaluate.view import _corrupted as corruptions_of
from robustvlm.commands.export.card import _attack
from robustvlm.defenses.abstaining import by_mean, by_vote
from robustvlm.defenses.assemble import Recipe
from robustvlm.defenses.load import declared_rule, load_classifier
from robustvlm.errors import UserError

CLASSES = ["apple", "dog", "car"]
RULE = "tiny+smooth:0.02:16:0.01:vote"


def features(seed, n=60, dim=5, towards=1.0):
    rows = torch.randn(4, n, dim, generator=torch.Generator().manual_seed(seed))
    rows[:, :, 0] += towards
    return torch.nn.functional.normalize(rows, dim=-1)


def text(count=4, dim=5):
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(9))
    return torch.nn.functional.normalize(rows + torch.eye(count, dim), dim=-1)


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("towards", [0.0, 1.0, 4.0])
def test_the_module_is_the_rule_that_certificates_are_about(towards, failed):
    answered = 0
    for seed in range(8):
        rows, classes = features(seed, towards=towards), text()
        if failed:
            rows[:, ::7] = float("nan")
        table = classes.double().numpy()
        for rule, reference in (
            (by_mean, lambda one, table=table: predict(one, table, 0.05)),
            (by_vote, lambda one, table=table: vote_predict(votes_of(one, table), 0.05)),
        ):
            logits, evidence = rule(rows, classes, 10.0)
            labels = torch.where(evidence > np.log(20.0), logits.argmax(1), -1).tolist()
            wanted = [reference(row) for row in rows.double().numpy()]
            assert labels == [-1 if label is None else label for label in wanted]
            answered += sum(label >= 0 for label in labels)
    assert answered > 0 or towards == 0.0


def votes_of(rows, table):
    kept = rows[np.isfinite(rows).all(axis=1)]
    return np.bincount((kept @ table.T).argmax(axis=1), minlength=len(table))


@pytest.mark.parametrize("rule", [by_mean, by_vote])
def test_attacks_get_a_gradient_of_both_columns(rule):
    rows = features(1).requires_grad_(True)
    logits, evidence = rule(rows, text(), 10.0)
    for part in (logits.sum() + logits[:, 0].sum(), evidence.sum()):
        (slope,) = torch.autograd.grad(part, rows, retain_graph=True)
        assert slope.isfinite().all()
        assert slope.abs().sum() > 0


def test_a_gradient_does_not_hold_copies_times_classes_of_every_image():
    rows, held = features(3, n=80).requires_grad_(True), []
    keep = lambda kept: held.append(kept.numel()) or kept  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        _, evidence = by_mean(rows, text(count=200), 10.0)
    assert sum(held) < 4 * 40 * 200
    evidence.sum().backward()
    assert rows.grad.abs().sum() > 0


def test_two_classes_with_one_vector_are_never_told_apart():
    classes = text()
    classes[1] = classes[0]
    assert (
        (by_mean(features(2, towards=9.0), classes, 1.0)[1] <= 0)
        .logical_or(by_mean(features(2, towards=9.0), classes, 1.0)[0].argmax(1) > 1)
        .all()
    )


def test_a_model_abstains_by_its_spec():
    model = load_classifier(RULE, CLASSES)
    found = model.predict(torch.rand(3, 3, 64, 64))
    assert model.abstains
    assert not found.rejected.any()
    assert ((found.classes < 0) == found.abstained).all()
    assert model.says == "the class that the vote of 16 noisy copies decides at alpha 0.01, else no answer"
    score, needed = model.refusal(found.output)
    assert ((score > needed) == ~found.abstained).all()
    assert declared_rule("tiny+smooth:0.02:16") is None
    plain = load_classifier("tiny+smooth:0.02:16", CLASSES)
    assert not plain.abstains
    assert plain.fingerprint != model.fingerprint
    with pytest.raises(UserError, match="abstains at an alpha of its own"):
        model.predict(torch.rand(1, 3, 64, 64), alpha=0.01)


def test_votes_that_are_just_significant_answer_as_the_rule_that_is_certified_does():
    """Four votes of four have a p-value of exactly 1/8."""
    model = load_classifier("tiny+smooth:0.001:4:0.125:vote", CLASSES)
    assert vote_predict([4, 0, 0], 0.125) == 0
    assert not model.predict(torch.full((2, 3, 64, 64), 0.5)).abstained.any()


@pytest.mark.parametrize("spec", ["mllm:tiny+smooth:0.06:64:0.001:vote", "mllm:tiny+smooth:0.06:64:0.001"])
def test_no_rule_is_certified_that_no_command_answers_by(spec, tmp_path):
    with pytest.raises(UserError, match=f"'{re.escape(spec)}' cannot abstain"):
        rv.certify(spec, limit=1, samples=60, alpha=0.05, out=tmp_path, device="cpu")


def test_a_head_that_refuses_is_not_built_into_a_model_that_answers_by_the_mean():
    with pytest.raises(UserError, match=r"answer by vote.*pass --smooth 0.1:64:0.001:vote, or leave out ALPHA"):
        Recipe("tiny", smooth="0.1:64:0.001", immunize="immune")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tiny+smooth:0.1:16:0.001", "16 copies never decide a class at alpha 0.001.*27 or more"),
        ("tiny+smooth:0.1:64:0.7", "from 1e-100 to 0.5, got 0.7"),
        ("tiny+smooth:0.1:4000:1e-310:vote", "from 1e-100 to 0.5, got 1e-310"),
        ("tiny+smooth:0.1:64:often", "must be a number, got 'often'"),
        ("tiny+smooth:0.1:64:0.001:votes", "did you mean 'vote'"),
        ("tiny+smooth:0.1:64:0.001:vote:1", "must be written"),
        ("tiny+smooth:0.1:64:0.001+bits:3", "would answer otherwise: smooth the defended model"),
        ("tiny+smooth:0.1:64:0.001+reject:0.5", "refuses images by itself already"),
        ("mllm:tiny+smooth:0.1:64:0.001", "cannot abstain"),
    ],
)
def test_rules_that_cannot_be_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        load_classifier(spec, CLASSES)


def test_a_folder_carries_the_rule_through_every_command(tmp_path):
    made = rv.build("tiny", smooth="0.02:16:0.01:vote", out=tmp_path)
    assert json.loads((made.folder / "model.json").read_text())["settings"]["smooth"] == "0.02:16:0.01:vote"
    assert made.summary.rule == "the class that the vote of 16 noisy copies decides at alpha 0.01, else no answer"
    folder = str(made.folder)
    assert load_classifier(folder, CLASSES).fingerprint == load_classifier(RULE, CLASSES).fingerprint
    said = rv.predict(folder, data="emoji", limit=2, device="cpu")
    assert said.rule == made.summary.rule
    assert not any(said.rejected)
    found = rv.evaluate(folder, limit=4, corrupt="fog:1", out=tmp_path, device="cpu").summary
    told = [block.title for block in corruptions_of(found)]
    assert told == ["Right under common corruptions", "No answer under common corruptions"]
    assert found.abstained.total == 4
    assert found.rejected is None
    assert found.accuracy.successes + found.abstained.successes <= 4
    certified = rv.certify(folder, limit=2, samples=100, out=tmp_path, device="cpu")
    config = certified.manifest["config"]
    assert (config["claim"], config["deployed"], config["abstains_at"]) == ("vote", 16, 0.01)
    assert "answers another class than the certified one with probability at most 0.01" in certified.summary.deployed
    rows = certified.rows.to_pylist()
    assert all(0.0 <= row["deployed_radius"] <= row["radius"] for row in rows)
    with pytest.raises(UserError, match="answers by the vote of its copies"):
        rv.certify(folder, claim="class", limit=1, samples=100, out=tmp_path)


def test_an_abstention_is_no_wrong_class_to_an_attack(tmp_path):
    """Copies that never agree: nothing is answered, so nothing is fooled, and that is counted apart."""
    run = rv.attack(
        "tiny+smooth:0.5:16:0.0001:vote", attack="pgd", steps=1, limit=2, lanes=2, eot=1, draws=1, checks="none",
        out=tmp_path, device="cpu", seed=3,
    )  # fmt: skip
    at = run.summary.at("2/255")
    assert run.summary.abstains
    taken = at.acceptance
    assert taken.clean_accepted + taken.clean_rejected == 2
    assert at.fooled <= taken.accepted
    assert run.manifest["model"]["abstains"] is True
    ((what, *_),) = _attacked(run)
    assert "right or no answer" in str(what), "beside clean accuracy, which counts right answers alone"
    assert [row.what for row in _attack(run.summary)[0]][-1].startswith("right or no answer after the attacks")
