"""Methods paragraphs: every built-in thing has its paper, every kind of run its text; names from outside stay words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robustvlm.attacks.base import ATTACKS
from robustvlm.attacks.catalog import PACKAGES
from robustvlm.certify.claims import CLAIMS
from robustvlm.cli.acts import report
from robustvlm.data.corruptions import parse_corruptions, written
from robustvlm.defenses.finetune import METHODS
from robustvlm.defenses.zoo.base import DEFENCES
from robustvlm.detect import SCORES
from robustvlm.errors import UserError
from robustvlm.report.methods import _corruptions, attack_words, methods_of
from robustvlm.report.repeat import repeatable
from robustvlm.report.sections import Checks, Facts, Report, Section
from robustvlm.report.sources import OF, named_in, papers
from robustvlm.report.words import finding
from robustvlm.runs.records import Drawn, read_drawn

BEFORE = Path(__file__).parents[1] / "pins" / "before"
KINDS = ("attack", "certify", "recertify", "detect", "finetune", "purify", "immunize")
JUDGED = {
    "kind": "judge",
    "config": {"model": "tiny+clipure,tiny+bits:3", "data": "emoji", "norm": "Linf", "eps_text": "4/255", "steps": 9}
    | {"queries": 7, "seed": 3},
}


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = JUDGED if name == "judge" else json.loads((BEFORE / name / "manifest.json").read_text())
    return found


def test_every_built_in_thing_has_its_paper() -> None:
    assert set(OF["attack"]) == {*ATTACKS, *PACKAGES}
    assert set(OF["claim"]) == set(CLAIMS)
    assert set(OF["method"]) == set(METHODS)
    assert all(key in papers() for names in OF.values() for keys in names.values() for key in keys)
    assert [name for name, keys in OF["attack"].items() if not keys] == []
    assert [name for name in SCORES if not named_in(SCORES[name].source)] == []
    # A control of the same cost as other methods is in no paper.
    without = [name for name, kind in DEFENCES.items() if not named_in(kind.about.reference)]
    assert all("arXiv" not in DEFENCES[name].about.reference for name in without)
    assert len(without) <= 1


def test_every_paper_is_whole_and_there_once() -> None:
    text = (Path(__file__).parents[2] / "robustvlm" / "report" / "references.bib").read_text(encoding="utf-8")
    assert text.count("@") == len(papers())
    numbers = [paper.arxiv for paper in papers().values() if paper.arxiv]
    assert len(numbers) == len(set(numbers))
    for paper in papers().values():
        assert "," in paper.author
        assert 1900 < paper.year <= 2026
        assert paper.title
        assert paper.bibtex.count("{") == paper.bibtex.count("}")


@pytest.mark.parametrize("name", [*KINDS, "judge"])
def test_a_run_has_a_paragraph_with_the_papers_that_it_names(name: str) -> None:
    made = methods_of(manifest(name))
    assert "[@" not in made.text
    assert "None" not in made.text
    assert "  " not in made.text
    assert made.latex.count("\\citep{") == made.marked.count("[@")
    assert made.bibtex.count("@") == len(made.keys) > 0
    for key in made.keys:
        assert papers()[key].short in made.text
    seed = manifest(name)["config"].get("seed")
    assert f"seed {seed}." in made.text


def test_the_strength_of_an_attack_is_that_which_ran() -> None:
    assert attack_words("pgd:steps=12", restarts=3) == "PGD [@madry2018] with 12 steps and 3 restarts"
    assert attack_words("pgd", steps=7) == "PGD [@madry2018] with 7 steps and 1 restart"
    assert attack_words("square", steps=7) == "the Square Attack [@andriushchenko2020] with 5,000 queries"
    assert attack_words("apgd-ce:objective=margin").endswith("100 steps and the objective margin")
    assert attack_words("mine.py:attack") == "mine.py:attack"


def test_how_a_random_model_was_asked_is_said_also_where_no_setting_told_it() -> None:
    plain = methods_of(manifest("attack"))
    assert "averaged" not in plain.text
    usual = methods_of(manifest("attack"), drawn=Drawn(eot=10, draws=21, upholding=101))
    assert "Gradients are averaged over 10 draws of the random model (Athalye et al., 2018)." in usual.text
    assert "in the majority of 21 fresh draws, and then in that of 101 more." in usual.text
    one = methods_of(manifest("attack"), drawn=Drawn(eot=1, draws=1, upholding=0)).text
    assert "The model is random; each gradient is of one draw. One draw decides on a success." in one
    old = manifest("attack")
    told = methods_of({**old, "config": {**old["config"], "eot": 4, "draws": 9}}).text
    assert "over 4 draws" in told
    assert "in the majority of 9 fresh draws." in told


def test_a_summary_of_another_form_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    assert read_drawn(path) is None
    path.write_text('{"drawn": null}')
    assert read_drawn(path) is None
    path.write_text('{"drawn": {"eot": 10}}')
    with pytest.raises(UserError, match="is damaged"):
        read_drawn(path)


@pytest.mark.parametrize("name", ["immunize", "attack"])
def test_how_copies_count_is_said_where_there_are_any(name: str) -> None:
    made, said = manifest(name), "copies of one thing count once"
    made["config"]["data"] = "emoji?split=test"
    assert said in methods_of(made).text
    made["config"]["data"] = "imagefolder:photos"
    assert said not in methods_of(made).text


def test_names_from_outside_are_no_citations_and_no_commands() -> None:
    config = JUDGED["config"] | {"model": "[@nobody] \\input{x} \x1b[2J", "data": "50%_[@a; @b]"}  # type: ignore[operator]
    made = methods_of({"kind": "judge", "config": config})
    assert "[@nobody] \\input{x} [2J" in made.text
    assert "\\input" not in made.latex
    assert "\\textbackslash{}input\\{x\\}" in made.latex
    assert "nobody" not in made.bibtex


def test_a_report_ends_with_what_makes_the_run_again() -> None:
    checks = Checks([finding("ok", "fine", "good one"), finding("warning", "odd", "odd one"), finding("fault", "bad")])
    made = repeatable(Report("k", "n", "k", "f", [], [Section("Checks", [checks])]), manifest("attack"))
    assert [section.key for section in made.sections[1:]] == ["methods", "manifest"]
    facts = next(block for block in made.sections[-1].blocks if isinstance(block, Facts))
    rows = dict(facts.rows)
    assert rows["Checks that fired"] == "warning: odd one; fault: bad"
    assert rows["Program"] == "robustvlm 0.1.0, commit 2d49fa0a6fd9"
    assert rows["Seed"] == "0"
    assert {"Libraries", "Device", "Model", "Data", "Run", "Started"} <= rows.keys()


def test_a_run_of_two_versions_names_both() -> None:
    begun = manifest("attack")
    other = {"versions": begun["versions"] | {"robustvlm": "0.2.0"}, "git_commit": "abc+"}
    told = {**begun, "sessions": [other]}
    made = repeatable(Report("k", "n", "k", "f", [], []), told)
    rows = dict(next(block for block in made.sections[-1].blocks if isinstance(block, Facts)).rows)
    changed = "with changes that are in no commit"
    assert rows["Program"] == f"robustvlm 0.1.0, commit 2d49fa0a6fd9; then robustvlm 0.2.0, commit abc, {changed}"
    assert str(rows["Libraries"]).count("python ") == 1
    assert "robustvlm 0.1.0 and 0.2.0, PyTorch" in methods_of(told).text


def test_the_command_prints_it_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    made, run = methods_of(manifest("attack")), str(BEFORE / "attack")
    report([run], None, as_json=False, methods=True)
    said = capsys.readouterr().out
    assert made.text in said
    assert made.latex in said
    assert made.bibtex in said
    report([run], None, as_json=True, methods=True)
    assert json.loads(capsys.readouterr().out) == {"text": made.text, "latex": made.latex, "bibtex": made.bibtex}
    for runs, out in (([run, run], None), ([run], Path("x.html"))):
        with pytest.raises(UserError, match="of one run"):
            report(runs, out, methods=True)
    with pytest.raises(UserError, match="'soup' has no methods text"):
        report([str(BEFORE / "soup")], None, methods=True)


def test_a_run_of_another_version_has_a_report_all_the_same() -> None:
    made = repeatable(Report("k", "n", "k", "f", [], []), {"kind": "attack", "config": {"seed": 1}})
    assert [section.key for section in made.sections] == ["manifest"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("all", "the 15 common corruptions of [@hendrycks2019] at severities 1, 2, 3, 4 and 5,"),
        ("all:3", "the 15 common corruptions of [@hendrycks2019] at severity 3,"),
        ("all:1,all:3", "the 15 common corruptions of [@hendrycks2019] at severities 1 and 3,"),
        # All kinds, but not all of them at all severities.
        ("all:3,fog", "fog:1,fog:2,fog:3,fog:4,fog:5,brightness:3,"),
        ("fog:2,snow", "common corruptions (snow:1,snow:2,snow:3,snow:4,snow:5,fog:2: kind and severity) of"),
    ],
)
def test_corruptions_are_those_that_were_asked_for(asked: str, said: str) -> None:
    (found,) = _corruptions({"config": {"corrupt": written(parse_corruptions(asked))}})
    assert said in found


@pytest.mark.parametrize(
    ("given", "said", "unsaid"),
    [
        ({"only": "mapper"}, "trained a mapper of features for", "the EDM design"),
        ({"denoiser": "mine:make"}, "behind the denoiser mine:make, which is not ours", "the EDM design"),
        ({"only": "purifier"}, "we trained the purifier of pixels", "The mapper was trained"),
        ({}, "we trained purifier and mapper", "not ours"),
    ],
)
def test_only_what_was_trained_of_a_purifier_is_said_to_be(given: dict[str, str], said: str, unsaid: str) -> None:
    made = manifest("purify")
    made["config"] |= {"only": None, "denoiser": None} | given
    text = methods_of(made).text
    assert said in text
    assert unsaid not in text


def test_attacks_in_training_are_told_of_methods_that_make_them() -> None:
    made = manifest("finetune")
    made["config"] |= {"method": "tecoa", "inner_steps": 3}
    assert "attacked by PGD" in methods_of(made).text
    assert "attacked by PGD" not in methods_of({**made, "attacked": False}).text  # a method of one's own
    made["config"] |= {"method": "clean"}
    assert "attacked by PGD" not in methods_of(made).text
