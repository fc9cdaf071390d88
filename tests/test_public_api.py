"""The library's face: complete, typed, cheap to import, and one loader for every spec and folder."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import robustvlm as rv
from robustvlm.defenses.immunity import immunise_without_images
from robustvlm.defenses.immunity.state import card_settings, save_tensors
from robustvlm.models.saved import Card, write_card

FACE = Path(rv.__file__)


def test_every_public_name_is_there() -> None:
    assert dir(rv) == sorted(rv.__all__)
    for name in rv.__all__:
        assert getattr(rv, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'pertrub'"):
        _ = rv.pertrub


def test_every_name_that_a_package_offers_can_be_imported() -> None:
    offering = 0
    for found in pkgutil.walk_packages(rv.__path__, "robustvlm."):
        if found.ispkg:
            package = import_module(found.name)
            offered = getattr(package, "__all__", ())
            assert [name for name in offered if not hasattr(package, name)] == [], found.name
            offering += bool(offered)
    assert offering > 10


def test_the_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.process_time(); import robustvlm; spent = time.process_time() - start; "
        "heavy = {'torch', 'numpy', 'matplotlib', 'scipy', 'pydantic', 'importlib.metadata'} & set(sys.modules); "
        "print(spent, sorted(heavy))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FACE.parents[1]
    )
    spent, heavy = answer.stdout.split(" ", 1)
    assert heavy.strip() == "[]"
    assert float(spent) < 0.1


def test_a_package_is_a_command_too(tmp_path: Path) -> None:
    options = {"claim": "class", "sigma": 0.05, "samples": 200, "limit": 2, "device": "cpu", "out": tmp_path}
    run = rv.certify("tiny", **options)
    assert run.rows.num_rows == run.summary.images == 2
    assert rv.open_run(run.folder).summary == run.summary
    assert rv.certify.format_down(0.19999, 2) == "0.19"
    for wrong, said in (({"samples": 1}, "samples must be at least 2"), ({"audit": "x"}, "audit")):
        with pytest.raises(rv.UserError, match=said):
            rv.certify("tiny", **{**options, **wrong})


def test_one_loader_for_specs_and_folders(tmp_path: Path) -> None:
    vlm = rv.load_model("tiny", device="cpu")
    made = immunise_without_images(vlm, ["apple", "dog"], ["{}"], ["bus", "guitar"])
    save_tensors(tmp_path, made)
    write_card(tmp_path, Card("immunize", base="tiny", base_fingerprint=vlm.fingerprint, settings=card_settings(made)))
    immune = rv.load_classifier(str(tmp_path), device="cpu")
    assert immune.class_names == ("apple", "dog")
    images = rv.open_data("emoji").tensors(64, limit=6).images
    answers = immune.predict(images)
    with torch.no_grad():
        output = immune(images)
    assert torch.equal(answers.rejected, output[:, -1] <= 0)
    assert torch.equal(answers.scores, output[:, -1])
    assert torch.equal(answers.classes, torch.where(answers.rejected, -1, output[:, :-1].argmax(1)))
    assert answers.names == tuple(None if k < 0 else immune.class_names[k] for k in answers.classes.tolist())
    decided = immune.decide(images)  # type: ignore[attr-defined]
    assert [one.class_name for one in decided] == list(answers.names)

    for spec, classes in (("tiny", "emoji"), ("tiny", rv.open_data("emoji")), ("tiny+reject:0.5", ["apple", "dog"])):
        assert rv.load_classifier(spec, classes, device="cpu").predict(images[:1]).classes.shape == (1,)


def test_a_smoothed_encoder_withholds_what_its_draws_do_not_decide() -> None:
    smoothed = rv.load_classifier("tiny+smooth:0.3:8", ["apple", "dog"], device="cpu")
    answers = smoothed.predict(torch.rand(3, 3, 64, 64), alpha=1e-6)
    assert answers.abstained.all()
    assert answers.classes.tolist() == [-1, -1, -1]
    assert not answers.rejected.any()
    with pytest.raises(rv.UserError, match="does not abstain"):
        rv.load_classifier("tiny", ["apple", "dog"], device="cpu").predict(torch.rand(1, 3, 64, 64), alpha=0.01)


@pytest.mark.parametrize(
    ("spec", "classes", "said"),
    [
        ("tinny", ["a", "b"], "did you mean 'tiny'"),
        ("tiny", None, "knows no classes of its own: pass classes="),
        ("tiny", ["apple"], "at least 2 classes"),
        ("tiny+blurr:3", ["a", "b"], "unknown operator"),
        (3, ["a", "b"], "spec must be a text"),
        ("tiny", ["apple", "Apple "], "with classes"),
    ],
)
def test_mistakes_name_arguments(spec: str, classes: list[str] | None, said: str) -> None:
    with pytest.raises(rv.UserError, match=said) as caught:
        rv.load_classifier(spec, classes, device="cpu")
    assert "--" not in str(caught.value)
