"""Runs that certify the class for all wordings at once, from templates and from a file: recorded, audited, refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic_encoders import Analytic, along, image_at
from certifying import prepared
from scipy.stats import norm
from torch import Tensor

from robustvlm.certify.claims.changed_words import WordsQuantity
from robustvlm.certify.claims.wordings import AnyWordingQuantity, SureVoteQuantity
from robustvlm.certify.means import clopper_pearson_lower
from robustvlm.certify.threats import find_threat
from robustvlm.certify.wordings import Wordings
from robustvlm.commands.certify.audit import audit_folder
from robustvlm.commands.certify.audit_search import Effort, Target, audit_image
from robustvlm.commands.certify.setup import prompts_of
from robustvlm.commands.certify.wordings import by_class, texts_of
from robustvlm.defenses import smooth
from robustvlm.errors import UserError

QUICK = Effort(starts=4, steps=8, draws=8, choice=64, evidence=2048, fractions=(1.0,))


@pytest.fixture
def photos(make_folder):
    return make_folder(4)


def certified(photos, name, **options):
    return prepared(photos, name=name, sigma=0.02, **options).start()


def test_every_record_says_which_wordings_and_an_audit_attacks_all_of_them(photos):
    templates = photos.parent / "templates.txt"
    templates.write_text("a photo of a {}.\na picture of a {}\n{}\n")
    classes = sorted(path.name for path in photos.iterdir())
    lines = [f"{name}: {text}" for name in classes for text in (f"one {name}", f"this is a {name}")]
    file = photos.parent / "paraphrases.txt"
    file.write_text("\n".join(lines[:-1]) + "\n")
    for claim, how in (("class", "templates"), ("vote", str(file))):
        run = certified(photos, claim, claim=claim, templates=templates, paraphrases=how, samples=200, limit=2)
        records = [json.loads(row["certificate"]) for row in run.rows.to_pylist()]
        assert {record["theorem"] for record in records} == {"T23"}
        told = prompts_of(run.config, run.manifest["model"], ("a photo of a {}.", "a picture of a {}", "{}"))
        assert {record["prompts"] for record in records} == {told}
        assert told != prompts_of(run.config.model_copy(update={"paraphrases": None}), run.manifest["model"], ())
        assert "wordings" in run.summary.statement
        assert not audit_folder(run.folder, replace(QUICK, evidence=64, steps=2), limit=1).broken
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"the paraphrases of .* have changed"):
        audit_folder(run.folder, QUICK, limit=1)


class Turned(Analytic):
    """Features that turn by a right angle beyond an edge of z."""

    def _image_features(self, pixels: Tensor) -> Tensor:
        z = along(pixels) - self.edge
        soft = torch.tanh(10.0 * z)
        side = soft + (torch.where(z > 0, 1.0, -1.0) - soft).detach()
        angle = 0.45 * side
        return torch.stack([angle.cos(), angle.sin()], dim=-1)


@pytest.mark.parametrize("votes", [True, False])
def test_planted_radii_are_found_where_only_one_of_the_wordings_falls(votes):
    """The first wording keeps its class everywhere; the second loses it beyond the edge."""
    directions = torch.tensor([[0.0], [0.9], [np.pi], [-0.9]]).double()
    vectors = torch.cat([directions.cos(), directions.sin()], dim=1).numpy()
    words = Wordings((np.stack([vectors[0], vectors[3]]), np.stack([vectors[2], vectors[1]])), aligned=True)
    model = Turned("turned")
    clean = image_at(0.5)
    model.edge = float(along(clean)) + 0.12
    for factor, broken in ((0.98, False), (1.15, True), (1.3, True)):
        facts = {"text": vectors[[0, 2]], "label": 0, "radius": factor * 0.12, "wordings": words}
        claim = SureVoteQuantity(**facts, logit_scale=10.0) if votes else AnyWordingQuantity(**facts)
        target = Target(image_id="a", pixels=clean, radius=factor * 0.12, claim=lambda *_, claim=claim: claim)
        found = audit_image(smooth(model, 0.1), target, QUICK, alpha=0.001, seed=0)
        assert any(finding.broken for finding in found) == broken, factor


def test_planted_radii_are_found_once_a_word_of_one_wording_is_changed():
    """One of five wordings calls everything by another name after the change; the others share a half-space."""
    true, turn = 0.12, np.sqrt(0.5)
    texts = np.array([[turn, -turn], [turn, turn]])  # features are at the angles -0.45 and 0.45, on either side
    changed = [np.array([[-1.0, 0.0], texts[1]]), *[texts] * 4]
    model, clean = Turned("turned"), image_at(0.5)
    # Where the other four are left with half of all votes, and not of their own.
    model.edge = float(along(clean)) + true + 0.1 * norm.ppf(0.5 / 0.8)
    for factor, broken in ((0.97, False), (1.15, True), (1.3, True)):
        claim = WordsQuantity(tables=changed, label=0, radius=factor * true, logit_scale=10.0)
        target = Target(image_id="a", pixels=clean, radius=factor * true, claim=lambda *_, claim=claim: claim)
        found = audit_image(smooth(model, 0.1), target, replace(QUICK, evidence=4096), alpha=0.001, seed=0)
        assert any(finding.broken for finding in found) == broken, factor


def test_a_file_names_paraphrases_of_classes_that_hold_a_colon(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("cat: a cat\ncat: big: a big cat\ncat: a cat\n# none of dog\n")
    assert by_class(str(file), ["cat", "cat: big", "dog"]) == [["a cat"], ["a big cat"], []]


@pytest.mark.parametrize(
    ("content", "said"), [("cow: a cow\n", "no text of a class"), ("cat\n", "CLASS: TEXT"), ("# none\n", "is empty")]
)
def test_mistakes_in_a_file_are_named(tmp_path, content, said):
    file = tmp_path / "texts.txt"
    file.write_text(content)
    with pytest.raises(UserError, match=said):
        by_class(str(file), ["cat", "dog"])


def test_texts_that_are_read_by_turns_do_not_move_up_for_a_repeated_one(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("cat: a\ncat: a\ncat: b\ndog: x\ndog: y\n")
    with pytest.raises(UserError, match="'cat: a' stands twice"):
        texts_of(str(file), ("cat", "dog"), ("{}",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"claim": "feature"}, "certified of a class"),
        ({"radius": 0.01}, "do not go together"),
        ({"paraphrases": "no-such-file.txt"}, "no-such-file"),
    ],
)
def test_what_is_not_certified_for_all_wordings_is_refused(photos, options, said):
    with pytest.raises(UserError, match=said):
        certified(photos, "refused", **{"paraphrases": "templates"} | options)


@pytest.fixture(scope="session")
def long_texts():
    return "".join(f"{{}} {word}\n" for word in ("one", "two", "three", "four", "five"))


def test_changed_words_are_certified_with_the_image_and_an_audit_changes_them(photos, long_texts):
    templates = photos.parent / "templates.txt"
    templates.write_text(long_texts)
    options = {"claim": "vote", "templates": templates, "paraphrases": "templates", "limit": 2}
    run = certified(photos, "words", words=2, **options)
    for row in run.rows.to_pylist():
        assert row["radius"] == row["words2_radius"] <= row["words1_radius"] <= row["words0_radius"]
        record = json.loads(row["certificate"])
        assert record["theorem"] == "T24"
        assert "wordings" in record["rule"]
    assert "2 words" in run.summary.statement
    assert {method.column for method in run.summary.methods} >= {"words0_radius", "words1_radius", "words2_radius"}
    found = audit_folder(run.folder, replace(QUICK, evidence=64, steps=2), limit=1)
    assert not found.broken
    assert "words" in found.quantity


def test_changed_words_beside_another_threat_are_certified_in_its_own_unit(photos, long_texts):
    templates = photos.parent / "templates.txt"
    templates.write_text(long_texts)
    options = {"claim": "vote", "templates": templates, "paraphrases": "templates", "limit": 1, "threat": "l1"}
    (row,) = prepared(photos, name="l1", sigma=0.001, words=0, **options).start().rows.to_pylist()
    most = float(clopper_pearson_lower(row["n"], row["n"], 0.01))
    # Gaussian noise would keep 2 sigma of so sure a vote.
    assert 0.0 < row["radius"] <= find_threat("l1").reach(most, 0.5, 0.001) < 0.0017


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"claim": "class"}, "copies that vote"),
        ({"paraphrases": None}, "copies that vote"),
        ({"words": 3}, "at least 7 wordings"),
        ({"model": "Encoder+smooth:0.02:64:0.01:vote", "sigma": None}, "another rule"),
    ],
)
def test_what_is_not_certified_of_words_is_refused(photos, long_texts, options, said):
    templates = photos.parent / "templates.txt"
    templates.write_text(long_texts)
    known = {"claim": "vote", "templates": templates, "paraphrases": "templates", "words": 1, "sigma": 0.02}
    with pytest.raises(UserError, match=said):
        prepared(photos, name="refused", **{**known, **options}).start()
