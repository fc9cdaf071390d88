"""A model whose noise is chosen for each image: one rule in its spec, for predict, evaluate, attack and certify."""

import numpy as np
import pytest
import torch

import robustvlm as rv
from robustvlm.certify import predict, vote_predict
from robustvlm.defenses.load import declared_rule, load_classifier
from robustvlm.defenses.local_noise import LocallyAbstaining
from robustvlm.errors import UserError

CLASSES = ["apple", "dog", "car"]
SPEC = "tiny+dual:0.01,0.03:0.05:0.02:48:0.01"


def unit(seed, n, spread):
    rows = torch.randn(6, n, 5, generator=torch.Generator().manual_seed(seed)) * spread
    rows[:3, :, 0] += 1.0
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.mark.parametrize("votes", [True, False])
@pytest.mark.parametrize("spread", [0.1, 0.6])
def test_the_module_is_the_rule_that_certificates_are_about(votes, spread, monkeypatch):
    model = load_classifier(SPEC + ":vote" * votes, CLASSES)
    assert isinstance(model, LocallyAbstaining)
    first, rest, text = unit(1, 24, spread), unit(2, 24, spread), torch.eye(5)[:3]
    used = []
    monkeypatch.setattr(model.encoder, "drawn", lambda _, n: first[:, :n])
    monkeypatch.setattr(model.encoder, "drawn_at", lambda _, n, sigmas: used.append(sigmas) or rest[:, :n])
    monkeypatch.setattr(type(model), "class_embeddings", property(lambda _: text))
    said = model.predict(torch.zeros(6, 3, 64, 64)).classes.tolist()
    levels = [np.bincount(model.encoder.law.levels(rows.double().numpy(), text), minlength=2) for rows in first]
    assert used[0].tolist() == pytest.approx([model.encoder.law.sigmas[count.argmax()] for count in levels])
    wanted = []
    for rows, counts in zip(rest.double().numpy(), levels, strict=True):
        table = text.double().numpy()
        votes_of = np.bincount((rows @ table.T).argmax(axis=1), minlength=3)
        answer = vote_predict(votes_of, 0.01) if votes else predict(rows, table, 0.005)
        wanted.append(-1 if answer is None or vote_predict(counts, 0.01) is None else answer)
    assert said == wanted


def test_attacks_get_the_gradient_of_answer_choice_and_evidence():
    model = load_classifier(SPEC, CLASSES)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    output = model(pixels)
    for column in (0, -1):
        (slope,) = torch.autograd.grad(output[:, column].sum(), pixels, retain_graph=True)
        assert slope.isfinite().all()
        assert slope.abs().sum() > 0
    with torch.no_grad():
        assert model(pixels).shape == (1, 4)


def test_the_gradient_leads_to_a_level_at_which_the_class_is_another_one(monkeypatch):
    """The answer at the chosen level has no slope at all here: what is left is the slope of choosing another one."""
    model = load_classifier(SPEC + ":vote", ["apple", "dog"])
    text = torch.eye(2)
    z = torch.tensor([[0.0]], requires_grad=True)

    def drawn(_, n):
        angle = 0.6 + 0.1 * z + 0.05 * torch.linspace(-1, 1, n)  # below pi / 4: class 0, margin cos - sin
        return torch.stack([angle.cos(), angle.sin()], dim=2)

    def drawn_at(_, n, sigmas):
        return text[(sigmas < 0.02).long()][:, None].expand(-1, n, -1)  # class 1 at the small noise alone

    monkeypatch.setattr(model.encoder, "drawn", drawn)
    monkeypatch.setattr(model.encoder, "drawn_at", drawn_at)
    monkeypatch.setattr(type(model), "class_embeddings", property(lambda _: text))
    output = model(torch.zeros(1, 3, 64, 64))
    assert output[0, :2].argmax() == 0  # the large noise
    (slope,) = torch.autograd.grad(output[0, 1] - output[0, 0], z)
    assert slope > 0  # a larger angle is a smaller margin, and a smaller margin the small noise


def test_noise_is_drawn_at_the_level_of_each_image():
    vlm = rv.load_model(SPEC)
    seen = []
    vlm.encode_noisy = lambda noisy: seen.append(noisy) or torch.ones(len(noisy), 2)
    vlm.drawn_at(torch.full((2, 3, 64, 64), 0.5), 40, torch.tensor([0.01, 0.3]))
    away = torch.cat([part.view(2, -1, 3 * 64 * 64) for part in seen], dim=1) - 0.5
    assert away.flatten(1).std(dim=1).tolist() == pytest.approx([0.01, 0.3], rel=0.01)


def test_the_spec_says_all_and_other_models_keep_their_fingerprints():
    assert declared_rule(SPEC) == rv.load_model(SPEC).rule
    assert declared_rule("tiny+dual:0.01,0.03:0.05:0.02").alpha == 0.001
    assert rv.load_model(SPEC).spec == SPEC
    others = ("tiny+smooth:0.02:48:0.01", SPEC.replace(":0.05:", ":0.06:"), SPEC.replace("0.03", "0.04"))
    assert len({rv.load_model(spec).fingerprint for spec in (SPEC, *others)}) == 4
    assert "0.01,0.03" in load_classifier(SPEC, CLASSES).says


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tiny+dual:0.1,0.2:0.5", "must be written"),
        ("tiny+dual:0.1,0.2:0.5:0.1:16", "pass 58 or more"),
        ("tiny+dual:0.1,0.2:0.5:0.1:many", "whole number"),
        ("tiny+dual:0.1,0.2:0.5:0.1:64:0.001:loud", r"\+dual:0\.1,0\.2:0\.5:0\.1:64:0\.001:loud'.*mean or vote"),
        ("tiny+dual:0.1,99:0.5:0.1", "at most 10"),
        ("tiny+dual:0.1,0.2:0.5:0.1+smooth:0.1", "smoothed already"),
    ],
)
def test_mistakes_are_named(spec, said):
    with pytest.raises(UserError, match=said):
        load_classifier(spec, CLASSES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"claim": "feature"}, "what is certified of it is the class"),
        ({"claim": "vote"}, "another rule"),
        ({"cache": "float16"}, "same for all images"),
        ({"radius": 0.01}, "same for all images"),
        ({"sigma": 0.1}, "leave out sigma"),
    ],
)
def test_what_is_not_certified_of_it_is_refused(options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        rv.certify(SPEC, **{"samples": 200, "limit": 1, "out": tmp_path} | options)
